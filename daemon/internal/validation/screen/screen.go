// Package screen reads what is on a machine's screen: from a picture of it, as
// QEMU makes them, it tells whether the screen is blank, reads the text of one
// that shows text, and knows the words by which firmware, boot loaders and
// kernels say that a system did not start. It is pure: no clock, no files.
//
// Text is read by comparing each cell with the fonts that such screens are
// drawn with, dot by dot: nothing is guessed, and a graphical screen has no text.
//
// vga8x16.font are the 256 glyphs of 8x16 dots in code page 437 of the VGA BIOS
// that QEMU has (SeaBIOS' vgabios, there "public domain", from fntcol16.zip of
// Joseph Gil). The others are the 95 glyphs of ASCII as they were seen on a
// screen, and no more than their dots: linux8x16.font what Linux draws on a frame
// buffer, which is the same but for a few, and edk2-8x19.font what UEFI firmware
// of EDK II (BSD-2-Clause-Patent) draws.
package screen

import (
	"bytes"
	"errors"
	"fmt"
	"image"
	"image/draw"
	"image/png"
)

// maximumSide bounds pictures: a guest chooses how large its screen is.
const maximumSide = 4096

// Decode reads a picture in PNG or PPM.
func Decode(data []byte) (image.Image, error) {
	if bytes.HasPrefix(data, []byte("P6")) {
		return decodePPM(data)
	}
	size, err := png.DecodeConfig(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("cannot read a screenshot: %w", err)
	}
	if err := fits(size.Width, size.Height); err != nil {
		return nil, err
	}
	picture, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("cannot read a screenshot: %w", err)
	}
	return picture, nil
}

func fits(width, height int) error {
	if width <= 0 || height <= 0 || width > maximumSide || height > maximumSide {
		return fmt.Errorf("cannot read a screenshot of %d by %d dots: at most %d by %d", width, height, maximumSide, maximumSide)
	}
	return nil
}

// decodePPM reads what QEMU writes: "P6", width, height and 255, and the dots.
func decodePPM(data []byte) (image.Image, error) {
	var width, height, most int
	r := bytes.NewReader(data[2:])
	if _, err := fmt.Fscan(r, &width, &height, &most); err != nil {
		return nil, fmt.Errorf("cannot read a screenshot: its head is no PPM: %w", err)
	}
	if err := fits(width, height); err != nil {
		return nil, err
	}
	dots := data[len(data)-r.Len():]
	if most != 255 || len(dots) != 1+3*width*height {
		return nil, errors.New("cannot read a screenshot: it is no PPM of 8 bits per colour, or cut off")
	}
	picture := image.NewNRGBA(image.Rect(0, 0, width, height))
	for i, dot := 0, dots[1:]; i < width*height; i++ {
		copy(picture.Pix[4*i:], dot[3*i:3*i+3])
		picture.Pix[4*i+3] = 255
	}
	return picture, nil
}

// EncodePNG writes a picture in at most limit bytes: one that takes more is
// made smaller.
func EncodePNG(picture image.Image, limit int) ([]byte, error) {
	for {
		var b bytes.Buffer
		if err := png.Encode(&b, picture); err != nil {
			return nil, fmt.Errorf("cannot write a screenshot: %w", err)
		}
		if b.Len() <= limit {
			return b.Bytes(), nil
		}
		size := picture.Bounds().Size()
		if size.X < 2 || size.Y < 2 {
			return nil, fmt.Errorf("cannot write a screenshot in %d bytes", limit)
		}
		picture = half(picture)
	}
}

// half returns a picture of half the width and height.
func half(picture image.Image) image.Image {
	from := plain(picture)
	width, height := from.Rect.Dx()/2, from.Rect.Dy()/2
	to := image.NewNRGBA(image.Rect(0, 0, width, height))
	for y := range height {
		for x := range width {
			for c := range 4 {
				at := from.PixOffset(2*x, 2*y) + c
				sum := int(from.Pix[at]) + int(from.Pix[at+4]) + int(from.Pix[at+from.Stride]) + int(from.Pix[at+from.Stride+4])
				to.Pix[to.PixOffset(x, y)+c] = uint8(sum / 4)
			}
		}
	}
	return to
}

// plain returns a picture with its dots in memory, from 0, 0 on.
func plain(picture image.Image) *image.NRGBA {
	if p, ok := picture.(*image.NRGBA); ok && p.Rect.Min == (image.Point{}) {
		return p
	}
	p := image.NewNRGBA(image.Rect(0, 0, picture.Bounds().Dx(), picture.Bounds().Dy()))
	draw.Draw(p, p.Rect, picture, picture.Bounds().Min, draw.Src)
	return p
}

// colours returns a number for the colour of each dot, row by row.
func colours(p *image.NRGBA) []uint32 {
	all := make([]uint32, p.Rect.Dx()*p.Rect.Dy())
	for y := range p.Rect.Dy() {
		row := p.Pix[y*p.Stride:]
		for x := range p.Rect.Dx() {
			all[y*p.Rect.Dx()+x] = uint32(row[4*x])<<16 | uint32(row[4*x+1])<<8 | uint32(row[4*x+2])
		}
	}
	return all
}
