//go:build lab

package overlay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// noHook runs own work without telling anybody.
type noHook struct{}

func (noHook) OwnWork(_ context.Context, _ hypervisor.Domain, _ []string, fn func() error) error {
	return fn()
}

// guest is a paused domain with a qcow2 and a raw disk, whose disks only write
// writes to, and a chain of backups of it that are in the catalog alone.
type guest struct {
	t       *testing.T
	name    string
	uuid    string
	h       *hypervisor.Hypervisor
	c       *catalog.Catalog
	k       *Keeper
	backups int
	tip     string
	want    map[string]string // target → raw file that holds what the disk has to
	pattern int
}

var targets = map[string]string{"vda": "qcow2", "vdb": "raw"}

func (g *guest) base(target string) string {
	return fmt.Sprintf("/var/lib/libvirt/images/%s-%s.%s", g.name, target, targets[target])
}

func newGuest(t *testing.T, name string) *guest {
	t.Helper()
	ctx, log := t.Context(), slog.New(slog.NewTextHandler(t.Output(), nil))
	h, err := hypervisor.Connect(ctx, "qemu:///system", log)
	must(t, err)
	t.Cleanup(h.Close)
	c, err := catalog.Open(ctx, filepath.Join(t.TempDir(), "catalog"))
	must(t, err)
	t.Cleanup(func() { _ = c.Close() })
	host(t, "lab-domain", "create", name, "--disk", "qcow2:32M", "--disk", "raw:32M")
	t.Cleanup(func() {
		_ = exec.CommandContext(context.Background(), "lab-domain", "remove", name).Run()
		_ = exec.CommandContext(context.Background(), "sh", "-c", "rm -f /var/lib/libvirt/images/"+name+"-*").Run()
	})
	d, err := h.Lookup(ctx, name)
	must(t, err)
	must(t, c.CreateRepository(ctx, catalog.Repository{ID: "r", Name: "nas", Type: "dir", Path: "/srv"}))
	must(t, c.CreateJob(ctx, catalog.Job{ID: "j", Kind: "backup", Domain: d.UUID, Created: time.Now()}))
	must(t, c.StartJob(ctx, "j", time.Now()))
	g := &guest{t: t, name: name, uuid: d.UUID, h: h, c: c, want: map[string]string{},
		k: &Keeper{Hypervisor: h, Catalog: c, Lifecycle: noHook{}, Log: log}}
	for target := range targets {
		g.want[target] = filepath.Join(t.TempDir(), target)
		host(t, "qemu-img", "create", "-q", "-f", "raw", g.want[target], "32M")
	}
	return g
}

func (g *guest) start() { g.t.Helper(); host(g.t, "virsh", "-q", "start", "--paused", g.name) }

// stacks are the paths of the layers of each disk, without the directory and
// the name of its image.
func (g *guest) stacks() map[string][]string {
	g.t.Helper()
	d, err := g.h.ByUUID(g.t.Context(), g.uuid)
	must(g.t, err)
	stacks, err := hypervisor.Stacks(g.t.Context(), d)
	must(g.t, err)
	all := map[string][]string{}
	for target, stack := range stacks {
		for _, l := range stack {
			all[target] = append(all[target], strings.TrimPrefix(l.Path, g.base(target)))
		}
	}
	return all
}

// write writes to both disks, as the guest does, some clusters from one on.
func (g *guest) write(from, clusters int) {
	g.t.Helper()
	g.pattern = g.pattern%250 + 1
	command := fmt.Sprintf("write -P %d %dk %dk", g.pattern, from*64, clusters*64)
	for target, device := range map[string]string{"vda": "virtio-disk0", "vdb": "virtio-disk1"} {
		for _, c := range []string{command, "flush"} {
			host(g.t, "virsh", "-q", "qemu-monitor-command", g.name, "--hmp", fmt.Sprintf("qemu-io -d /machine/peripheral/%s/virtio-backend \"%s\"", device, c))
		}
		host(g.t, "qemu-io", "-f", "raw", "-c", command, g.want[target])
	}
}

