//go:build lab

package hypervisor

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestLabOneGuest is what can share a running guest: a start takes long under load.
func TestLabOneGuest(t *testing.T) {
	h := host(t)
	d := guest(t, h, "shared", "qcow2:64M", "qcow2:16M:fs")
	t.Run("foreign job", func(t *testing.T) { testForeignJob(t, h, d) })
	t.Run("full scratch", func(t *testing.T) { testFullScratch(t, h, d) })
	t.Run("agent", func(t *testing.T) { testAgent(t, h, d) })
	t.Run("hostile agent", func(t *testing.T) { testHostileAgent(t, h, d) })
	t.Run("hung", func(t *testing.T) { testHung(t, h, d) })
	t.Run("not running", func(t *testing.T) { testNotRunning(t, h, d) })
}

func testForeignJob(t *testing.T, h *Hypervisor, d Domain) {
	s := scratch(t, d, images, "vda")
	directory := t.TempDir()
	run(t, "chmod", "a+rx", filepath.Dir(filepath.Dir(directory)), filepath.Dir(directory))
	run(t, "chown", "libvirt-qemu", directory)
	doc := filepath.Join(t.TempDir(), "backup.xml")
	xml := `<domainbackup mode="pull"><server transport="unix" socket="` + directory + `/foreign.sock"/><disks><disk name="vda" backup="yes" type="file"><driver type="qcow2"/><scratch file="` + s["vda"] + `"/></disk></disks></domainbackup>`
	if err := os.WriteFile(doc, []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "virsh", "backup-begin", d.Name, doc, "--reuse-external")
	if err := h.EndBackup(t.Context(), d.UUID); !errors.Is(err, ErrForeignJob) {
		t.Error(err)
	}
	job, err := h.BackupJob(t.Context(), d.UUID)
	if err != nil || !job.Active || job.Ours {
		t.Errorf("%+v, %v", job, err)
	}
	if d, err = h.ByUUID(t.Context(), d.UUID); err != nil || !d.Job {
		t.Errorf("%+v, %v", d, err)
	}
	run(t, "virsh", "domjobabort", d.Name)
}

// A full scratch image pauses the guest; EndBackup lets it go on.
// A QEMU that hangs costs only what it alone knows.
func testHung(t *testing.T, h *Hypervisor, d Domain) {
	pid := strings.TrimSpace(run(t, "cat", "/run/libvirt/qemu/"+d.Name+".pid"))
	run(t, "kill", "-STOP", pid)
	defer func() {
		run(t, "kill", "-CONT", pid)
		if again, err := h.ByUUID(t.Context(), d.UUID); err != nil || again.Disks[0].Capacity == 0 {
			t.Errorf("it goes on: %+v, %v", again, err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	all, err := h.Domains(ctx)
	if err != nil || len(all) != 1 || all[0].UUID != d.UUID || all[0].State != StateRunning || all[0].Disks[0].Source != d.Disks[0].Source {
		t.Fatalf("got %+v, %v", all, err)
	}
	if all[0].Disks[0].Capacity != 0 {
		t.Error("QEMU was not hung")
	}
}

func testFullScratch(t *testing.T, h *Hypervisor, d Domain) {
	write(t, d, "0")
	run(t, "lab-domain", "exec", d.Name, "--", "dd", "if=/dev/urandom", "of=/dev/vda", "bs=1M", "count=16", "conv=fsync")
	small := t.TempDir()
	run(t, "mount", "-t", "tmpfs", "-o", "size=1M,mode=755", "scratch", small)
	t.Cleanup(func() { _ = exec.CommandContext(context.Background(), "umount", small).Run() })
	run(t, "chmod", "a+rx", filepath.Dir(filepath.Dir(small)), filepath.Dir(small))
	s := scratch(t, d, small, "vda")
	b := Begin{Socket: SocketDirectory + "/full.sock", Disks: []BeginDisk{{Target: "vda", Scratch: s["vda"]}}}
	if err := h.BeginBackup(t.Context(), d.UUID, b); err != nil {
		t.Fatal(err)
	}
	events := h.Subscribe(t.Context())
	writing := exec.CommandContext(t.Context(), "lab-domain", "exec", d.Name, "--", "dd", "if=/dev/zero", "of=/dev/vda", "bs=1M", "count=16", "conv=fsync")
	if err := writing.Start(); err != nil {
		t.Fatal(err)
	}
	for e := range events {
		if e.Kind == EventLifecycle && e.Action == "suspended" {
			break
		}
		if e.Kind == EventBlockJob && e.Detail == "failed" {
			t.Log("the job failed instead of pausing the guest")
			break
		}
	}
	end(t, h, d)
	if name, reason, err := h.State(t.Context(), d.UUID); err != nil || name != StateRunning {
		t.Errorf("%s (%s), %v", name, reason, err)
	}
	_ = writing.Wait() // its agent call may have timed out meanwhile
	run(t, "lab-domain", "wait-agent", d.Name)
}
