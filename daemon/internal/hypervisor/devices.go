package hypervisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// only keeps an element whose attribute has one of the values.
func only(name string, values ...string) func(*rebuild, *element, *element) (bool, error) {
	return func(r *rebuild, original, e *element) (bool, error) {
		if contains(values, e.attr(name)) {
			return true, nil
		}
		r.drop(fmt.Sprintf("domain/devices/%s[@%s=%q]", e.name, name, original.attr(name)))
		return false, nil
	}
}

// notEmpty drops an element of which nothing was left.
func notEmpty(_ *rebuild, _, e *element) (bool, error) { return len(e.attrs) > 0, nil }

func fixDomain(r *rebuild, _, e *element) (bool, error) {
	if t := e.attr("type"); t != "kvm" && t != "qemu" {
		return false, fmt.Errorf("a domain of type %q is not QEMU's", t)
	}
	e.replace(&element{name: "name", text: r.changes.Name})
	e.remove("uuid")
	if r.changes.UUID != "" {
		e.replace(&element{name: "uuid", text: r.changes.UUID})
	}
	if r.changes.Title != "" {
		e.replace(&element{name: "title", text: r.changes.Title})
	}
	if r.changes.Description != "" {
		e.replace(&element{name: "description", text: r.changes.Description})
	}
	if e.child("os") == nil {
		return false, fmt.Errorf("the definition has no os element")
	}
	return true, nil
}

// fixSysinfo allows SMBIOS strings only (fwcfg would read files), and leaves
// out the UUID, which must be the domain's.
func fixSysinfo(r *rebuild, _, e *element) (bool, error) {
	if e.attr("type") != "smbios" {
		r.drop("domain/sysinfo[@type!='smbios']")
		return false, nil
	}
	if system := e.child("system"); system != nil {
		var kept []*element
		for _, entry := range system.children {
			if entry.attr("name") != "uuid" {
				kept = append(kept, entry)
			}
		}
		system.children = kept
	}
	return true, nil
}

// fixClock lets a time zone through, whose name has slashes.
func fixClock(r *rebuild, original, e *element) (bool, error) {
	zone := original.attr("timezone")
	if zone != "" && plain(strings.ReplaceAll(zone, "/", "-")) && !strings.HasPrefix(zone, "/") {
		e.set("timezone", zone)
		r.forget("domain/clock/@timezone")
	} else if e.attr("offset") == "timezone" {
		e.set("offset", "utc")
	}
	return true, nil
}

func fixOS(r *rebuild, original, e *element) (bool, error) {
	kind := e.child("type")
	if kind == nil || kind.text != "hvm" {
		return false, fmt.Errorf("the domain is not fully virtualized (os type hvm)")
	}
	if f := e.attr("firmware"); f != "" && f != "efi" && f != "bios" {
		return false, fmt.Errorf("unknown firmware %q", f)
	}
	// A dropped UEFI loader becomes one that libvirt chooses.
	if l := original.child("loader"); l != nil && l.attr("type") == "pflash" && e.child("loader") == nil {
		e.set("firmware", "efi")
		if n := e.child("nvram"); n != nil {
			n.unset("template")
		}
	}
	if e.child("nvram") == nil && r.changes.NVRAM != "" {
		e.children = append(e.children, &element{name: "nvram", attrs: []attribute{{"format", rawFormat}}, text: r.changes.NVRAM})
	}
	if e.child("kernel") == nil {
		e.remove("initrd")
		e.remove("cmdline")
	}
	return true, nil
}

// below tells whether a path lies in one of the directories.
func below(path string, directories []string) bool {
	for _, d := range directories {
		if strings.HasPrefix(path, strings.TrimSuffix(d, "/")+"/") {
			return true
		}
	}
	return false
}

func fixLoader(r *rebuild, _, e *element) (bool, error) {
	if e.text == "" {
		return true, nil
	}
	if filepath.Clean(e.text) != e.text || !below(e.text, firmwareDirectories) {
		r.drop("domain/os/loader")
		return false, nil
	}
	return true, nil
}

// rawFormat is that of every variable store of ours. It is always said: left to
// itself, a newer libvirt takes the format of the firmware for it.
const rawFormat = "raw"

