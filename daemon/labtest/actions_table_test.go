//go:build lab

package labtest

import (
	"cmp"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

var update = flag.Bool("update", false, "write TRACKING.md anew")

const theTable = "../TRACKING.md"

// row says what the next backup of a disk is after an action: how its changes
// are found and why not by the bitmap, as verdictOf has it.
type row struct {
	does   string // the action
	before string // an action that is done before the parent of that backup is made
	// The verdict on the disk if the domain runs, and if it is off, when the next
	// backup is made. Such a backup is not made if it is "".
	running, off string
	others       string // the verdict on the disks to which it is not done; "" is "cbt"
	more         string // that on the disk that came
	raw          bool   // one of the others is raw
	system       bool   // the guest has an operating system
}

// first is the disk to which things are done.
const first = "sda"

const (
	cbt      = "cbt"
	replaced = "digest disk-replaced"
	resized  = "full disk-resized"
	changed  = "digest changed-while-off"
	unseen   = "digest unseen"
	broken   = "digest bitmap-broken"
	attached = "full disk-attached"
	internal = "digest internal-snapshot"
	none     = "" // there is no image of the disk
)

// rows is the table of what is tried.
var rows = []row{
	{does: nothing, running: cbt, off: cbt, raw: true},
	{does: "suspend, resume", running: cbt, off: cbt},
	{does: "reset", running: cbt, off: cbt},
	{does: "destroy, start", running: cbt, off: cbt},
	{does: "shutdown by the guest", running: cbt, off: cbt, system: true},
	{does: "SIGTERM of QEMU", running: cbt, off: cbt},
	{does: "SIGKILL of QEMU", running: broken, off: broken, others: broken},
	{does: "save, restore", running: cbt, off: cbt},
	{does: "managedsave, start", running: cbt, off: cbt},
	{does: "managedsave, edited by qemu-io, managedsave-remove", running: changed, off: changed},
	{does: "libvirtd restarted", running: cbt, off: cbt},
	{does: "libvirtd down: SIGTERM of QEMU", running: unseen, off: unseen, others: unseen},
	{does: "libvirtd down: SIGTERM of QEMU, image edited beneath qcow2", running: unseen, off: unseen, others: unseen},
	{does: "libvirtd down: SIGKILL of QEMU, image edited by qemu-io", running: unseen, off: unseen, others: unseen},
	{does: "host power loss", running: "digest host-restarted", off: "digest host-restarted", others: "digest host-restarted"},
	{does: "host power loss, image edited beneath qcow2 before it is up", running: "digest host-restarted", off: "digest host-restarted", others: "digest host-restarted"},
	{does: "virtbackupd stopped: destroy, start", running: cbt, off: cbt},
	{does: "virtbackupd stopped: destroy, image edited beneath qcow2, start", running: changed, off: changed},
	{does: "virtbackupd stopped: detach-disk, edit it, attach the same", running: replaced, off: replaced},
	{does: "virtbackupd hung: destroy, start", running: cbt, off: cbt},
	{does: "virtbackupd hung: destroy, image edited beneath qcow2, start", running: changed, off: changed},
	{does: "virtbackupd stopped, records of the hook lost: destroy, image edited beneath qcow2, start", running: unseen, off: unseen, others: unseen},
	{does: "hook missing: destroy, start", running: unseen, off: unseen, others: unseen},
	{does: "hook missing: destroy, image edited beneath qcow2, start", running: unseen, off: unseen, others: unseen},

	{does: "attach-device --live", running: cbt, more: attached},
	{does: "attach-device --live --config", running: cbt, off: cbt, more: attached},
	{does: "attach-device --config", running: cbt, off: cbt, more: attached},
	{does: "detach-disk", before: "attach-device --live", running: cbt},
	{does: "detach-disk --config", before: "attach-device --live --config", running: cbt, off: cbt},
	{does: "detach-disk, attach the same", running: replaced, off: replaced},
	{does: "detach-disk, edit it, attach the same", running: replaced, off: replaced},
	{does: "detach-disk, attach another", running: replaced, off: replaced},
	{does: "another disk in the definition", running: replaced, off: replaced},
	{does: "change-media", running: cbt, off: cbt},
	{does: "blockresize", running: resized, off: resized},
	{does: "qemu-img resize", running: resized, off: resized},

	{does: "internal snapshot", running: internal, off: internal, others: internal},
	{does: "internal snapshot of the domain that is off", running: internal, off: internal, others: internal},
	{does: "snapshot-revert", before: internalSnapshot, running: internal, off: internal, others: internal},
	{does: "snapshot-delete", before: internalSnapshot, running: broken, off: broken, others: broken},
	{does: externalSnapshot, running: cbt, off: cbt},
	{does: externalSnapshot + " of the domain that is off", running: broken, off: broken},
	{does: nothing, before: externalSnapshot, running: cbt, off: cbt},
	{does: "blockcommit --pivot", before: externalSnapshot, running: cbt, off: cbt},
	{does: "blockpull", before: externalSnapshot, running: cbt, off: cbt},
	{does: "two external snapshots, the middle layer pulled", running: cbt, off: cbt},
	{does: "two external snapshots, the middle layer committed", running: cbt, off: cbt},
	{does: "qemu-img commit, and the overlay taken out", before: externalSnapshot, running: changed, off: changed},
	{does: "qemu-img rebase onto nothing", before: externalSnapshot, running: changed, off: changed},
	{does: "overlay dropped", before: externalSnapshot, running: changed, off: changed},
	{does: "blockcopy --pivot", running: replaced, off: replaced},

	{does: "image overwritten by another", running: changed, off: changed},
	{does: "image converted by qemu-img and moved in its place", running: changed, off: changed},
	{does: "older copy put back", before: copyKept, running: changed, off: changed},
	{does: "older copy put back with the stamps of the newer image", before: copyKept, running: changed, off: changed, raw: true},
	{does: "edited by qemu-io", running: changed, off: changed},
	{does: "zeroed and discarded by qemu-io", running: changed, off: changed},
	{does: "edited beneath qcow2", running: changed, off: changed},
	{does: "used by another domain", running: changed, off: changed},

	{does: "undefine, define", running: cbt, off: cbt},
	{does: "undefine --checkpoints-metadata, define", running: cbt, off: cbt},
	{does: "undefine, define while it runs", running: cbt, off: cbt},
	{does: "rename", running: cbt, off: cbt},
	{does: "checkpoint redefined, its metadata deleted", running: cbt, off: cbt},
	{does: "checkpoint redefined and deleted", running: broken, off: broken},
	{does: "block-dirty-bitmap-remove", running: broken, off: broken},
	{does: "qemu-img bitmap --remove", running: changed, off: changed},
}

// TestActions does each action between two backups of a domain, and looks at
// what the second one makes of each disk, and that it is exact, as are those
// before it. TRACKING.md tells people; -update writes it.
func TestActions(t *testing.T) {
	h := newHost(t)
	var table []string
	tried := 0
	for _, r := range rows {
		for _, next := range []string{running, off} {
			if r.verdict(next) == none {
				continue
			}
			tried++
			t.Run(r.title(next), func(t *testing.T) { table = append(table, h.in(t).tryRow(r, next)) })
		}
	}
	if len(table) < tried {
		return // -run chose some
	}
	compareTable(t, tableHead+strings.Join(table, ""))
}

const tableHead = `# What happens to a disk between two backups, and what the next one makes of it

Written by the test TestActions, which does each of these on a real host with ` + "`virsh`, `qemu-img`, `qemu-io` and `cp`" + `, and has QEMU
compare every backup with what the disks held. "go test -tags lab ./daemon/labtest -run TestActions -args -update" in the lab writes it
anew.

The domain has two disks or three with 4 MiB of data. After its last increment the guest writes to all of them, then a thing is done to
the first one, and if the domain runs then, the guest writes again. *by bitmap* is an increment of what the bitmap says, *by
comparison* one for which the whole disk was read and what differs from the parent was stored, *whole* an image of all.

| Done to the disk | Domain meanwhile | at the next backup | its image | cause | read, KiB | stored, KiB | other disks |
| --- | --- | --- | --- | --- | ---: | ---: | --- |
`

func (r row) verdict(next string) string {
	if next == off {
		return r.off
	}
	return r.running
}

func (r row) title(next string) string {
	name := r.does
	if r.before != "" {
		name += ", after " + r.before
	}
	return name + "/" + next
}

// chosen is the action with that name, and the state of the domain for it.
func chosen(name string) (action, string) {
	for _, list := range []struct {
		state   string
		actions []action
	}{{off, atRest}, {running, live}, {running, around}} {
		if i := slices.IndexFunc(list.actions, func(a action) bool { return a.name == name }); i >= 0 {
			return list.actions[i], list.state
		}
	}
	panic("no such action: " + name)
}

// tryRow tries a row, and returns its line of the table.
func (h *host) tryRow(r row, next string) string {
	s := r.scene(h.t)
	c := &watched{host: h, scene: s}
	c.write(1)
	c.take()
	c.write(2)
	if r.before != "" {
		a, state := chosen(r.before)
		s.bring(state)
		a.do(s, first)
		s.bring(running)
		c.write(3)
	}
	c.take()
	c.write(4)
	a, state := chosen(r.does)
	s.bring(state)
	if a.can != nil && !a.can(s, first) {
		h.t.Fatalf("%q cannot be done", a.name)
	}
	a.do(s, first)
	if s.bring(next); next == running {
		c.write(5)
	}
	b := c.take()
	r.check(h.t, b, next)
	c.allExact()
	return r.line(b, next, state)
}

func (r row) scene(t *testing.T) *scene {
	if r.system {
		return newSystem(t)
	}
	raw := 0
	if r.raw {
		raw = 1
	}
	return newScene(t, 2, raw)
}

func (r row) check(t *testing.T, b dbus.BackupProperties, next string) {
	t.Helper()
	extra := false
	for _, d := range b.Disks {
		want := cmp.Or(r.others, cbt)
		switch {
		case d.Target == first:
			want = r.verdict(next)
		case d.Target == more:
			want, extra = r.more, true
		case d.Format == "raw":
			want = "digest raw-disk"
		}
		if got := verdictOf(d); got != want {
			t.Errorf("the image of %s is %q and not %q", d.Target, got, want)
		}
	}
	if extra != (r.more != none) {
		t.Errorf("the backup has the images %+v", b.Disks)
	}
}

// images are how the table calls the verdicts.
var images = strings.NewReplacer("cbt", "by bitmap", "digest ", "by comparison | ", "full ", "whole | ")

// line is that of the table.
func (r row) line(b dbus.BackupProperties, next, state string) string {
	shown := first
	if r.more != none {
		shown = more
	}
	var verdict string
	others := map[string]bool{}
	for _, d := range b.Disks {
		how := images.Replace(verdictOf(d))
		if d.Target != shown {
			others[strings.ReplaceAll(how, " | ", ": ")] = true
			continue
		}
		if !strings.Contains(how, "|") {
			how += " |"
		}
		verdict = fmt.Sprintf("%s | %d | %d", how, d.ReadBytes>>10, d.DataBytes>>10)
	}
	does := r.does
	if r.before != "" {
		does += " (after " + r.before + " and a backup)"
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s |\n", does, state, next, verdict, strings.Join(slices.Sorted(maps.Keys(others)), ", "))
}

func compareTable(t *testing.T, table string) {
	if t.Failed() {
		return // the table would not be true
	}
	if *update {
		if err := os.WriteFile(theTable, []byte(table), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	there, err := os.ReadFile(theTable)
	if err != nil {
		t.Fatal(err)
	}
	if string(there) != table {
		t.Errorf("TRACKING.md says something else (-update writes it):\n%s", table)
	}
}

// watched is a scene, the chain of its backups, and what the disks held at each.
type watched struct {
	*host
	*scene
	backups []dbus.BackupProperties
	held    []snapshot
}

// write has the guest write to all disks: where nothing was, and over what was.
func (c *watched) write(n int) {
	c.scene.t.Helper()
	for _, d := range c.disks() {
		c.io(d.target, fmt.Sprintf("write -P %d %dk 128k", n, 64*n), fmt.Sprintf("write -P %d %dk 4k", n+100, 6<<10+64*n),
			fmt.Sprintf("discard %dk 64k", 1<<10+64*n))
	}
}

// take makes a backup.
func (c *watched) take() dbus.BackupProperties {
	c.host.t.Helper()
	c.held = append(c.held, c.snapshot())
	b := c.backup(c.guest, dbus.BackupOptions{})
	c.backups = append(c.backups, b)
	return b
}

// allExact compares every backup with what the disks held, and restores the last.
func (c *watched) allExact() {
	c.host.t.Helper()
	for i, b := range c.backups {
		c.chainIsExact(b, c.held[i])
	}
	last := len(c.backups) - 1
	c.restoreIsExact(c.backups[last], c.held[last])
}
