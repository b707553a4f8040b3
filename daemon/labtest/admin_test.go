//go:build lab

package labtest

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/dbus"
)

// whileRunning and whileOff are what an admin does to a running domain and to
// one that is off, in an order in which each can be done. Before each of them
// the protected domain is backed up.
var (
	whileRunning = []string{
		internalSnapshot, "snapshot-revert", "snapshot-delete",
		"suspend, resume", "reset", "destroy, start", "SIGKILL of QEMU", "save, restore", "managedsave, start",
		"managedsave, edited by qemu-io, managedsave-remove", "libvirtd restarted",
		"attach-device --live", "detach-disk", "detach-disk, attach the same", "detach-disk, attach another", "change-media", "blockresize",
		externalSnapshot, "blockcommit --pivot", externalSnapshot, "blockpull",
		"two external snapshots, the middle layer pulled", "blockpull",
		"two external snapshots, the middle layer committed", "blockcommit --pivot", "blockcopy --pivot",
		"undefine, define while it runs",
	}
	whileOff = []string{
		"qemu-img resize", internalSnapshot + " of the domain that is off", "snapshot-revert", "snapshot-delete",
		externalSnapshot + " of the domain that is off", "qemu-img rebase onto nothing",
		externalSnapshot + " of the domain that is off", "qemu-img commit, and the overlay taken out",
		"attach-device --config", "detach-disk --config", "another disk in the definition", "used by another domain",
		"undefine, define", "undefine --checkpoints-metadata, define", "rename",
	}
	// alone are what else an admin does, that changes no disk.
	alone = map[string][]action{
		running: {
			{name: "snapshot-create-as, snapshot-revert at once, snapshot-delete", do: func(s *scene, _ string) {
				s.virsh("snapshot-create-as", s.name, "quick")
				s.virsh("snapshot-revert", s.name, "quick")
				s.virsh("snapshot-delete", s.name, "quick")
			}},
			{name: "SIGKILL of QEMU, start, blockresize", do: func(s *scene, target string) {
				s.end("-KILL")
				s.isOff()
				s.virsh("start", s.name)
				s.virsh("blockresize", s.name, target, "12M")
			}},
			{name: "checkpoint-list", do: func(s *scene, _ string) { s.virsh("checkpoint-list", s.name) }},
			{name: "migrate", do: func(s *scene, _ string) { s.virsh("migrate", "--live", s.name, "qemu:///system") }},
			{name: "domrename of a running domain", do: func(s *scene, _ string) { s.virsh("domrename", s.name, s.name+"-x") }},
		},
		off: {
			{name: "snapshot-create-as, snapshot-revert, snapshot-delete", do: func(s *scene, _ string) {
				s.virsh("snapshot-create-as", s.name, "quick")
				// libvirt asks nobody before it has qemu-img revert. The daemon sees that there is a
				// snapshot some 100 ms after it is made.
				eventually(s.t, "no bitmap is left", func() error {
					if left := s.offlineBitmaps(first); len(left) > 0 {
						return fmt.Errorf("there is %v", left)
					}
					return nil
				})
				s.virsh("snapshot-revert", s.name, "quick")
				s.virsh("snapshot-delete", s.name, "quick")
			}},
			{name: "checkpoint-list", do: func(s *scene, _ string) { s.virsh("checkpoint-list", s.name) }},
			{name: "start, shutdown, destroy", do: func(s *scene, _ string) {
				s.virsh("start", s.name)
				s.virsh("shutdown", s.name)
				s.virsh("destroy", s.name)
			}},
		},
	}
)

// TestNothingIsTakenAway does what an admin does to a domain that is backed up,
// and to its like that is not: virsh ends with the same status and says the same.
func TestNothingIsTakenAway(t *testing.T) {
	h := newHost(t)
	for state, names := range map[string][]string{running: whileRunning, off: whileOff} {
		t.Run(state, func(t *testing.T) {
			actions := slices.Clone(alone[state])
			for _, name := range names {
				a, _ := chosen(name)
				actions = append(actions, a)
			}
			protected, plain := newScene(t, 2, 0), newScene(t, 2, 0)
			for _, a := range actions {
				t.Run(a.name, func(t *testing.T) { h.in(t).compareAdmin(a, state, protected.in(t), plain.in(t)) })
			}
		})
	}
}

// in has a scene report to a part of a test.
func (s *scene) in(t *testing.T) *scene {
	s.t = t
	return s
}

// compareAdmin does an action to both domains.
func (h *host) compareAdmin(a action, state string, protected, plain *scene) {
	protected.bring(state)
	if state == running {
		protected.io(first, "write -P 33 3M 64k")
	}
	h.backup(protected.guest, dbus.BackupOptions{})
	var said [2]string
	for i, s := range []*scene{plain, protected} {
		s.bring(state)
		s.told, s.lenient = nil, true
		if a.can != nil && !a.can(s, first) {
			h.t.Fatalf("it cannot be done to %s", s.name)
		}
		a.do(s, first)
		s.lenient = false
		said[i] = s.said()
	}
	if protected.state() != plain.state() {
		h.t.Errorf("the protected domain is %s then, the other %s", protected.state(), plain.state())
	}
	if diff := cmp.Diff(said[0], said[1]); diff != "" {
		h.t.Errorf("virsh says to a domain without (-) and with backups (+):\n%s", diff)
	}
}

// said is what virsh said, without what tells one domain from another.
func (s *scene) said() string {
	var all []string
	for _, line := range s.told {
		if strings.HasPrefix(line, "virsh dumpxml") {
			continue
		}
		line = strings.NewReplacer(s.directory, "DIRECTORY", filepath.Base(s.directory), "NAME", s.uuid, "UUID").Replace(line)
		all = append(all, itsOwn.ReplaceAllString(line, "…"))
	}
	return strings.Join(all, "\n")
}

// itsOwn is what differs from one run of QEMU to another: times, and names of
// block nodes.
var itsOwn = regexp.MustCompile(`libvirt-[0-9]+-|[0-9]{4}-[0-9-]{5}T[0-9:.]+Z`)