// point puts overlays on both disks.
func (g *guest) point() string {
	g.t.Helper()
	g.backups++
	backup, paths := id(g.backups), map[string]string{}
	var rows []catalog.Overlay
	for target := range targets {
		paths[target] = Name(g.base(target), backup)
		rows = append(rows, catalog.Overlay{Path: paths[target], Domain: g.uuid, Backup: backup, Target: target})
	}
	must(g.t, g.c.AddOverlays(g.t.Context(), rows))
	must(g.t, g.h.PutOverlays(g.t.Context(), g.uuid, paths))
	return backup
}

// backup is point, and the commit of the backup.
func (g *guest) backup() string {
	g.t.Helper()
	ctx := g.t.Context()
	b := catalog.Backup{ID: g.point(), Domain: g.uuid, DomainName: g.name, Repository: "r", Job: "j", Kind: chain.Full, State: chain.Running, Created: time.Now(),
		Images: []catalog.Image{{Target: "vda", Kind: chain.Full, Tracking: chain.Snapshot}}}
	if g.tip != "" {
		b.Kind, b.Chain, b.Parent, b.Images[0].Kind = chain.Incremental, id(1), g.tip, chain.Incremental
	}
	must(g.t, g.c.CreateBackup(ctx, b, "", catalog.Step{Job: "j", Name: "planned"}))
	must(g.t, g.c.CommitBackup(ctx, b.ID, catalog.Commit{Finished: time.Now(), Manifest: []byte("{}"), Images: b.Images}))
	g.tip = b.ID
	return b.ID
}

// is fails unless the disks have these overlays, the newest first, hold what
// they should, and no other file of ours is there.
func (g *guest) is(overlays ...string) {
	g.t.Helper()
	for target, stack := range g.stacks() {
		var want []string
		for _, o := range overlays {
			want = append(want, infix+o)
		}
		if want = append(want, ""); !slices.Equal(stack, want) {
			g.t.Errorf("%s has the layers %q and not %q", target, stack, want)
		}
		format := "qcow2"
		if stack[0] == "" {
			format = targets[target]
		}
		host(g.t, "qemu-img", "compare", "-U", "-f", format, "-F", "raw", g.base(target)+stack[0], g.want[target])
		if out, err := exec.Command("qemu-img", "check", "-U", "-f", format, g.base(target)+stack[0]).CombinedOutput(); err != nil && format == "qcow2" {
			g.t.Errorf("%s: %s", target, out)
		}
		files, err := filepath.Glob(g.base(target) + infix + "*")
		must(g.t, err)
		if len(files) != len(overlays) {
			g.t.Errorf("%d files of %s are there: %v", len(files), target, files)
		}
	}
	rows, err := g.c.Overlays(g.t.Context(), g.uuid)
	if err != nil || len(rows) != len(overlays)*len(targets) {
		g.t.Errorf("the catalog has %+v, %v", rows, err)
	}
	stored := host(g.t, "virsh", "-q", "dumpxml", "--inactive", g.name)
	for target := range targets {
		top := g.base(target)
		if len(overlays) > 0 {
			top += infix + overlays[0]
		}
		if !strings.Contains(stored, "'"+top+"'") {
			g.t.Errorf("the stored definition does not have %s:\n%s", top, stored)
		}
	}
	if len(overlays) < strings.Count(stored, infix)/len(targets) {
		g.t.Errorf("the stored definition has overlays:\n%s", stored)
	}
}

func (g *guest) settle() { g.t.Helper(); must(g.t, g.k.Settle(g.t.Context(), g.uuid)) }

// cycle is a chain's life: a full backup, increments, one that failed, its end.
func cycle(t *testing.T, g *guest, write func(from, clusters int)) {
	write(0, 20)
	one := g.backup()
	g.settle()
	g.is(one)
	write(10, 5)
	two := g.backup()
	write(12, 50)
	g.is(two, one)
	g.settle()
	g.is(two)
	write(3, 3)
	g.point()
	write(4, 4)
	g.settle() // the backup failed: what it froze is thawed
	g.is(two)
	three := g.backup()
	must(t, g.k.Settle(t.Context(), g.uuid))
	g.is(three)
	must(t, g.c.EndChain(t.Context(), one, chain.Finished, chain.ChainFinished))
	g.settle()
	g.is()
}

