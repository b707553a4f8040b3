//go:build lab

package backup

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

func host(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A checkpoint whose definition could not be recorded when it was made must not
// be forgotten without: nobody could remove its bitmap from a running domain.
func TestLabForgottenCheckpointCanBeRemoved(t *testing.T) {
	const name, checkpoint, image = "forgotten", checkpointPrefix + "01", "/var/lib/libvirt/images/forgotten-vda.qcow2"
	ctx, log := t.Context(), slog.New(slog.NewTextHandler(t.Output(), nil))
	h, err := hypervisor.Connect(ctx, "qemu:///system", log)
	must(t, err)
	t.Cleanup(h.Close)
	c, err := catalog.Open(ctx, filepath.Join(t.TempDir(), "catalog"))
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	t.Cleanup(func() { _ = exec.CommandContext(context.Background(), "lab-domain", "remove", name).Run() })
	host(t, "lab-domain", "create", name, "--start", "--disk", "qcow2:8M")
	d, err := h.Lookup(ctx, name)
	must(t, err)
	k := New(Deps{Catalog: c, Hypervisor: h, Log: log})

	b := catalog.Backup{ID: "b1", Domain: d.UUID, DomainName: name, Repository: "r1", Job: "j1", Kind: chain.Full, State: chain.Running,
		Created: time.Now(), Images: []catalog.Image{{Target: "vda", Kind: chain.Full, Tracking: chain.CBT}}}
	must(t, c.CreateRepository(ctx, catalog.Repository{ID: "r1", Name: "nas", Type: "dir", Path: "/srv"}))
	must(t, c.CreateJob(ctx, catalog.Job{ID: "j1", Kind: KindName, Domain: d.UUID, Created: time.Now()}))
	must(t, c.StartJob(ctx, "j1", time.Now()))
	must(t, c.CreateBackup(ctx, b, checkpoint, catalog.Step{Job: "j1", Name: stepPlanned}))
	point(t, h, d, checkpoint)
	must(t, c.CommitBackup(ctx, b.ID, catalog.Commit{Finished: time.Now(), Manifest: []byte("{}"), Images: b.Images}))
	must(t, k.tidy(ctx, d.UUID))
	if names, err := h.ListOurs(ctx, d.UUID); err != nil || len(names) != 0 {
		t.Errorf("libvirt knows %v, error %v", names, err)
	}
	known, err := c.Checkpoints(ctx, d.UUID, catalog.CheckpointCurrent)
	if err != nil || len(known) != 1 || !strings.Contains(known[0].XML, checkpoint) {
		t.Fatalf("the catalog knows %+v, error %v", known, err)
	}

	must(t, c.EndChain(ctx, known[0].Chain, chain.Finished, chain.Restored))
	must(t, k.tidy(ctx, d.UUID))
	host(t, "lab-domain", "shutdown", name)
	if info := host(t, "qemu-img", "info", image); strings.Contains(info, checkpoint) {
		t.Errorf("the bitmap is left:\n%s", info)
	}
}

// point makes a checkpoint as a backup does.
func point(t *testing.T, h *hypervisor.Hypervisor, d hypervisor.Domain, checkpoint string) {
	t.Helper()
	scratch := "/var/lib/libvirt/images/" + d.Name + ".scratch"
	t.Cleanup(func() { _ = os.Remove(scratch) })
	host(t, "install", "-d", "-o", "libvirt-qemu", hypervisor.SocketDirectory)
	host(t, "qemu-img", "create", "-q", "-f", "qcow2", scratch, "8M")
	host(t, "chown", "libvirt-qemu", scratch)
	must(t, h.BeginBackup(t.Context(), d.UUID, hypervisor.Begin{
		Socket: hypervisor.SocketDirectory + "/" + d.Name + ".sock", Checkpoint: checkpoint, CheckpointDisks: []string{"vda"},
		Disks: []hypervisor.BeginDisk{{Target: "vda", Scratch: scratch}},
	}))
	must(t, h.EndBackup(t.Context(), d.UUID))
}
