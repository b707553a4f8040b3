//go:build hosts

package hosttest

import (
	"fmt"
	"os"
	"sync"
	"testing"
)

// TestTwoHostsOnOneShare has two hosts back up to the same repository at the
// same time, and one lose its power in the middle: neither takes anything of
// the other's away.
func TestTwoHostsOnOneShare(t *testing.T) {
	share, err := os.MkdirTemp("/var/tmp", "share-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(share) })
	hosts := map[string]*host{"one": newHost(t, "one", share), "two": newHost(t, "two", share)}
	held := map[string]versions{}
	for name, h := range hosts {
		held[name] = versions{}
		h.run("lab-domain", "create", name, "--disk", "qcow2:16M")
		if err := held[name].write(h, name); err != nil {
			t.Fatal(err)
		}
		h.ctl("repository", "add", "share", share, "--minimum-free", "0")
		h.ctl("offering", "create", "shared", "--repository", "share", "--quiesce", "none", "--chain-size", "0", "--keep-last", "2")
		eventually(t, name+" is known", func() error { _, err := h.try("virtbackupctl", "domain", "assign", name, "shared"); return err })
	}
	backUp := func(name string, rounds int) error {
		for range rounds {
			err := held[name].write(hosts[name], name)
			if err == nil {
				_, err = hosts[name].try("virtbackupctl", "backup", name)
			}
			if err != nil {
				return fmt.Errorf("host %s: %w", name, err)
			}
		}
		return nil
	}
	both := func(rounds int) {
		t.Helper()
		var all sync.WaitGroup
		for name := range hosts {
			all.Go(func() {
				if err := backUp(name, rounds); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	both(3)
	// In the middle of a backup of the other's.
	var other sync.WaitGroup
	other.Go(func() {
		if err := backUp("two", 3); err != nil {
			t.Error(err)
		}
	})
	hosts["one"].ctl("backup", "one", "--no-block")
	hosts["one"].reboot("--hard")
	other.Wait()
	hosts["one"].idle()
	both(3)
	for name, h := range hosts {
		h.idle()
		points := h.list(name, "share")
		if len(points) != 2 {
			t.Errorf("host %s has %d points: %+v", name, len(points), points)
		}
		for i, b := range points {
			if n := held[name].restored(h, b); n >= 0 && n != len(held[name][name])-2+i {
				t.Errorf("point %d of host %s holds version %d of %d", i, name, n, len(held[name][name]))
			}
		}
		if left := h.script(`ls -A "$1/.staging" 2>/dev/null || true`, share); left != "" {
			t.Errorf("host %s leaves %s in the share", name, left)
		}
	}
}
