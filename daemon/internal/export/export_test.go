package export

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

const job = "01M7ZDF22CST13SYGG9CJXZ56M"

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return string(out)
}

// TestServer runs the server that the unit would run: it shows a chain with its
// bitmap and a raw disk with a forged header as what they are, takes no lock,
// and writes nothing.
func TestServer(t *testing.T) {
	d := t.TempDir()
	base, top, raw := filepath.Join(d, "base"), filepath.Join(d, "top"), filepath.Join(d, "raw")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", base)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	run(t, "qemu-img", "bitmap", "--add", "-f", "qcow2", top, "c1")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 128k 64k", top)
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", raw, "1M")
	if err := os.Truncate(raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	held, err := os.ReadFile(top)
	if err != nil {
		t.Fatal(err)
	}
	e := &Exporter{Directory: d}
	if err := e.Prepare(job); err != nil {
		t.Fatal(err)
	}
	u, err := e.unit(job, []Disk{
		{Name: "vda", Bitmap: "c1", Layers: []hypervisor.Layer{{Path: top, Format: "qcow2"}, {Path: base, Format: "qcow2"}}},
		{Name: "vdb", Layers: []hypervisor.Layer{{Path: raw, Format: "raw"}}},
	}, jobunit.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(u.ReadOnly, " "); got != base+" "+top+" "+raw {
		t.Errorf("the unit sees %s", got)
	}
	ctx, stop := context.WithCancel(t.Context())
	daemon := exec.CommandContext(ctx, u.Command[0], u.Command[1:]...)
	daemon.Stderr = t.Output()
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { stop(); _ = daemon.Wait() }()

	vda := dial(t, e, nbd.Options{Export: "vda", Contexts: []string{"qemu:dirty-bitmap:c1"}})
	defer vda.Close()
	p := make([]byte, 64<<10)
	for offset, want := range map[uint64]byte{0: 1, 64 << 10: 0, 128 << 10: 2} {
		if err := vda.ReadAt(t.Context(), p, offset); err != nil || p[0] != want {
			t.Errorf("at %d: %d, error %v", offset, p[0], err)
		}
	}
	vdb := dial(t, e, nbd.Options{Export: "vdb"})
	defer vdb.Close()
	if info, err := os.Stat(raw); err != nil || vdb.Size() != uint64(info.Size()) {
		t.Errorf("vdb has %d bytes, the file %d, error %v", vdb.Size(), info.Size(), err)
	}
	if err := vdb.ReadAt(t.Context(), p[:4], 0); err != nil || string(p[:4]) != "QFI\xfb" {
		t.Errorf("vdb begins with %q, error %v", p[:4], err)
	}
	if now, err := os.ReadFile(top); err != nil || string(now) != string(held) {
		t.Errorf("the image was written to, error %v", err)
	}
	// As QEMU does for a domain that starts.
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", top)
}

func dial(t *testing.T, e *Exporter, o nbd.Options) *nbd.Client {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(readyPoll) {
		c, err := nbd.Dial(t.Context(), e.Socket(job), o)
		if err == nil {
			return c
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
