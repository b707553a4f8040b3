//go:build lab

package labtest

import (
	"cmp"
	"errors"
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
	others       string // the verdict on the other disks; "" is "cbt"
	all          bool   // it is that on the disk to which it is done
	more         string // that on the disk that came
	offline      bool   // the parent of that backup is made while the domain is off
	raw          bool   // one of the others is raw
	system       bool   // the guest has an operating system
	settings     dbus.Settings
	says         string // what the table says of the settings
}

// first is the disk to which things are done.
const first = "sda"

const (
	cbt       = "cbt"
	replaced  = "digest disk-replaced"
	resized   = "full disk-resized"
	changed   = "digest changed-while-off"
	unseen    = "digest unseen"
	compared  = "digest offering-digest"
	overlay   = "snapshot"
	broken    = "digest bitmap-broken"
	restarted = "digest host-restarted"
	missing   = "digest checkpoint-missing"
	attached  = "full disk-attached"
	internal  = "digest internal-snapshot"
	none      = "" // there is no image of the disk
)

// rows is the table of what is tried.
var rows = []row{
	{does: nothing, running: cbt, off: cbt, raw: true},
	{does: "suspend, resume", running: cbt, off: cbt},
	{does: "reset", running: cbt, off: cbt},
	{does: "destroy, start", running: cbt, off: cbt},
	{does: "shutdown by the guest", running: cbt, off: cbt, system: true},
	{does: "SIGTERM of QEMU", running: cbt, off: cbt},
	{does: "SIGKILL of QEMU", running: broken, off: missing, all: true},
	{does: "save, restore", running: cbt, off: cbt},
	{does: "managedsave, start", running: cbt, off: cbt},
	{does: "managedsave, edited by qemu-io, managedsave-remove", running: changed, off: changed},
	{does: "libvirtd restarted", running: cbt, off: cbt},
	{does: "libvirtd down: SIGTERM of QEMU", running: unseen, off: unseen, all: true},
	{does: "libvirtd down: SIGTERM of QEMU, image edited beneath qcow2", running: unseen, off: unseen, all: true},
	{does: "libvirtd down: SIGKILL of QEMU, image edited by qemu-io", running: unseen, off: unseen, all: true},
	{does: "host power loss", running: restarted, off: restarted, all: true},
	{does: "host power loss, image edited beneath qcow2 before it is up", running: restarted, off: restarted, all: true},
	{does: "virtbackupd stopped: destroy, start", running: cbt, off: cbt},
	{does: "virtbackupd stopped: destroy, image edited beneath qcow2, start", running: changed, off: changed},
	{does: "virtbackupd stopped: detach-disk, edit it, attach the same", running: replaced, off: replaced},
	{does: "virtbackupd hung: destroy, start", running: cbt, off: cbt},
	{does: "virtbackupd hung: destroy, image edited beneath qcow2, start", running: changed, off: changed},
	{does: "virtbackupd stopped, records of the hook lost: destroy, image edited beneath qcow2, start", running: unseen, off: unseen, all: true},
	{does: "hook missing: destroy, start", running: unseen, off: unseen, all: true},
	{does: "hook missing: destroy, image edited beneath qcow2, start", running: unseen, off: unseen, all: true},

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

	{does: "internal snapshot", running: internal, off: internal, all: true},
	{does: "internal snapshot of the domain that is off", running: changed, off: changed, all: true},
	{does: "snapshot-revert", before: internalSnapshot, running: internal, off: internal, all: true},
	{does: "snapshot-delete", before: internalSnapshot, running: missing, off: missing, all: true},
	{does: externalSnapshot, running: cbt, off: broken},
	{does: externalSnapshot + " of the domain that is off", running: replaced, off: replaced},
	{does: nothing, before: externalSnapshot, running: cbt, off: cbt},
	{does: "blockcommit --pivot", before: externalSnapshot, running: cbt, off: cbt},
	{does: "blockpull", before: externalSnapshot, running: cbt, off: cbt},
	{does: "two external snapshots, the middle layer pulled", running: cbt, off: broken},
	{does: "two external snapshots, the middle layer committed", running: cbt, off: broken},
	{does: "qemu-img commit, and the overlay taken out", before: externalSnapshot, running: replaced, off: replaced},
	{does: "qemu-img rebase onto nothing", before: externalSnapshot, running: changed, off: changed},
	{does: "overlay dropped", before: externalSnapshot, running: replaced, off: replaced},
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
	{does: "checkpoint redefined and deleted", running: broken, off: missing},
	{does: "block-dirty-bitmap-remove", running: broken, off: missing},
	{does: "qemu-img bitmap --remove", running: changed, off: changed},

	{does: nothing, offline: true, running: cbt, off: cbt},
	{does: "edited beneath qcow2", offline: true, running: changed, off: changed},
	{does: "detach-disk, edit it, attach the same", offline: true, running: replaced, off: replaced},
	{does: "virtbackupd stopped: detach-disk, edit it, attach the same", offline: true, running: replaced, off: replaced},
	{does: "SIGKILL of QEMU", offline: true, running: broken, off: broken, all: true},

	{does: "edited beneath qcow2", settings: wholeOtherwise, says: "fallback full", running: "full changed-while-off", off: "full changed-while-off"},
	{does: nothing, settings: byComparison, says: "tracking digest", running: compared, off: compared, all: true},
	{does: "edited beneath qcow2", settings: byComparison, says: "tracking digest", running: changed, off: changed, others: compared},

	{does: nothing, settings: byOverlay, says: "tracking snapshot", running: overlay, off: overlay, all: true},
	{does: "destroy, start", settings: byOverlay, says: "tracking snapshot", running: overlay, off: overlay, all: true},
	{does: "SIGKILL of QEMU", settings: byOverlay, says: "tracking snapshot", running: overlay, off: overlay, all: true},
	{does: "edited by qemu-io", settings: byOverlay, says: "tracking snapshot", running: changed, off: changed, others: overlay},
	{does: externalSnapshot, settings: byOverlay, says: "tracking snapshot", running: "digest overlay-missing", off: "digest overlay-missing", others: overlay},
	{does: "blockcommit --pivot", settings: byOverlay, says: "tracking snapshot", running: "digest overlay-missing", off: "digest overlay-missing", others: overlay},
	{does: "blockpull", settings: byOverlay, says: "tracking snapshot", running: replaced, off: replaced, others: overlay},
	{does: "overlay dropped", settings: byOverlay, says: "tracking snapshot", running: replaced, off: replaced, others: overlay},
}