// fixNVRAM puts the restored variable store in the place of the old one. One in
// qcow2 comes from the repository with a header that may name any file of the
// host's as backing file, which QEMU would open.
func fixNVRAM(r *rebuild, original, e *element) (bool, error) {
	if format := original.attr("format"); format != "" && format != rawFormat {
		return false, fmt.Errorf("its UEFI variables are kept in format %q, and only %s ones can be used from a backup", format, rawFormat)
	}
	e.unset("format")
	if e.text = r.changes.NVRAM; e.text != "" {
		e.set("format", rawFormat)
	}
	t := original.attr("template")
	r.forget("domain/os/nvram/@template", "domain/os/nvram/text()")
	switch {
	case t == "":
	case filepath.Clean(t) == t && below(t, firmwareDirectories):
		e.set("template", t)
	default:
		r.drop("domain/os/nvram/@template")
	}
	return e.text != "" || e.attr("template") != "", nil
}

// forget takes back that something was dropped: a fix has put it right.
func (r *rebuild) forget(paths ...string) {
	kept := r.dropped[:0]
	for _, d := range r.dropped {
		if !contains(paths, d) {
			kept = append(kept, d)
		}
	}
	r.dropped = kept
}

// fixBootFile allows a kernel or initrd of direct boot only where the admin
// said so, and only what is one: the guest can read the whole file, which must
// not be another guest's disk that lies beside it. The file's owner says
// nothing, since libvirt gives it to the user that QEMU runs as. Paths from
// elsewhere are not even looked at: that may mount something, hang, or tell what
// is there.
func fixBootFile(r *rebuild, _, e *element) (bool, error) {
	path := e.text
	if len(r.changes.BootDirectories)+len(r.changes.BootFiles) == 0 {
		return false, fmt.Errorf("the domain boots its %s directly from %s, which is not allowed here", e.name, path)
	}
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || !below(path, r.changes.BootDirectories) && !contains(r.changes.BootFiles, path) {
		return false, fmt.Errorf("the domain's %s %s is in no directory that is allowed for it", e.name, path)
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return false, fmt.Errorf("the domain's %s is not here: %w", e.name, err)
	}
	if !below(real, r.changes.BootDirectories) && !contains(r.changes.BootFiles, path) {
		return false, fmt.Errorf("the domain's %s %s is in no directory that is allowed for it", e.name, path)
	}
	info, err := os.Lstat(real)
	if err != nil {
		return false, fmt.Errorf("cannot look at the domain's %s: %w", e.name, err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return false, fmt.Errorf("the domain's %s %s is not a regular file that only its owner can write", e.name, path)
	}
	if ok, err := bootable(real, e.name); err != nil || !ok {
		return false, errors.Join(fmt.Errorf("the domain's %s %s does not look like one", e.name, path), err)
	}
	e.text = real
	return true, nil
}

// bootable tells whether a file begins as a Linux kernel (x86: the kernel's
// boot protocol; ARM: booting.rst) or as an initramfs (cpio, compressed or not).
func bootable(path, kind string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	head := make([]byte, 1024)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false, err
	}
	type magic struct {
		offset int
		text   string
	}
	magics := map[string][]magic{
		"kernel": {{0x202, "HdrS"}, {0x38, "ARM\x64"}},
		"initrd": {{0, "070701"}, {0, "\x1f\x8b"}, {0, "\x28\xb5\x2f\xfd"}, {0, "\xfd7zXZ"}, {0, "\x02\x21\x4c\x18"}, {0, "BZh"}},
	}
	for _, m := range magics[kind] {
		if strings.HasPrefix(string(head[min(m.offset, n):n]), m.text) {
			return true, nil
		}
	}
	return false, nil
}

func fixDisk(r *rebuild, original, e *element) (bool, error) {
	target := ""
	if t := e.child("target"); t != nil {
		target = t.attr("dev")
	}
	r.used[target] = true
	device := e.attr("device")
	k, ok := r.changes.Disks[target]
	if !ok && (device == "cdrom" || device == "floppy") {
		r.setDiskType(e, "file", "raw") // an empty drive
		return true, nil
	}
	if !ok && r.changes.SkipOtherDisks {
		r.drop("domain/devices/disk[" + target + "]")
		return false, nil
	}
	if !ok {
		return false, fmt.Errorf("there is no place for disk %q", target)
	}
	if device == "lun" {
		e.set("device", "disk")
	}
	kind, attr := "file", "file"
	if k.Block {
		kind, attr = "block", "dev"
	}
	r.setDiskType(e, kind, k.Format)
	source := &element{name: "source", attrs: []attribute{{attr, k.Path}}}
	if k.Encryption.Format != "" {
		source.children = append(source.children, k.Encryption.element())
		r.forget("domain/devices/disk/encryption")
	}
	e.children = append(e.children, source)
	return true, nil
}

