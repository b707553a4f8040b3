package fingerprint

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func run(t *testing.T, dir string, args ...string) {
	t.Helper()
	c := exec.Command(args[0], args[1:]...)
	c.Dir = dir
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

func take(t *testing.T, path, format string) Disk {
	return Take(t.Context(), Source{Target: "vda", Type: "file", Path: path, Format: format})
}

// seen are the layers as "kind path", paths in dir by their name.
func seen(d Disk, dir string) string {
	var all []string
	for _, l := range d.Layers {
		all = append(all, string(l.Kind)+" "+strings.ReplaceAll(l.Path, dir+"/", ""))
	}
	return strings.Join(all, ", ")
}

func TestTakeFollowsChains(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/below", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"qemu-img create -q -f raw below/raw 1M",
		"qemu-img create -q -f qcow2 -b raw -F raw below/base 1M",
		"qemu-img create -q -f qcow2 -b below/base -F qcow2 relative",
		"qemu-img create -q -f qcow2 -b " + dir + "/below/base -F qcow2 absolute",
		"qemu-img create -q -f qcow2 -o compat=0.10 -b below/base -F qcow2 old",
		"qemu-img create -q -f qcow2 -b file:below/base -F qcow2 prefixed",
		"qemu-img create -q -f qcow2 plain 1M",
		"qemu-img create -q -f qcow2 -o data_file=data.raw external 1M",
		"qemu-img create -q -f qcow2 -u -b nbd://host/x -F raw remote 1M",
		`qemu-img create -q -f qcow2 -u -b json:{"driver":"qcow2","file":{"driver":"file","filename":"below/base"}} -F qcow2 described 1M`,
		"qemu-img create -q -f qcow2 -u -b nowhere -F qcow2 dangling 1M",
		"qemu-img create -q -f qcow2 -u -b loop2 -F qcow2 loop1 1M",
		"qemu-img create -q -f qcow2 -u -b loop1 -F qcow2 loop2 1M",
		"ln -s relative link",
		// What a guest wrote on its raw disk.
		"cp relative forged",
		"qemu-img create -q -f qcow2 -u -b forged -F raw over-forged 1M",
		"cp below/raw no-image",
	} {
		run(t, dir, strings.Fields(line)...)
	}
	for _, c := range []struct{ path, format, want string }{
		{"relative", "qcow2", "file relative, file below/base, file below/raw"},
		{"absolute", "qcow2", "file absolute, file below/base, file below/raw"},
		{"old", "qcow2", "file old, file below/base, file below/raw"},
		{"prefixed", "qcow2", "file prefixed, file below/base, file below/raw"},
		{"link", "qcow2", "file link, file below/base, file below/raw"},
		{"plain", "qcow2", "file plain"},
		{"external", "qcow2", "file external, file data.raw"},
		{"remote", "qcow2", "file remote, network nbd://host/x"},
		{"described", "qcow2", `file described, network json:{"driver":"qcow2","file":{"driver":"file","filename":"below/base"}}`},
		{"dangling", "qcow2", "file dangling, missing nowhere"},
		{"forged", "raw", "file forged"},
		{"over-forged", "qcow2", "file over-forged, file forged"},
		{"no-image", "qcow2", "file no-image, unreadable no-image"},
		{"nothing", "qcow2", "missing nothing"},
		{"below", "raw", "unreadable below"},
	} {
		d := take(t, dir+"/"+c.path, c.format)
		if got := seen(d, dir); got != c.want {
			t.Errorf("%s as %s: %s; want %s", c.path, c.format, got, c.want)
		}
		same, why := d.Compare(take(t, dir+"/"+c.path, c.format))
		if ok := !strings.Contains(c.want, "missing") && !strings.Contains(c.want, "unreadable") && !strings.Contains(c.want, "network"); same != ok {
			t.Errorf("%s, untouched: %v, %s", c.path, same, why)
		}
	}
	loop := take(t, dir+"/loop1", "qcow2")
	if n := len(loop.Layers); n != maxLayers+1 || loop.Layers[n-1].Kind != KindUnreadable {
		t.Errorf("a loop has %d layers", n)
	}
}

