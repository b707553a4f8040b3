package screen

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func picture(t *testing.T, name string) image.Image {
	t.Helper()
	data, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestScreensOfQEMU judges what QEMU 7.2 showed: SeaBIOS without a disk, our
// test guest, the same kernel without a root file system in text mode and on
// the frame buffer of UEFI, UEFI firmware without a disk, and a machine that
// was not begun.
func TestScreensOfQEMU(t *testing.T) {
	for _, test := range []struct {
		file, failure, line string
		blank               bool
		shows               []string
	}{
		{"bios-nodisk.png", "the firmware found nothing to start", "No bootable device.", false, []string{"SeaBIOS (version 1.16.2-debian-1.16.2-1)", "Boot failed: could not read the boot disk"}},
		{"panic.png", "the kernel panicked", "[    1.565898] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs", false,
			[]string{`[    1.563883] Please append a correct "root=" boot option; here are the availab`, "[    1.565268]  kernel_init_freeable+0x250/0x27a"}},
		{"efipanic.png", "the kernel panicked", "[    2.425760] ---[ end Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0) ]---", false,
			[]string{`[    2.408369] VFS: Cannot open root device "vda" or unknown-block(0,0): error -6`, "[    1.931337] efifb: Truecolor: size=8:8:8:8, shift=24:16:8:0"}},
		{"ovmf.png", "it ended in the shell of the firmware", "Shell> _", false, []string{"UEFI v2.70 (EDK II, 0x00010000)", "Press ESC in 1 seconds to skip startup.nsh or any other key to continue."}},
		{"up.png", "", "", false, []string{"guest: up", "BusyBox v1.35.0 (Debian 1:1.35.0-4+deb12u1+b1) built-in shell (ash)", "/ # _"}},
		{"paused.png", "", "", true, []string{"Guest has not initialized the display (yet)."}},
	} {
		t.Run(test.file, func(t *testing.T) {
			j := Judge(picture(t, test.file))
			if j.Failure != test.failure || j.Blank != test.blank || j.Line != test.line {
				t.Errorf("failure %q, line %q, blank %v", j.Failure, j.Line, j.Blank)
			}
			text := strings.Join(j.Text, "\n")
			for _, want := range test.shows {
				if !strings.Contains(text, want) {
					t.Errorf("%q is not read:\n%s", want, text)
				}
			}
			if strings.ContainsRune(text, unknown) {
				t.Errorf("characters were not read:\n%s", text)
			}
		})
	}
}

// drawText draws lines as a text screen with a font does.
func drawText(f font, width int, columns, rows int, ink, paper color.Color, lines []string) *image.NRGBA {
	p := image.NewNRGBA(image.Rect(0, 0, columns*width, rows*f.height))
	draw.Draw(p, p.Rect, image.NewUniform(paper), image.Point{}, draw.Src)
	glyphs := map[rune]glyph{}
	for _, d := range f.all {
		glyphs[d.rune] = d.glyph
	}
	for row, line := range lines {
		for column, r := range []rune(line) {
			for y := range f.height {
				for x := range glyphWidth {
					if glyphs[r][y]&(0x80>>x) != 0 {
						p.Set(column*width+x, row*f.height+y, ink)
					}
				}
			}
		}
	}
	return p
}

// ascii are all characters that can be seen, and the blank.
const ascii = " !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"

func TestWhatIsDrawnIsRead(t *testing.T) {
	all := fonts()
	printable := rapid.StringOfN(rapid.RuneFrom([]rune(ascii)), 1, 80, -1)
	rapid.Check(t, func(t *rapid.T) {
		f := rapid.SampledFrom(all).Draw(t, "font")
		width := rapid.SampledFrom(f.widths).Draw(t, "width")
		lines := rapid.SliceOfN(printable, 1, 25).Draw(t, "lines")
		ink := color.NRGBA{uint8(rapid.IntRange(100, 255).Draw(t, "ink")), 170, 170, 255}
		p := drawText(f, width, 80, 25, ink, color.NRGBA{0, 0, 0, 255}, lines)
		var data bytes.Buffer
		if err := png.Encode(&data, p); err != nil {
			t.Fatal(err)
		}
		read, err := Decode(data.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		got, want := Trim(Text(read)), Trim(lines)
		if strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Fatalf("read\n%s\nof\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})
}

func TestInverseTextIsRead(t *testing.T) {
	p := drawText(fonts()[0], 9, 80, 25, color.Black, color.White, []string{"Reboot and Select proper Boot device"})
	if j := Judge(p); j.Failure != "the firmware found nothing to start" {
		t.Errorf("%+v", j)
	}
}

func TestPictureIsNoText(t *testing.T) {
	p := image.NewNRGBA(image.Rect(0, 0, 1024, 768))
	r := rand.New(rand.NewPCG(1, 2))
	for i := range p.Pix {
		p.Pix[i] = uint8(r.IntN(256))
	}
	if j := Judge(p); j.Text != nil || j.Failure != "" || j.Blank {
		t.Errorf("%+v", j)
	}
}

func TestBlank(t *testing.T) {
	for _, colour := range []color.Color{color.Black, color.NRGBA{0, 0, 170, 255}} {
		p := image.NewNRGBA(image.Rect(0, 0, 720, 400))
		draw.Draw(p, p.Rect, image.NewUniform(colour), image.Point{}, draw.Src)
		if !Judge(p).Blank {
			t.Errorf("one colour, %v, is not blank", colour)
		}
		draw.Draw(p, image.Rect(0, 14, 9, 16), image.White, image.Point{}, draw.Src)
		if !Judge(p).Blank {
			t.Errorf("a cursor on %v is not blank", colour)
		}
	}
	p := drawText(fonts()[0], 9, 80, 25, color.White, color.Black, []string{"login: "})
	if Judge(p).Blank {
		t.Error("a prompt is blank")
	}
}

// TestLargePicturesAreJudged has a guest make its screen larger than what is read as
// it is, in as many colours as there are.
func TestLargePicturesAreJudged(t *testing.T) {
	const side = 2100
	p := image.NewNRGBA(image.Rect(0, 0, side, side))
	for i := 0; i < len(p.Pix); i += 4 {
		p.Pix[i], p.Pix[i+1], p.Pix[i+2], p.Pix[i+3] = uint8(i>>2), uint8(i>>10), uint8(i>>18), 255
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if j := Judge(p); j.Blank || j.Failure != "" {
		t.Errorf("%+v", j)
	}
	// The half, and a number for each of its dots.
	runtime.ReadMemStats(&after)
	if took, most := after.TotalAlloc-before.TotalAlloc, uint64(2*side*side+(2<<20)); took > most {
		t.Errorf("judging it took %d bytes, more than %d", took, most)
	}
	draw.Draw(p, p.Rect, image.Black, image.Point{}, draw.Src)
	if !Judge(p).Blank {
		t.Error("a large one that is black is not blank")
	}
}

func TestFirmwareAlone(t *testing.T) {
	bios := []string{"SeaBIOS (version 1.16.2-debian-1.16.2-1)", "", "", "iPXE (http://ipxe.org) 00:03.0 CA00 PCI2.10 PnP PMM+07FC9B40+07F09B40 CA00", "", "", "Booting from Hard Disk..."}
	const starting = `BdsDxe: starting Boot0002 "UEFI QEMU HARDDISK QM00001 " from PciRoot(0x0)/Pci(0x1F,0x2)/Sata(0x0,0xFFFF,0x0)`
	for _, test := range []struct {
		name  string
		lines []string
		want  bool
	}{
		{"nothing", nil, false},
		{"SeaBIOS", bios, true},
		{"with a cursor", append(slices.Clone(bios), "_", ""), true},
		{"cursor beside it", append(slices.Clone(bios[:6]), "Booting from Hard Disk..._"), true},
		{"what it started", append(slices.Clone(bios), "virtbackup: this disk is up"), false},
		{"in the same line", append(slices.Clone(bios[:6]), "Booting from Hard Disk...virtbackup: this disk is up"), false},
		{"GRUB", append(slices.Clone(bios), "GRUB loading.", "Welcome to GRUB!", ""), true},
		{"a kernel that was loaded", []string{"Loading Linux 6.1.0-18-amd64 ...", "Loading initial ramdisk ..."}, true},
		{"a kernel that runs", []string{"Loading Linux 6.1.0-18-amd64 ...", "Loading initial ramdisk ...", "[    0.000000] Linux version 6.1.0"}, false},
		{"UEFI", []string{starting[:70]}, true},
		{"UEFI, wrapped", []string{starting[:80], starting[80:]}, true},
		{"UEFI, and what it started", []string{starting[:80], starting[80:], "web login:"}, false},
		{"login", []string{"Debian GNU/Linux 12 web tty1", "", "web login: "}, false},
	} {
		if j := JudgeText(test.lines); j.Firmware != test.want || j.Failure != "" {
			t.Errorf("%s: %+v", test.name, j)
		}
	}
}

func TestSigns(t *testing.T) {
	up := []string{"Debian GNU/Linux 12 web tty1", "", "web login:"}
	for _, test := range []struct {
		name, failure string
		lines         []string
	}{
		{"up", "", up},
		{"nothing", "", nil},
		{"a failed try on the way", "", append([]string{"Booting from Floppy...", "Boot failed: could not read the boot disk", "Booting from Hard Disk...", "GRUB loading.", "Loading Linux", "[ 0.1] x", "[ 0.2] y"}, up...)},
		{"emergency", "it ended in an emergency shell", []string{"You are in emergency mode. After logging in, type \"journalctl -xb\" to view", "system logs.", "Give root password for maintenance", "(or press Control-D to continue): "}},
		{"initramfs", "the root file system did not appear", []string{"Gave up waiting for root file system device.  Common problems:", "ALERT!  UUID=1-2 does not exist.  Dropping to a shell!", "", "(initramfs) _"}},
		{"initramfs alone", "it ended in the shell of the initramfs", []string{"BusyBox v1.35.0", "(initramfs) "}},
		{"GRUB", "it ended in the shell of GRUB", []string{"error: unknown filesystem.", "Entering rescue mode...", "grub rescue> _"}},
		{"GRUB without a disk", "GRUB does not find what it is to start", []string{"error: no such device: 1-2-3.", "Press any key to continue..."}},
		{"Windows", "the boot loader of Windows is missing", []string{"BOOTMGR is missing", "Press Ctrl+Alt+Del to restart"}},
		{"UEFI", "the firmware found nothing to start", []string{"BdsDxe: failed to load Boot0001 \"UEFI Misc Device\" from PciRoot(0x0)/Pci(0x3,0x0): Not Found"}},
		{"log of a panic that was", "", append([]string{"grub> was here", "a shell> b"}, up...)},
		{"wrapped", "the kernel panicked", []string{fmt.Sprintf("%-73sKernel ", "x"), fmt.Sprintf("%-80s", "panic - not syncing: Attempted to kill init!")}},
	} {
		if j := JudgeText(test.lines); j.Failure != test.failure || (j.Failure != "") != (j.Line != "") {
			t.Errorf("%s: %q, for %q", test.name, j.Failure, j.Line)
		}
	}
	for _, s := range signs() {
		for _, words := range s.words {
			if words != plainText(words) || s.means == "" {
				t.Errorf("%q is never found", words)
			}
		}
	}
}

func TestPPM(t *testing.T) {
	good := append([]byte("P6\n2 1\n255\n"), 1, 2, 3, 4, 5, 6)
	p, err := Decode(good)
	if err != nil || p.Bounds() != image.Rect(0, 0, 2, 1) || p.At(1, 0) != (color.NRGBA{4, 5, 6, 255}) {
		t.Fatal(p, err)
	}
	for name, bad := range map[string]string{
		"cut off": string(good[:len(good)-1]), "empty": "", "head": "P6\n2\n", "deep": "P6\n1 1\n65535\n123456", "negative": "P6\n-1 1\n255\n",
		"wide": "P6\n4097 1\n255\n" + strings.Repeat("x", 3*4097), "huge": "P6\n100000 100000\n255\n", "text": "hello", "PNG without an end": "\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
	} {
		if _, err := Decode([]byte(bad)); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}

func TestLargePicturesAreMadeSmaller(t *testing.T) {
	p := image.NewNRGBA(image.Rect(0, 0, 640, 480))
	r := rand.New(rand.NewPCG(1, 2))
	for i := range p.Pix {
		p.Pix[i] = uint8(r.IntN(256)) | uint8(i%4/3*255)
	}
	data, err := EncodePNG(p, 100_000)
	if err != nil || len(data) > 100_000 {
		t.Fatal(len(data), err)
	}
	if small, err := Decode(data); err != nil || small.Bounds().Dx() != 160 {
		t.Error(small.Bounds(), err)
	}
	if _, err := EncodePNG(p, 10); err == nil {
		t.Error("a picture of 10 bytes")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte("P6\n2 1\n255\n123456"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := Decode(data); err == nil && p.Bounds().Dx()*p.Bounds().Dy() < 1<<16 {
			Judge(p)
		}
	})
}
