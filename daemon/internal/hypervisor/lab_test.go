//go:build lab

package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const images = "/var/lib/libvirt/images"

// host connects to the lab's libvirtd.
func host(t *testing.T) *Hypervisor {
	t.Helper()
	h, err := Connect(t.Context(), "qemu:///system", slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// run runs a command on the host and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// guest makes and starts a domain with these disks.
func guest(t *testing.T, h *Hypervisor, name string, disks ...string) Domain {
	t.Helper()
	args := []string{"create", name, "--start"}
	for _, d := range disks {
		args = append(args, "--disk", d)
	}
	t.Cleanup(func() { _ = exec.CommandContext(context.Background(), "lab-domain", "remove", name).Run() })
	run(t, "lab-domain", args...)
	d, err := h.Lookup(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// scratch makes an empty image for each disk and the sockets' directory.
func scratch(t *testing.T, d Domain, directory string, targets ...string) map[string]string {
	t.Helper()
	run(t, "install", "-d", "-o", "libvirt-qemu", SocketDirectory)
	paths := make(map[string]string)
	for _, target := range targets {
		k, _ := d.Disk(target)
		p := filepath.Join(directory, d.Name+"-"+target+".scratch")
		size, _ := json.Marshal(k.Capacity)
		run(t, "qemu-img", "create", "-q", "-f", "qcow2", p, string(size))
		run(t, "chown", "libvirt-qemu", p)
		t.Cleanup(func() { _ = os.Remove(p) })
		paths[target] = p
	}
	return paths
}

// begin begins a backup of vda (which carries the checkpoint) and vdb.
func begin(t *testing.T, h *Hypervisor, d Domain, checkpoint, from string) Begin {
	t.Helper()
	s := scratch(t, d, images, "vda", "vdb")
	b := Begin{
		Socket: SocketDirectory + "/" + d.Name + ".sock", Checkpoint: checkpoint, CheckpointDisks: []string{"vda"},
		Disks: []BeginDisk{{Target: "vda", Scratch: s["vda"], Incremental: from}, {Target: "vdb", Scratch: s["vdb"]}},
	}
	if err := h.BeginBackup(t.Context(), d.UUID, b); err != nil {
		t.Fatal(err)
	}
	return b
}

func end(t *testing.T, h *Hypervisor, d Domain) {
	t.Helper()
	if err := h.EndBackup(t.Context(), d.UUID); err != nil {
		t.Fatal(err)
	}
}

// dirty returns the first bytes of the dirty extents of vda.
func dirty(t *testing.T, b Begin) []uint64 {
	t.Helper()
	out := run(t, "nbdinfo", "--map=qemu:dirty-bitmap:backup-vda", "--json", "nbd+unix:///vda?socket="+b.Socket)
	var extents []struct {
		Offset uint64
		Type   int
	}
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatal(err)
	}
	var offsets []uint64
	for _, e := range extents {
		if e.Type == 1 {
			offsets = append(offsets, e.Offset)
		}
	}
	return offsets
}

// write writes one block of 64 KiB into the guest's vda.
func write(t *testing.T, d Domain, block string) {
	t.Helper()
	run(t, "lab-domain", "exec", d.Name, "--", "dd", "if=/dev/urandom", "of=/dev/vda", "bs=64k", "count=1", "conv=fsync", "seek="+block)
}

func want[T any](t *testing.T, want, got T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
}

func usableOn(t *testing.T, h *Hypervisor, d Domain, checkpoint string) map[string]bool {
	t.Helper()
	m, err := h.CheckpointUsable(t.Context(), d.UUID, checkpoint)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestLabIncrements(t *testing.T) {
	h := host(t)
	d := guest(t, h, "incr", "qcow2:64M", "raw:8M")
	vda, _ := d.Disk("vda")
	if d.State != StateRunning || len(d.Disks) != 2 || vda.Format != "qcow2" || vda.Capacity != 64<<20 || vda.Source != images+"/incr-vda.qcow2" {
		t.Fatalf("%+v", d)
	}
	const c1, c2, c3 = "virtbackup-1", "virtbackup-2", "virtbackup-3"
	begin(t, h, d, c1, "")
	job, err := h.BackupJob(t.Context(), d.UUID)
	if err != nil || !job.Active || !job.Ours || !slices.Equal(job.Disks, []string{"vda", "vdb"}) {
		t.Fatalf("%+v, %v", job, err)
	}
	definition, err := h.CheckpointDefinition(t.Context(), d.UUID, c1)
	if err != nil || strings.Contains(definition, "<domain ") {
		t.Fatal(definition, err)
	}
	if err := h.Forget(t.Context(), d.UUID, c1); err != nil { // in mid-job, as it is done
		t.Fatal(err)
	}
	end(t, h, d)
	end(t, h, d) // again: nothing to do
	if job, err = h.BackupJob(t.Context(), d.UUID); err != nil || job.Active {
		t.Fatalf("%+v, %v", job, err)
	}
	if _, err := h.CheckpointUsable(t.Context(), d.UUID, c1); !errors.Is(err, ErrNoCheckpoint) {
		t.Fatal(err)
	}

	write(t, d, "100")
	redefine := func() {
		t.Helper()
		if err := h.Redefine(t.Context(), d.UUID, definition); err != nil {
			t.Fatal(err)
		}
		want(t, map[string]bool{"vda": true}, usableOn(t, h, d, c1))
	}
	redefine()
	redefine() // again: no harm
	b := begin(t, h, d, c2, c1)
	want(t, []uint64{100 << 16}, dirty(t, b))
	end(t, h, d)
	names, err := h.ListOurs(t.Context(), d.UUID)
	if err != nil {
		t.Fatal(err)
	}
	want(t, []string{c1, c2}, names)

	// The checkpoint of a failed backup goes; the one before still knows all.
	if err := h.Delete(t.Context(), d.UUID, c2, ""); err != nil {
		t.Fatal(err)
	}
	write(t, d, "200")
	if err := h.Forget(t.Context(), d.UUID, c1); err != nil {
		t.Fatal(err)
	}
	if err := h.Forget(t.Context(), d.UUID, c1); err != nil { // again
		t.Fatal(err)
	}
	events := h.Subscribe(t.Context())
	run(t, "systemctl", "restart", "libvirtd")
	for e := range events {
		if e.Kind == EventMissed {
			break
		}
	}
	redefine()
	b = begin(t, h, d, c3, c1)
	want(t, []uint64{100 << 16, 200 << 16}, dirty(t, b))
	run(t, "systemctl", "restart", "libvirtd") // the job survives
	if job, err = h.BackupJob(t.Context(), d.UUID); err != nil || !job.Ours {
		t.Fatalf("%+v, %v", job, err)
	}
	end(t, h, d)
	if _, err := os.Stat(b.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestLabBrokenCheckpoint(t *testing.T) {
	h := host(t)
	d := guest(t, h, "broken", "qcow2:64M", "raw:8M", "qcow2:16M")
	s := scratch(t, d, images, "vda")
	const name = "virtbackup-1"
	b := Begin{
		Socket: SocketDirectory + "/b.sock", Checkpoint: name, CheckpointDisks: []string{"vda", "vdc"},
		Disks: []BeginDisk{{Target: "vda", Scratch: s["vda"]}},
	}
	if err := h.BeginBackup(t.Context(), d.UUID, b); err != nil {
		t.Fatal(err)
	}
	definition, err := h.CheckpointDefinition(t.Context(), d.UUID, name)
	if err != nil {
		t.Fatal(err)
	}
	end(t, h, d)

	// Stopped properly: the images tell.
	run(t, "lab-domain", "shutdown", d.Name)
	want(t, map[string]bool{"vda": true, "vdc": true}, usableOn(t, h, d, name))
	run(t, "lab-domain", "start", d.Name)
	want(t, map[string]bool{"vda": true, "vdc": true}, usableOn(t, h, d, name))

	events := h.Subscribe(t.Context())
	run(t, "sh", "-c", "kill -9 $(cat /run/libvirt/qemu/broken.pid)")
	for e := range events {
		if e.Kind == EventLifecycle && e.UUID == d.UUID && e.Action == "stopped" {
			if e.Detail != "failed" {
				t.Errorf("%+v", e)
			}
			break
		}
	}
	want(t, map[string]bool{"vda": false, "vdc": false}, usableOn(t, h, d, name))
	run(t, "lab-domain", "start", d.Name)
	want(t, map[string]bool{"vda": false, "vdc": false}, usableOn(t, h, d, name))
	b.Checkpoint, b.Disks[0].Incremental = "virtbackup-2", name
	if err := h.BeginBackup(t.Context(), d.UUID, b); !errors.Is(err, ErrCheckpointBroken) {
		t.Errorf("an increment from it: %v", err)
	}
	if err := h.Delete(t.Context(), d.UUID, "virtbackup-2", ""); err != nil {
		t.Error(err)
	}
	// The broken bitmaps can be deleted while it runs, also when libvirt has forgotten them.
	if err := h.Forget(t.Context(), d.UUID, name); err != nil {
		t.Fatal(err)
	}
	if err := h.Delete(t.Context(), d.UUID, name, definition); err != nil {
		t.Fatal(err)
	}
	run(t, "lab-domain", "shutdown", d.Name)
	want(t, map[string]bool{}, usableOn(t, h, d, name))
}

func bitmapsOf(t *testing.T, file string) []string {
	t.Helper()
	info, err := imageInfo(t.Context(), file, "qcow2")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, b := range info.Specific.Data.Bitmaps {
		names = append(names, b.Name)
	}
	return names
}

func TestLabDeleteWithMissingBitmap(t *testing.T) {
	h := host(t)
	d := guest(t, h, "missing", "qcow2:64M", "qcow2:8M", "qcow2:8M")
	s := scratch(t, d, images, "vda")
	all := []string{"vda", "vdb", "vdc"}
	for _, name := range []string{"virtbackup-1", "virtbackup-2"} {
		b := Begin{Socket: SocketDirectory + "/m.sock", Checkpoint: name, CheckpointDisks: all, Disks: []BeginDisk{{Target: "vda", Scratch: s["vda"]}}}
		if err := h.BeginBackup(t.Context(), d.UUID, b); err != nil {
			t.Fatal(err)
		}
		end(t, h, d)
		scratch(t, d, images, "vda")
	}
	run(t, "lab-domain", "shutdown", d.Name)
	// The middle disk loses its bitmaps.
	for _, name := range []string{"virtbackup-1", "virtbackup-2"} {
		run(t, "qemu-img", "bitmap", "--remove", images+"/missing-vdb.qcow2", name)
	}
	run(t, "lab-domain", "start", d.Name)
	want(t, map[string]bool{"vda": true, "vdb": false, "vdc": true}, usableOn(t, h, d, "virtbackup-1"))
	if err := h.Delete(t.Context(), d.UUID, "virtbackup-1", ""); err != nil {
		t.Fatal(err)
	}
	names, err := h.ListOurs(t.Context(), d.UUID)
	if err != nil {
		t.Fatal(err)
	}
	want(t, []string{"virtbackup-2"}, names)
	run(t, "lab-domain", "shutdown", d.Name)
	want(t, []string{"virtbackup-2"}, bitmapsOf(t, images+"/missing-vda.qcow2"))
	want(t, []string{"virtbackup-2"}, bitmapsOf(t, images+"/missing-vdc.qcow2"))
	// And off.
	if err := h.Delete(t.Context(), d.UUID, "virtbackup-2", ""); err != nil {
		t.Fatal(err)
	}
	want(t, nil, bitmapsOf(t, images+"/missing-vda.qcow2"))
	want(t, nil, bitmapsOf(t, images+"/missing-vdc.qcow2"))
	if err := h.Delete(t.Context(), d.UUID, "virtbackup-2", ""); err != nil { // nothing to do
		t.Fatal(err)
	}
	if names, err = h.ListOurs(t.Context(), d.UUID); err != nil || len(names) != 0 {
		t.Error(names, err)
	}
}

func TestLabNewDefinitionBoots(t *testing.T) {
	h := host(t)
	d := guest(t, h, "orig", "qcow2:8M:sector=4096", "raw:8M")
	doc, err := h.BackupDefinition(t.Context(), d.UUID)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "lab-domain", "destroy", "orig")
	out, dropped, err := NewDefinition([]byte(doc), Changes{
		Name: "copy <&>'", BootDirectories: []string{images},
		Disks: map[string]NewDisk{"vda": {Path: images + "/orig-vda.qcow2", Format: "qcow2"}, "vdb": {Path: images + "/orig-vdb.raw", Format: "raw"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want(t, []string{`domain/devices/serial/source`, `domain/devices/serial[@type="file"]`, `domain/devices/console[@type="file"]`},
		slices.DeleteFunc(dropped, func(s string) bool { return s == "domain/devices/console/source" || s == "domain/devices/audio" }))
	uuid, err := h.Define(t.Context(), out)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := errors.Join(h.Destroy(context.Background(), uuid), h.Undefine(context.Background(), uuid, true)); err != nil {
			t.Error(err)
		}
	})
	if err := h.Start(t.Context(), uuid, false); err != nil {
		t.Fatal(err)
	}
	run(t, "lab-domain", "wait-agent", "copy <&>'")
	copied, err := h.Lookup(t.Context(), "copy <&>'")
	if err != nil {
		t.Fatal(err)
	}
	if k, _ := copied.Disk("vda"); k.LogicalBlockSize != 4096 || copied.UUID == d.UUID {
		t.Errorf("%+v", copied)
	}
}

func TestLabSnapshots(t *testing.T) {
	h := host(t)
	d := guest(t, h, "snap", "qcow2:8M")
	if d.HasInternalSnapshots() || len(d.Snapshots) != 0 {
		t.Errorf("%+v", d.Snapshots)
	}
	run(t, "virsh", "snapshot-create-as", "snap", "outer", "--disk-only", "--diskspec", "vda,file="+images+"/snap-vda.overlay")
	t.Cleanup(func() { _ = os.Remove(images + "/snap-vda.overlay") })
	d, err := h.ByUUID(t.Context(), d.UUID)
	if err != nil {
		t.Fatal(err)
	}
	k, _ := d.Disk("vda")
	if d.HasInternalSnapshots() || len(d.Snapshots) != 1 || k.Source != images+"/snap-vda.overlay" {
		t.Errorf("%+v", d)
	}
	want(t, []string{images + "/snap-vda.qcow2"}, k.Backing)
	run(t, "virsh", "snapshot-delete", "snap", "outer", "--metadata")
	run(t, "lab-domain", "destroy", "snap")
	run(t, "virsh", "snapshot-create-as", "snap", "inner")
	if d, err = h.ByUUID(t.Context(), d.UUID); err != nil || !d.HasInternalSnapshots() {
		t.Errorf("%+v, %v", d.Snapshots, err)
	}
}

func TestLabHungLibvirtd(t *testing.T) {
	h := host(t)
	if _, err := h.Domains(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, "systemctl", "kill", "--signal=STOP", "libvirtd")
	t.Cleanup(func() {
		_ = exec.CommandContext(context.Background(), "systemctl", "kill", "--signal=CONT", "libvirtd").Run()
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := h.Domains(ctx); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	run(t, "systemctl", "kill", "--signal=CONT", "libvirtd")
	if _, err := h.Domains(t.Context()); err != nil {
		t.Error(err)
	}
}

func testAgent(t *testing.T, h *Hypervisor, d Domain) {
	status := func(want FilesystemStatus) {
		t.Helper()
		if got, err := h.FSStatus(t.Context(), d.UUID); err != nil || got != want {
			t.Fatalf("%s, %v", got, err)
		}
	}
	status(Thawed)
	if err := h.Thaw(t.Context(), d.UUID); err != nil { // not frozen: no harm
		t.Fatal(err)
	}
	if err := h.Freeze(t.Context(), d.UUID); err != nil {
		t.Fatal(err)
	}
	status(Frozen)
	if err := h.Freeze(t.Context(), d.UUID); !errors.Is(err, ErrAgent) {
		t.Errorf("frozen twice: %v", err)
	}
	if err := h.Thaw(t.Context(), d.UUID); err != nil {
		t.Fatal(err)
	}
	status(Thawed)
}

// The guest's root replaces the agent by a flood without an end of line, then
// by silence. Both end as errors, within the time given, and libvirtd is well.
func testHostileAgent(t *testing.T, h *Hypervisor, d Domain) {
	run(t, "lab-domain", "exec", d.Name, "--", "sh", "-c",
		`(sleep 1; kill -STOP $(pidof qemu-ga); head -c 300000000 /dev/zero | tr '\0' '{' >/dev/virtio-ports/org.qemu.guest_agent.0; sleep 1000) >/dev/null 2>&1 &`)
	for failures := 0; failures < 3; {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		status, err := h.FSStatus(ctx, d.UUID)
		cancel()
		switch {
		case errors.Is(err, ErrAgent):
			failures++
		case err != nil:
			t.Fatal(err)
		case status != Thawed:
			t.Fatalf("the status is %q", status)
		}
	}
	if name, _, err := h.State(t.Context(), d.UUID); err != nil || name != StateRunning {
		t.Errorf("%s, %v", name, err)
	}
}

func testNotRunning(t *testing.T, h *Hypervisor, d Domain) {
	if err := h.Destroy(t.Context(), d.UUID); err != nil {
		t.Fatal(err)
	}
	if _, err := h.FSStatus(t.Context(), d.UUID); !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
	if err := h.BeginBackup(t.Context(), d.UUID, Begin{Socket: SocketDirectory + "/x"}); !errors.Is(err, ErrNotRunning) {
		t.Error(err)
	}
}