// The chain that a definition gives is looked at beside that of the headers.
func TestTakeOfAGivenChain(t *testing.T) {
	dir := t.TempDir()
	run(t, dir, "qemu-img", "create", "-q", "-f", "raw", "base", "1M")
	run(t, dir, "cp", "base", "other")
	run(t, dir, "ln", "-s", "base", "link")
	run(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
	for _, c := range []struct{ given, want string }{
		{"base", "file top, file base"}, {"link", "file top, file base"},
		{"other", "file top, file base, file other"}, {"gone", "file top, file base, missing gone"},
	} {
		s := Source{Target: "vda", Path: dir + "/top", Format: "qcow2", Backing: []Source{{Path: dir + "/" + c.given, Format: "raw"}}}
		if got := seen(Take(t.Context(), s), dir); got != c.want {
			t.Errorf("%s: %s; want %s", c.given, got, c.want)
		}
	}
}

// Each way to change a disk, and each layer, is seen by the next look.
func TestTakeSeesEveryChange(t *testing.T) {
	for name, change := range map[string][]string{
		"write":           {"qemu-io", "-c", "write -P 7 0 64k", "top"},
		"write below":     {"qemu-io", "-f", "raw", "-c", "write -P 7 0 512", "base"},
		"resize":          {"qemu-img", "resize", "-q", "top", "2M"},
		"copy over":       {"cp", "copy", "top"},
		"copy back":       {"cp", "-p", "copy", "top"},
		"move over":       {"mv", "copy", "top"},
		"flatten":         {"qemu-img", "rebase", "-b", "", "top"},
		"rebase":          {"qemu-img", "rebase", "-u", "-b", "base2", "-F", "raw", "top"},
		"replaced below":  {"mv", "base2", "base"},
		"stamps put back": {"sh", "-c", "qemu-io -c 'write -P 1 0 64k' top && touch -r top stamp && qemu-io -c 'write -P 7 0 64k' top && touch -r stamp top"},
		"removed":         {"rm", "top"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			run(t, dir, "qemu-img", "create", "-q", "-f", "raw", "base", "1M")
			run(t, dir, "cp", "base", "base2")
			run(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
			run(t, dir, "cp", "-p", "top", "copy")
			before := take(t, dir+"/top", "qcow2")
			if same, why := before.Compare(take(t, dir+"/top", "qcow2")); !same {
				t.Fatalf("untouched: %s", why)
			}
			run(t, dir, change...)
			if same, why := before.Compare(take(t, dir+"/top", "qcow2")); same || why == "" {
				t.Errorf("the change was not seen (%v, %q)", same, why)
			}
		})
	}
}

// A change right after the look has another stamp, however soon it comes.
func TestTakeReturnsWhenALaterChangeIsSeen(t *testing.T) {
	path := t.TempDir() + "/disk"
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 50 {
		if _, err := f.WriteAt([]byte{byte(i)}, 0); err != nil {
			t.Fatal(err)
		}
		before := take(t, path, "raw")
		if _, err := f.WriteAt([]byte{byte(i + 1)}, 0); err != nil {
			t.Fatal(err)
		}
		if same, _ := before.Compare(take(t, path, "raw")); same {
			t.Fatalf("change %d has the stamp of the one before", i)
		}
	}
}

func TestTakeDoesNotTrustCoarseStampsOfJustNow(t *testing.T) {
	w := &walk{ctx: t.Context()}
	second := time.Now().Truncate(time.Second).UnixNano()
	w.layers = []Layer{
		{Path: "/new", Kind: KindFile, Modified: second, Changed: second},
		{Path: "/old", Kind: KindFile, Modified: second - 5e9, Changed: second - 5e9},
	}
	w.settle()
	if w.layers[0].Kind != KindUnreadable || w.layers[1].Kind != KindFile {
		t.Errorf("%+v", w.layers)
	}
}

func TestTakeDoesNotWaitForAFIFO(t *testing.T) {
	path := t.TempDir() + "/fifo"
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"raw", "qcow2"} {
		if d := take(t, path, format); d.Layers[0].Kind != KindUnreadable {
			t.Errorf("%+v", d)
		}
	}
}

