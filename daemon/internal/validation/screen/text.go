package screen

import (
	_ "embed"
	"image"
	"math/bits"
	"slices"
	"strings"
)

//go:embed vga8x16.font
var vga string

//go:embed linux8x16.font
var linux string

//go:embed edk2-8x19.font
var edk2 string

// upper are the characters from 128 on of code page 437.
const upper = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ "

// glyphWidth is that of all fonts, in dots; tallest is the height of the highest.
const (
	glyphWidth = 8
	tallest    = 19
)

// glyph is the dots of one character, a byte for each row, the highest bit left.
type glyph [tallest]byte

// font is how one kind of screen draws characters.
type font struct {
	height int
	widths []int // of a cell: the columns to the right of a glyph are empty
	exact  map[glyph]rune
	all    []drawn
}

type drawn struct {
	glyph
	rune
}

// add adds glyphs of characters in code page 437, from first on.
func (f *font) add(data string, first rune) {
	high := []rune(upper)
	for i := range len(data) / f.height {
		r := first + rune(i)
		switch {
		case r < ' ' || r == 127:
			continue // pictures, which no text has
		case r >= 128:
			r = high[r-128]
		}
		var g glyph
		copy(g[:], data[i*f.height:(i+1)*f.height])
		if _, known := f.exact[g]; !known { // ASCII goes first
			f.exact[g] = r
			f.all = append(f.all, drawn{g, r})
		}
	}
}

func fonts() []font {
	low := font{height: 16, widths: []int{9, 8}, exact: map[glyph]rune{}}
	low.add(vga, 0)
	low.add(linux, ' ')
	high := font{height: 19, widths: []int{8}, exact: map[glyph]rune{}}
	high.add(edk2, ' ')
	return []font{low, high}
}

// mostWrong is how many dots of a character may differ from the font.
const mostWrong = 3

// unknown stands for what is no character of the font.
const unknown = '\ufffd'

// read returns the character of a glyph.
func (f font) read(g glyph) rune {
	if r, ok := f.exact[g]; ok {
		return r
	}
	if f.cursor(g) {
		return '_'
	}
	best, least := unknown, mostWrong+1
	for _, d := range f.all {
		wrong := 0
		for i := range f.height {
			wrong += bits.OnesCount8(g[i] ^ d.glyph[i])
		}
		if wrong < least && d.glyph != (glyph{}) {
			best, least = d.rune, wrong
		}
	}
	return best
}

// cursor tells whether a glyph is a bar across the lower half.
func (f font) cursor(g glyph) bool {
	for y, row := range g[:f.height] {
		if row != 0 && (row != 0xff || y < f.height/2) {
			return false
		}
	}
	return true
}

// grid is where the cells of a text screen are.
type grid struct {
	font          font
	x, y          int // of the first cell
	width         int // of a cell
	columns, rows int
}

// grids are the ways in which text may lie on a screen: from its corner on, or
// in its middle, as UEFI firmware puts it.
func grids(width, height int) []grid {
	var all []grid
	for _, f := range fonts() {
		for _, w := range f.widths {
			columns, rows := width/w, height/f.height
			if columns == 0 || rows == 0 {
				continue
			}
			all = append(all, grid{f, 0, 0, w, columns, rows})
			for _, mode := range [][2]int{{columns, rows}, {80, 25}, {100, 31}} {
				g := grid{f, (width - mode[0]*w) / 2, (height - mode[1]*f.height) / 2, w, mode[0], mode[1]}
				if g.x >= 0 && g.y >= 0 && g.x+g.y > 0 {
					all = append(all, g)
				}
			}
		}
	}
	return all
}

// cell returns the dots of one cell: those that are not of its most frequent
// colour. Of an empty one that is none.
func (g grid) cell(dots []uint32, stride, column, row int) glyph {
	at := (g.y+row*g.font.height)*stride + g.x + column*g.width
	first, others := dots[at], 0
	for y := range g.font.height {
		for _, c := range dots[at+y*stride : at+y*stride+glyphWidth] {
			if c != first {
				others++
			}
		}
	}
	var out glyph
	if others == 0 {
		return out
	}
	inverse := others > g.font.height*glyphWidth/2 // the first dot is of the character
	for y := range g.font.height {
		for x, c := range dots[at+y*stride : at+y*stride+glyphWidth] {
			if (c != first) != inverse {
				out[y] |= 0x80 >> x
			}
		}
	}
	return out
}

// score is how well text can be read on the grid: how many characters there
// are, less what is none.
func (g grid) score(dots []uint32, stride int) int {
	n := 0
	for row := range g.rows {
		for column := range g.columns {
			c := g.cell(dots, stride, column, row)
			if c == (glyph{}) {
				continue
			}
			if _, ok := g.font.exact[c]; ok {
				n++
			} else {
				n--
			}
		}
	}
	return n
}

// Text reads the lines of a text screen, each as wide as the screen; nil for a
// screen that shows no text.
func Text(picture image.Image) []string {
	p := plain(picture)
	return text(colours(p), p.Rect.Dx(), p.Rect.Dy())
}

func text(dots []uint32, stride, height int) []string {
	var best grid
	most := 0
	for _, g := range grids(stride, height) {
		if n := g.score(dots, stride); n > most {
			best, most = g, n
		}
	}
	if most == 0 {
		return nil
	}
	lines := make([]string, best.rows)
	for row := range lines {
		var line strings.Builder
		for column := range best.columns {
			c := best.cell(dots, stride, column, row)
			if c == (glyph{}) {
				line.WriteByte(' ')
			} else {
				line.WriteRune(best.font.read(c))
			}
		}
		lines[row] = line.String()
	}
	return lines
}

// Trim returns lines without the blanks at their ends, and without empty ones
// at the beginning and end.
func Trim(lines []string) []string {
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = strings.TrimRight(l, " ")
	}
	full := func(l string) bool { return l != "" }
	first := slices.IndexFunc(out, full)
	if first < 0 {
		return nil
	}
	out = out[first:]
	for !full(out[len(out)-1]) {
		out = out[:len(out)-1]
	}
	return out
}
