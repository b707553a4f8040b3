package screen

import (
	"image"
	"slices"
	"strings"
)

// Judgement is what a screen says of the system behind it.
type Judgement struct {
	Text    []string // what it shows, trimmed; nil for a graphical screen
	Blank   bool     // it shows nothing, or only a cursor
	Failure string   // what went wrong, for people; "" if it shows nothing of that kind
	Line    string   // that says so
	// Firmware is set when the last that it shows is the word of the firmware or of
	// a boot loader, which says nothing of what they started: that may have failed,
	// or have its console elsewhere.
	Firmware bool
}

// mostDots are those of a screen that is read as it is: a guest chooses how large
// its screen is, and how many colours it has.
const mostDots = 2560 * 1600

// Judge reads a screen.
func Judge(picture image.Image) Judgement {
	for size := picture.Bounds().Size(); size.X*size.Y > mostDots; size = picture.Bounds().Size() {
		picture = half(picture)
	}
	p := plain(picture)
	dots := colours(p)
	j := JudgeText(text(dots, p.Rect.Dx(), p.Rect.Dy()))
	if j.Failure == "" && (blank(dots) || slices.ContainsFunc(j.Text, func(l string) bool { return strings.Contains(l, "Guest has not initialized the display") })) {
		j.Blank = true // the words are QEMU's own
	}
	return j
}

// speck is which part of a screen may differ from the rest for it to be blank:
// a cursor does.
const speck = 5_000

func blank(dots []uint32) bool {
	// If one colour has more than half of all, this finds it (Boyer and Moore).
	var common uint32
	votes := 0
	for _, c := range dots {
		switch {
		case votes == 0:
			common, votes = c, 1
		case c == common:
			votes++
		default:
			votes--
		}
	}
	others := 0
	for _, c := range dots {
		if c != common {
			others++
		}
	}
	return others <= len(dots)/speck
}

// sign is how a system says that it did not start.
type sign struct {
	words []string // in lower case, any of which is shown
	means string
	place place
}

// place is where the words must be: what was said on the way to a good end is
// no failure.
type place int

const (
	anywhere place = iota
	atEnd          // in one of the last lines
	asPrompt       // at the beginning of the last line
)

// lastLines are those of atEnd.
const lastLines = 4

func signs() []sign {
	return []sign{
		{[]string{"kernel panic - not syncing", "end kernel panic"}, "the kernel panicked", anywhere},
		{[]string{"vfs: cannot open root device", "vfs: unable to mount root fs", "unable to mount root filesystem"}, "the kernel cannot open its root file system", anywhere},
		{[]string{"gave up waiting for root", "gave up waiting for suspend/resume device and root", "alert! /dev/", "alert! uuid=", "alert! label="}, "the root file system did not appear", anywhere},
		{[]string{"unexpected inconsistency; run fsck manually", "requires a manual fsck", "failure: file system check of the root filesystem failed"}, "a file system needs to be repaired by hand", anywhere},
		{[]string{"you are in emergency mode", "you are in rescue mode", "entering emergency mode", "give root password for maintenance", "press enter for maintenance", "cannot open access to console, the root account is locked"}, "it ended in an emergency shell", anywhere},
		{[]string{"(initramfs)", "dracut:/#", "initramfs:/#", "rescue:/#"}, "it ended in the shell of the initramfs", asPrompt},
		{[]string{"grub rescue>", "grub>"}, "it ended in the shell of GRUB", asPrompt},
		{[]string{"error: no such device", "error: unknown filesystem", "error: no such partition", "error: disk `"}, "GRUB does not find what it is to start", atEnd},
		{[]string{"mountroot>"}, "the kernel cannot open its root file system", asPrompt},
		{[]string{"no bootable device", "no bootable option or device was found", "boot failed: not a bootable disk", "boot failed: could not read the boot disk", "reboot and select proper boot device",
			"no boot device", "operating system not found", "an operating system wasn't found", "missing operating system", "no operating system found",
			"disk boot failure", "non-system disk", "invalid partition table", "error loading operating system", "nothing to boot"}, "the firmware found nothing to start", atEnd},
		{[]string{"bootmgr is missing", "ntldr is missing", "bootmgr image is corrupt"}, "the boot loader of Windows is missing", atEnd},
		{[]string{"inaccessible_boot_device", "unmountable_boot_volume", "your pc ran into a problem", "your device ran into a problem", "a problem has been detected and windows has been shut down"}, "Windows stopped", anywhere},
		{[]string{"bdsdxe: failed to load boot", "bdsdxe: no bootable option"}, "the firmware found nothing to start", atEnd},
		{[]string{"shell>", "fs0:\\>", "fs1:\\>"}, "it ended in the shell of the firmware", asPrompt},
		{[]string{"uefi interactive shell"}, "it ended in the shell of the firmware", anywhere},
	}
}

// JudgeText judges the lines of a text screen.
func JudgeText(lines []string) Judgement {
	j := Judgement{Text: Trim(lines)}
	said := slices.DeleteFunc(slices.Clone(j.Text), func(l string) bool { return strings.Trim(l, " _") == "" })
	if len(said) == 0 {
		return j
	}
	j.Firmware = byFirmware(said)
	last := said[max(0, len(said)-lastLines):]
	for _, s := range signs() {
		for _, words := range s.words {
			var found bool
			switch s.place {
			case anywhere:
				found = shows(lines, words)
			case atEnd:
				found = shows(last, words)
			case asPrompt:
				found = strings.HasPrefix(plainText(said[len(said)-1]), words)
			}
			if found {
				j.Failure, j.Line = s.means, lineOf(said, words)
				return j
			}
		}
	}
	return j
}

// narrowest is the width of the narrowest text screen.
const narrowest = 80

// byFirmware tells whether the last line, which may have begun in those above it,
// is one of the firmware's or a boot loader's.
func byFirmware(lines []string) bool {
	widest := narrowest
	for _, l := range lines {
		widest = max(widest, len([]rune(l)))
	}
	last := len(lines) - 1
	first := last
	for first > 0 && len([]rune(lines[first-1])) == widest {
		first--
	}
	text := plainText(strings.Join(lines[first:], ""))
	whole := strings.TrimRight(text, " ._")
	return slices.ContainsFunc([]string{
		"bdsdxe: starting boot", "bdsdxe: loading boot", "seabios (version", "machine uuid", "ipxe (http", "booting `", "loading linux",
		"the highlighted entry will be executed automatically",
	}, func(words string) bool { return strings.HasPrefix(text, words) }) || slices.Contains([]string{
		"booting from hard disk", "booting from dvd/cd", "booting from floppy", "booting from rom", "press esc for boot menu",
		"grub", "grub loading", "welcome to grub!", "loading initial ramdisk",
	}, whole)
}

// shows tells whether lines have some words, also where those go on in the next line.
func shows(lines []string, words string) bool {
	return strings.Contains(plainText(strings.Join(lines, " ")), words) || strings.Contains(plainText(strings.Join(lines, "")), words)
}

// plainText is in lower case, with one blank between words.
func plainText(text string) string { return strings.Join(strings.Fields(strings.ToLower(text)), " ") }

// lineOf returns the last line that has some words, or where they begin.
func lineOf(lines []string, words string) string {
	for _, part := range []string{words, words[:len(words)/2]} {
		for _, l := range slices.Backward(lines) {
			if strings.Contains(plainText(l), part) {
				return strings.TrimSpace(l)
			}
		}
	}
	return strings.TrimSpace(lines[len(lines)-1])
}