func TestLabLive(t *testing.T) {
	g := newGuest(t, "overlay-live")
	g.start()
	cycle(t, g, g.write)
}

// TestLabOff has all of it done while the domain is off; it runs only to write.
func TestLabOff(t *testing.T) {
	g := newGuest(t, "overlay-off")
	cycle(t, g, func(from, clusters int) {
		g.start()
		g.write(from, clusters)
		host(t, "virsh", "-q", "destroy", g.name)
	})
	for target := range targets { // what it made is nobody else's to read
		if st, err := os.Stat(g.base(target)); err != nil || st.Mode().Perm() != 0o644 {
			t.Errorf("the image is now %v, %v", st.Mode(), err)
		}
	}
}

// TestLabHeld has what would be lost by a commit.
func TestLabHeld(t *testing.T) {
	for name, c := range map[string]struct{ hold, letGo func(g *guest) }{
		"snapshot": {
			func(g *guest) {
				host(t, "virsh", "-q", "snapshot-create-as", g.name, "s", "--disk-only", "--diskspec", "vdb,snapshot=no", "--diskspec", "vda,snapshot=external,file="+g.base("vda")+".s")
			},
			func(g *guest) {
				host(t, "virsh", "-q", "blockcommit", g.name, "vda", "--active", "--pivot", "--shallow", "--wait")
				host(t, "virsh", "-q", "snapshot-delete", g.name, "s", "--metadata")
				must(t, os.Remove(g.base("vda")+".s"))
			},
		},
		"linked clone": {
			func(g *guest) {
				host(t, "lab-domain", "create", "overlay-clone", "--disk", "qcow2:32M")
				for target := range targets {
					host(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", targets[target], "-b", g.base(target), "/var/lib/libvirt/images/clone-"+target)
					host(t, "virsh", "-q", "attach-disk", "overlay-clone", "/var/lib/libvirt/images/clone-"+target, map[string]string{"vda": "vdx", "vdb": "vdy"}[target], "--subdriver", "qcow2", "--config")
				}
			},
			func(*guest) { host(t, "lab-domain", "remove", "overlay-clone") },
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, "overlay-held")
			g.start()
			g.write(0, 20)
			one := g.backup()
			g.write(1, 3)
			must(t, g.c.EndChain(t.Context(), one, chain.Finished, chain.ChainFinished))
			c.hold(g)
			before := g.stacks()
			if err := g.k.Settle(t.Context(), g.uuid); !errors.Is(err, ErrHeld) {
				t.Errorf("got error %v", err)
			}
			if after := g.stacks(); fmt.Sprint(before) != fmt.Sprint(after) {
				t.Errorf("the layers were %v and are %v", before, after)
			}
			c.letGo(g)
			g.settle()
			g.is()
		})
	}
}

