//go:build lab

package labtest

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"
)

// TestDaemonAway has a guest started and stopped, and its disks edited between,
// while the daemon is stopped or hangs: the guest does as it is told, and when
// the daemon is back it has all records, and says what happened to each disk.
func TestDaemonAway(t *testing.T) {
	for name, away := range map[string]func(s *scene, do func()){
		"stopped": (*scene).withoutDaemon, "hung": (*scene).withHungDaemon,
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, 3, 0)
			c := &watched{host: newHost(t), scene: s}
			c.write(1)
			before := c.take()
			away(s, func() {
				s.bring(off)
				s.edit("sda", "write -P 2 1M 64k")
				s.bring(running)
				s.bring(off)
				scribble(t, s.disk("sdb"))
				s.bring(running)
				c.write(3)
			})
			eventually(t, "the daemon has read what the hook wrote", func() error {
				left, err := filepath.Glob(filepath.Join(theSpool, "*.json"))
				if err == nil && len(left) > 0 {
					err = fmt.Errorf("there is %v", left)
				}
				return err
			})
			marks, err := c.DomainMarks(t.Context(), s.uuid, 0)
			if err != nil {
				t.Fatal(err)
			}
			var seen []string
			for _, m := range slices.Backward(marks) {
				if m.Time.After(before.Created) {
					seen = append(seen, m.Target+" "+m.Cause)
				}
			}
			if want := []string{"sda changed-while-off", "sdb changed-while-off"}; !slices.Equal(seen, want) {
				t.Errorf("it tells of %q, and not of %q", seen, want)
			}
			b := c.take()
			for _, d := range b.Disks {
				want := changed
				if d.Target == "sdc" {
					want = cbt
				}
				if got := verdictOf(d); got != want {
					t.Errorf("the image of %s is %q and not %q", d.Target, got, want)
				}
			}
			c.allExact()
			s.bring(off)
			c.nothingLeft(s.guest)
		})
	}
}