func TestTakeOfABlockDeviceIsOpaque(t *testing.T) {
	device := loopDevice(t)
	d := take(t, device, "raw")
	if len(d.Layers) != 1 || d.Layers[0].Kind != KindBlock || d.Layers[0].Size != 1<<20 || d.Layers[0].Identity == "" {
		t.Errorf("%+v", d)
	}
	if same, why := d.Compare(take(t, device, "raw")); same || why != Opaque {
		t.Error(same, why)
	}
}

// loopDevice returns a loop device of 1 MiB.
func loopDevice(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	run(t, "", "truncate", "-s", "1M", file)
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Skipf("no loop device can be had here: %v", err)
	}
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() { run(t, "", "losetup", "--detach", device) })
	return device
}

func TestTakeOfNetworkIsOpaque(t *testing.T) {
	s := Source{Target: "vda", Type: "network", Format: "raw", Network: "network protocol=rbd name=a"}
	if same, why := Take(t.Context(), s).Compare(Take(t.Context(), s)); same || why != Opaque {
		t.Error(same, why)
	}
	other := s
	other.Network = "network protocol=rbd name=b"
	if same, why := Take(t.Context(), s).Compare(Take(t.Context(), other)); same || why == Opaque {
		t.Error(same, why)
	}
}

// What is seen when nobody waits any more counts for nothing.
func TestTakeAfterItsTimeSeesNothing(t *testing.T) {
	path := t.TempDir() + "/disk"
	run(t, "", "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 100 {
		d := Take(ctx, Source{Target: "vda", Type: "file", Path: path, Format: "qcow2"})
		if !slices.ContainsFunc(d.Layers, func(l Layer) bool { return l.Kind == KindUnreadable && l.Path == path }) {
			t.Fatalf("%+v", d)
		}
	}
}

func TestThousandDisks(t *testing.T) {
	dir := t.TempDir()
	done := make(chan Disk)
	for i := range 1000 {
		path := fmt.Sprintf("%s/%d", dir, i)
		if err := os.WriteFile(path, []byte{1}, 0o600); err != nil {
			t.Fatal(err)
		}
		go func() { done <- take(t, path, "raw") }()
	}
	for range 1000 {
		if d := <-done; len(d.Layers) != 1 || d.Layers[0].Kind != KindFile {
			t.Fatalf("%+v", d)
		}
	}
}

// No header makes it read far, allocate much, or panic; names have no zero
// bytes and are not long.
func FuzzHeader(f *testing.F) {
	h := make([]byte, 512)
	copy(h, "QFI\xfb")
	binary.BigEndian.PutUint32(h[4:], 3)
	binary.BigEndian.PutUint64(h[8:], 200)
	binary.BigEndian.PutUint32(h[16:], 4)
	binary.BigEndian.PutUint32(h[100:], 104)
	binary.BigEndian.PutUint32(h[104:], extensionFormat)
	binary.BigEndian.PutUint32(h[108:], 5)
	copy(h[112:], "qcow2")
	copy(h[200:], "base")
	f.Add(h)
	if b, err := readHeader(bytes.NewReader(h)); err != nil || b != (below{backing: "base", format: "qcow2"}) {
		f.Fatalf("%+v, %v", b, err)
	}
	f.Fuzz(func(t *testing.T, h []byte) {
		b, err := readHeader(bytes.NewReader(h))
		if err != nil && b != (below{}) {
			t.Errorf("%+v beside %v", b, err)
		}
		if len(b.backing) > maxName || len(b.data) > maxName || strings.ContainsRune(b.backing+b.data, 0) {
			t.Errorf("%+v", b)
		}
	})
}