// TestLabInterrupted has commits end with QEMU, with libvirtd and with us, and
// be done again.
func TestLabInterrupted(t *testing.T) {
	for name, interrupt := range map[string]func(g *guest, cancel context.CancelFunc){
		"killed":    func(g *guest, _ context.CancelFunc) { killQEMU(t, g.name) },
		"destroyed": func(g *guest, _ context.CancelFunc) { host(t, "virsh", "-q", "destroy", g.name) },
		"libvirtd":  func(*guest, context.CancelFunc) { host(t, "systemctl", "restart", "libvirtd") },
		"cancelled": func(_ *guest, cancel context.CancelFunc) { cancel() },
	} {
		for _, active := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s-active=%v", name, active), func(t *testing.T) {
				g := newGuest(t, "overlay-broken")
				g.start()
				g.write(0, 100)
				one := g.backup()
				g.write(50, 400)
				left := []string{}
				if active {
					must(t, g.c.EndChain(t.Context(), one, chain.Finished, chain.ChainFinished))
				} else {
					left = append(left, g.backup())
					g.write(60, 10)
				}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				slow(t, g)
				done := make(chan error, 1)
				go func() { done <- g.k.Settle(ctx, g.uuid) }()
				awaitJob(t, g, done)
				interrupt(g, cancel)
				if err := <-done; err == nil && name != "libvirtd" {
					t.Error("it was not interrupted")
				} else {
					t.Log(err)
				}
				g.k.Hypervisor = g.h
				if state := strings.TrimSpace(host(t, "virsh", "-q", "domstate", g.name)); state != "paused" {
					g.start()
				}
				for target := range targets { // one that goes on does so faster
					_ = exec.Command("virsh", "-q", "blockjob", g.name, target, "--bandwidth", "0").Run()
				}
				g.settle()
				g.is(left...)
			})
		}
	}
}

func killQEMU(t *testing.T, name string) {
	t.Helper()
	pid, err := os.ReadFile("/run/libvirt/qemu/" + name + ".pid")
	must(t, err)
	host(t, "kill", "-KILL", strings.TrimSpace(string(pid)))
	for strings.TrimSpace(host(t, "virsh", "-q", "domstate", name)) != "shut off" {
		time.Sleep(10 * time.Millisecond)
	}
}

// slow has QEMU write little per second to all disks.
func slow(t *testing.T, g *guest) {
	t.Helper()
	g.k.Hypervisor = slowly{g.h, g}
	t.Cleanup(func() { g.k.Hypervisor = g.h })
}

// slowly begins commits at a speed that leaves time to disturb them.
type slowly struct {
	*hypervisor.Hypervisor
	g *guest
}

func (s slowly) CommitLayer(ctx context.Context, uuid string, c hypervisor.LayerCommit) error {
	args := []string{"-q", "blockcommit", s.g.name, c.Target, "--base", c.Base, "--top", c.Top, "--bytes", "--bandwidth", "65536", "--delete"}
	if c.Active {
		args = append(args, "--active")
	}
	if out, err := exec.CommandContext(ctx, "virsh", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("virsh blockcommit: %w: %s", err, out)
	}
	return s.JoinCommit(ctx, uuid, c.Target)
}

func awaitJob(t *testing.T, g *guest, done <-chan error) {
	t.Helper()
	for {
		for target := range targets {
			if out, err := exec.Command("virsh", "-q", "blockjob", g.name, target).CombinedOutput(); err == nil && strings.Contains(string(out), "ommit") {
				return
			}
		}
		select {
		case err := <-done:
			t.Fatalf("no commit was seen: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestLabFull has no space for one of two overlays: none is put, and nothing stays.
func TestLabFull(t *testing.T) {
	g := newGuest(t, "overlay-full")
	small := "/var/tmp/" + g.name // which QEMU can come to
	must(t, os.Mkdir(small, 0o711))
	host(t, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small)
	t.Cleanup(func() {
		_ = exec.CommandContext(context.Background(), "sh", "-c", "umount "+small+" && rmdir "+small).Run()
	})
	for _, start := range []bool{false, true} {
		if start {
			g.start()
			g.write(0, 4)
		}
		paths := map[string]string{"vda": Name(g.base("vda"), id(7)), "vdb": filepath.Join(small, "vdb"+infix+id(7))}
		rows := []catalog.Overlay{}
		for target, path := range paths {
			rows = append(rows, catalog.Overlay{Path: path, Domain: g.uuid, Backup: id(7), Target: target})
		}
		must(t, g.c.AddOverlays(t.Context(), rows))
		if err := g.h.PutOverlays(t.Context(), g.uuid, paths); err == nil {
			t.Error("overlays were put where there is no space")
		} else {
			t.Log(err)
		}
		g.settle()
		g.is()
		if left, err := os.ReadDir(small); err != nil || len(left) > 0 {
			t.Errorf("left are %v, %v", left, err)
		}
	}
}