// What the offerings of some rows ask for.
var (
	wholeOtherwise = dbus.Settings{Fallback: new(dbus.FallbackFull)}
	byComparison   = dbus.Settings{Tracking: new(dbus.TrackingDigest)}
	byOverlay      = dbus.Settings{Tracking: new(dbus.TrackingSnapshot)}
)

// TestActions does each action between two backups of a domain, and looks at
// what the second one makes of each disk, and that it is exact, as are those
// before it. TRACKING.md tells people; -update writes it. Each action is tried
// with the domain in one state at the next backup, by turns, as all of them take
// ten minutes: TEST_ACTIONS=all tries both, and so does -update.
func TestActions(t *testing.T) {
	h, all := newHost(t), *update || os.Getenv("TEST_ACTIONS") == "all"
	var lines []*string
	t.Run("rows", func(t *testing.T) {
		for i, r := range rows {
			for j, next := range []string{running, off} {
				both := r.running != none && r.off != none
				if r.verdict(next) == none || !all && both && i%2 != j {
					continue
				}
				line := new(string)
				lines = append(lines, line)
				t.Run(r.title(next), func(t *testing.T) {
					if !r.isAround() {
						t.Parallel()
					}
					*line = h.in(t).tryRow(r, next)
				})
			}
		}
	})
	if *update {
		writeTable(t, lines)
	}
	there, err := os.ReadFile(theTable)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range lines {
		if !strings.Contains(string(there), *line) { // it is empty if -run did not choose it
			t.Errorf("TRACKING.md does not say (-update writes it):\n%s", *line)
		}
	}
	if n := strings.Count(string(there), "\n| "); all && n != len(lines)+2 {
		t.Errorf("TRACKING.md has %d lines of a table and not %d (-update writes it)", n, len(lines)+2)
	}
}

// isAround tells whether the row stops what other rows need.
func (r row) isAround() bool {
	return slices.ContainsFunc(around, func(a action) bool { return a.name == r.does })
}