func (n Encryption) element() *element {
	secret := &element{name: "secret", attrs: []attribute{{"type", "passphrase"}}}
	if n.Secret.UUID != "" {
		secret.attrs = append(secret.attrs, attribute{"uuid", n.Secret.UUID})
	} else {
		secret.attrs = append(secret.attrs, attribute{"usage", n.Secret.Usage})
	}
	return &element{name: "encryption", attrs: []attribute{{"format", n.Format}}, children: []*element{secret}}
}

// setDiskType sets what is never taken over, and so was not lost either.
func (r *rebuild) setDiskType(e *element, kind, format string) {
	e.set("type", kind)
	driver := e.child("driver")
	if driver == nil {
		driver = &element{name: "driver"}
		e.children = append([]*element{driver}, e.children...)
	}
	driver.set("name", "qemu")
	driver.set("type", format)
	r.forget("domain/devices/disk/@type", "domain/devices/disk/driver/@name", "domain/devices/disk/driver/@type")
}

// fixInterface allows connections to networks of this host, by name.
func fixInterface(r *rebuild, _, e *element) (bool, error) {
	if r.changes.DropInterfaces {
		return false, nil
	}
	keep, err := only("type", "network", "bridge", "direct", "user")(r, e, e)
	if !keep || err != nil {
		return keep, err
	}
	if !r.changes.KeepMACs {
		e.remove("mac")
	}
	return true, nil
}

// fixGraphics makes the display listen on the loopback address only: its
// password was stripped.
func fixGraphics(r *rebuild, original, e *element) (bool, error) {
	keep, err := only("type", "vnc", "spice")(r, original, e)
	if !keep || err != nil {
		return keep, err
	}
	const path = "domain/devices/graphics/"
	e.set("autoport", "yes")
	r.forget(path+"@port", path+"@autoport", path+"@tlsPort", path+"@websocket", path+"@listen")
	for _, l := range append([]*element{{attrs: []attribute{{"address", original.attr("listen")}}}}, original.children...) {
		if a := l.attr("address"); (l.name == "" || l.name == "listen") && a != "" && a != "127.0.0.1" && a != "::1" {
			r.drop(path + "listen")
		}
	}
	e.children = append(e.children, &element{name: "listen", attrs: []attribute{{"type", "address"}, {"address", "127.0.0.1"}}})
	return true, nil
}

// fixChardev turns everything that could open a file or a socket into a
// pseudo terminal. A UNIX channel without a source is libvirt's to place.
func fixChardev(r *rebuild, original, e *element) (bool, error) {
	t := e.attr("type")
	path := "domain/devices/" + e.name + "/"
	switch {
	case t == "pty", t == "null":
		r.forget(path+"source", path+"@tty")
	case e.name == "channel" && (t == "unix" || t == "spicevmc"):
		r.forget(path + "source")
	default:
		e.set("type", "pty")
		r.drop(fmt.Sprintf("domain/devices/%s[@type=%q]", e.name, original.attr("type")))
	}
	return true, nil
}

func fixVsock(r *rebuild, _, e *element) (bool, error) {
	e.replace(&element{name: "cid", attrs: []attribute{{"auto", "yes"}}})
	r.forget("domain/devices/vsock/cid")
	return true, nil
}

func fixRNG(r *rebuild, _, e *element) (bool, error) {
	b := e.child("backend")
	switch {
	case b == nil:
	case b.attr("model") == "builtin":
		b.text = ""
		return true, nil
	case b.attr("model") == "random" && contains([]string{"", "/dev/random", "/dev/urandom"}, b.text):
		return true, nil
	}
	r.drop("domain/devices/rng")
	return false, nil
}

func fixTPM(r *rebuild, _, e *element) (bool, error) {
	if b := e.child("backend"); b != nil && b.attr("type") == "emulator" {
		return true, nil
	}
	r.drop("domain/devices/tpm")
	return false, nil
}
