package hypervisor

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// qemu runs qemu-img in a directory.
func qemu(t *testing.T, directory string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "qemu-img", args...)
	cmd.Dir = directory
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

func TestLayers(t *testing.T) {
	d := t.TempDir()
	qemu(t, d, "create", "-q", "-f", "raw", "raw", "1M")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "base")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top")
	// A guest may have written a header onto its raw disk.
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", "-u", "forged", "1M")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "forged", "-F", "raw", "victim")
	path := func(name string) string { return filepath.Join(d, name) }
	for name, want := range map[string][]Layer{
		"raw":    {{Path: path("raw"), Format: "raw"}},
		"top":    {{Path: path("top"), Format: "qcow2"}, {Path: path("base"), Format: "qcow2"}, {Path: path("raw"), Format: "raw"}},
		"forged": {{Path: path("forged"), Format: "raw"}},
		"victim": {{Path: path("victim"), Format: "qcow2"}, {Path: path("forged"), Format: "raw"}},
	} {
		format := want[0].Format
		got, err := Layers(t.Context(), Disk{Target: "vda", Device: "disk", Source: path(name), Format: format})
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Layer{})); err != nil || diff != "" {
			t.Errorf("%s: error %v, difference (-want +got):\n%s", name, err, diff)
		}
	}
}

func TestLayersThatAreRefused(t *testing.T) {
	d := t.TempDir()
	qemu(t, d, "create", "-q", "-f", "qcow2", "-u", "-b", "nbd://127.0.0.1/x", "-F", "raw", "network", "1M")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-u", "-b", `json:{"driver":"file","filename":"/etc/shadow"}`, "-F", "raw", "json", "1M")
	qemu(t, d, "create", "-q", "-f", "raw", "base", "1M")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "unsaid")
	header, err := os.ReadFile(filepath.Join(d, "unsaid"))
	noError(t, err)
	// The extension that names the format becomes one that nobody knows.
	header = bytes.Replace(header, []byte{0xe2, 0x79, 0x2a, 0xca}, []byte("none"), 1)
	noError(t, os.WriteFile(filepath.Join(d, "unsaid"), header, 0o600))
	qemu(t, d, "create", "-q", "-f", "qcow2", "-o", "data_file=base,data_file_raw=on", "external", "1M")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "external", "-F", "qcow2", "above")
	for _, name := range []string{"network", "json", "unsaid", "external", "above"} {
		got, err := Layers(t.Context(), Disk{Target: "vda", Device: "disk", Source: filepath.Join(d, name), Format: "qcow2"})
		if !errors.Is(err, ErrLayer) {
			t.Errorf("%s: %v, %+v", name, err, got)
		}
	}
	for _, source := range []string{"", "nbd:127.0.0.1:1", `json:{"driver":"file","filename":"/etc/shadow"}`} {
		if _, err := Layers(t.Context(), Disk{Target: "vda", Device: "disk", Source: source, Format: "qcow2"}); !errors.Is(err, ErrLayer) {
			t.Errorf("%q: %v", source, err)
		}
	}
}

// TestOfflineBitmaps is about bitmaps that a backup without QEMU can use, and
// those that only look like it.
func TestOfflineBitmaps(t *testing.T) {
	d := t.TempDir()
	const name = "virtbackup-1"
	disk := func(file string) Disk {
		return Disk{Target: "vda", Device: "disk", Source: filepath.Join(d, file), Format: "qcow2"}
	}
	qemu(t, d, "create", "-q", "-f", "qcow2", "base", "1M")
	noError(t, AddBitmap(t.Context(), disk("base"), name))
	noError(t, AddBitmap(t.Context(), disk("base"), name)) // again, as after a restart
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay")
	qemu(t, d, "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "both")
	noError(t, AddBitmap(t.Context(), disk("both"), name))
	qemu(t, d, "create", "-q", "-f", "qcow2", "none", "1M")
	yes, no := true, false
	for file, want := range map[string]*bool{"base": &yes, "overlay": &no, "both": &no, "none": nil} {
		got, err := offlineBitmaps(t.Context(), Domain{Disks: []Disk{disk(file)}}, name)
		usable, known := got["vda"]
		if err != nil || known != (want != nil) || known && usable != *want {
			t.Errorf("%s: %v, %v", file, got, err)
		}
	}
	noError(t, RemoveBitmap(t.Context(), disk("base"), name))
	noError(t, RemoveBitmap(t.Context(), disk("base"), name))
	if got, err := offlineBitmaps(t.Context(), Domain{Disks: []Disk{disk("base")}}, name); err != nil || len(got) > 0 {
		t.Errorf("after its removal: %v, %v", got, err)
	}
}

// TestLookingTakesNoLock: a domain can be started while we look at its images.
func TestLookingTakesNoLock(t *testing.T) {
	d := t.TempDir()
	qemu(t, d, "create", "-q", "-f", "qcow2", "image", "1M")
	image := filepath.Join(d, "image")
	// QEMU has it open for writing, as a running domain has.
	held := exec.CommandContext(t.Context(), "qemu-io", "-f", "qcow2", image)
	input, err := held.StdinPipe()
	noError(t, err)
	output, err := held.StdoutPipe()
	noError(t, err)
	noError(t, held.Start())
	defer func() { _ = held.Wait() }()
	defer input.Close()
	if _, err := input.Write([]byte("write 0 64k\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := output.Read(make([]byte, 1)); err != nil { // it is done
		t.Fatal(err)
	}
	k := Disk{Target: "vda", Device: "disk", Source: image, Format: "qcow2"}
	if _, err := Layers(context.WithoutCancel(t.Context()), k); err != nil {
		t.Errorf("cannot look: %v", err)
	}
	if err := AddBitmap(t.Context(), k, "virtbackup-1"); err == nil {
		t.Error("an image that QEMU has open was written to")
	}
	if _, err := os.Stat(image); err != nil {
		t.Error(err)
	}
}

func noError(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