const tableHead = `# What happens to a disk between two backups, and what the next one makes of it

Written by the test TestActions, which does each of these on a real host with ` + "`virsh`, `qemu-img`, `qemu-io` and `cp`" + `, and has
QEMU compare each backup of the chain with what the disks held. This writes it anew:

    make build && testdata/lab/run -- go test -tags lab ./daemon/labtest -run TestActions -args -update

The domain has two disks or three of 8 MiB that hold 4 MiB. After its last increment the guest writes to all of them; then a thing is
done to the first one; and if the domain runs after that, the guest writes again. Its image in the next backup is an increment *by
bitmap*, which holds what the bitmap says; an increment *by overlay*, which holds what is in the overlay that the last backup made; an
increment *by comparison*, for which all of the disk was read and what differs from the last backup stored; or it is *whole*.

"Beneath qcow2" is what a program does that does not know of bitmaps. For a loss of power QEMU, libvirtd and virtbackupd are killed at
once, what libvirt keeps in /run is removed, and the host has another boot id when they come back; what the kernel had not written is
not lost.

While a domain has an internal snapshot its disks carry no bitmap, with which QEMU would not revert to it. They are removed when
virtbackupd sees the snapshot, and before QEMU is started for a revert. One case is left: of a domain that is off, libvirt has
qemu-img revert at once and asks nobody; a script that makes a snapshot and reverts to it within some 100 ms may be refused, and has
to do it again.

| Done to the disk | Domain before | Domain at the next backup | Image | Cause | Read, KiB | Stored, KiB | Other disks |
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
	if r.says != "" {
		name += ", " + r.says
	}
	if r.offline {
		name += ", parent made off"
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
	defer h.tellMarks(s)
	c := &watched{host: h, scene: s, settings: r.settings}
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
	if r.offline {
		s.bring(off)
	}
	c.take()
	s.bring(running)
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
	if next == running {
		c.foretold(r.verdict(next))
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
		case d.Target == first, r.all:
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
var images = map[string]string{"cbt": "by bitmap", "digest": "by comparison", "snapshot": "by overlay", "full": "whole"}

// line is that of the table.
func (r row) line(b dbus.BackupProperties, next, state string) string {
	shown := first
	if r.more != none {
		shown = more
	}
	var verdict string
	others := map[string]bool{}
	for _, d := range b.Disks {
		how, cause, _ := strings.Cut(verdictOf(d), " ")
		if d.Target != shown {
			others[strings.TrimSuffix(images[how]+": "+cause, ": ")] = true
			continue
		}
		verdict = fmt.Sprintf("%s | %s | %d | %d", images[how], cause, d.ReadBytes>>10, d.DataBytes>>10)
	}
	does := r.does
	if r.before != "" {
		does += " (after " + r.before + " and a backup)"
	}
	if r.offline {
		does += " (the backup before it made while the domain was off)"
	}
	if r.says != "" {
		does += " (" + r.says + ")"
	}
	return fmt.Sprintf("| %s | %s | %s | %s | %s |\n", does, state, next, verdict, strings.Join(slices.Sorted(maps.Keys(others)), ", "))
}

func writeTable(t *testing.T, lines []*string) {
	table := tableHead
	for _, line := range lines {
		if *line == "" {
			t.Fatal("a row failed, or was not chosen by -run: TRACKING.md stays as it is")
		}
		table += *line
	}
	if err := os.WriteFile(theTable, []byte(table), 0o644); err != nil {
		t.Fatal(err)
	}
}

// watched is a scene, the chain of its backups, and what the disks held at each.
type watched struct {
	*host
	*scene
	backups  []dbus.BackupProperties
	held     []snapshot
	settings dbus.Settings
}

// write has the guest write to all disks: where nothing was, and over what was.
func (c *watched) write(n int) {
	c.scene.t.Helper()
	for _, d := range c.disks() {
		c.io(d.target, fmt.Sprintf("write -P %d %dk 128k", n, 64*n), fmt.Sprintf("write -P %d %dk 4k", n+100, 6<<10+64*n),
			fmt.Sprintf("discard %dk 64k", 1<<10+64*n))
	}
}

// foretold waits until people are told why the disk will not be an increment by
// its bitmap, if that was seen while nobody asked.
func (c *watched) foretold(verdict string) {
	c.t.Helper()
	cause := strings.TrimPrefix(verdict, "digest ")
	if !slices.Contains([]string{changed, unseen, restarted}, verdict) {
		return
	}
	eventually(c.t, "people are told that "+first+" is "+cause, func() error {
		told, err := c.DomainTracking(c.t.Context(), c.uuid)
		for _, d := range told {
			if d.Target == first && d.Offering == c.offering && d.Cause == cause && d.Tracking == dbus.TrackingDigest {
				return nil
			}
		}
		return errors.Join(err, fmt.Errorf("they are told %+v", told))
	})
}

// tellMarks tells, of a test that failed, what the daemon saw of the disks.
func (h *host) tellMarks(s *scene) {
	if !h.t.Failed() {
		return
	}
	marks, err := h.DomainMarks(h.t.Context(), s.uuid, 0)
	h.t.Logf("the daemon saw %+v %v", marks, err)
}

// take makes a backup.
func (c *watched) take() dbus.BackupProperties {
	c.t.Helper()
	c.held = append(c.held, c.snapshot())
	b := c.backup(c.guest, dbus.BackupOptions{Settings: c.settings})
	c.backups = append(c.backups, b)
	return b
}

// allExact compares every backup with what the disks held, and restores the last.
func (c *watched) allExact() {
	c.t.Helper()
	for i, b := range c.backups {
		c.chainIsExact(b, c.held[i])
	}
	last := len(c.backups) - 1
	c.restoreIsExact(c.backups[last], c.held[last])
}
