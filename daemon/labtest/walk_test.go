//go:build lab

package labtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// walkSteps is how many things happen to a domain of the walk before another
// one takes its place, and how many of them make a short walk.
const walkSteps = 40

// TestRandomWalk does anything to domains of several kinds, in any state and
// order, with backups to two repositories in between. Each backup holds what
// the disks held at its point in time, then and later. TEST_WALK_TIME says for
// how long ("30m"), TEST_WALK_SEED which walk; a failure tells the seed and all
// that was done.
func TestRandomWalk(t *testing.T) {
	duration, err := time.ParseDuration(orElse(os.Getenv("TEST_WALK_TIME"), "0s"))
	if err != nil {
		t.Fatal(err)
	}
	seed, err := strconv.ParseUint(orElse(os.Getenv("TEST_WALK_SEED"), fmt.Sprint(time.Now().UnixNano())), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	begun, figures := time.Now(), walkFigures{backups: map[string]int{}, actions: map[string]int{}}
	for more := true; more; more = time.Since(begun) < duration {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { newWalk(t, seed, &figures).walk() }) {
			break
		}
		seed++
	}
	t.Logf("%v; %v", time.Since(begun).Round(time.Second), figures)
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// walkFigures counts what was done.
type walkFigures struct {
	domains, writes, compared, restored int
	read, stored                        uint64
	actions                             map[string]int
	backups                             map[string]int // by how the changes of a disk were found
}

func (f walkFigures) String() string {
	actions := 0
	for _, n := range f.actions {
		actions += n
	}
	return fmt.Sprintf("%d domains, %d actions of %d kinds, %d writes; images by verdict: %v; %d backups compared, %d restored; %d MiB read, %d MiB stored",
		f.domains, actions, len(f.actions), f.writes, f.backups, f.compared, f.restored, f.read>>20, f.stored>>20)
}

// walk is a domain to which anything is done.
type walk struct {
	*scene
	*rand.Rand
	*walkFigures
	chains [2]*watched // one for each repository
	did    []string
}

func newWalk(t *testing.T, seed uint64, figures *walkFigures) *walk {
	t.Logf("TEST_WALK_SEED=%d", seed)
	w := &walk{Rand: rand.New(rand.NewPCG(seed, 0)), walkFigures: figures}
	// Two of the disks are qcow2; a raw one keeps libvirt from making internal snapshots.
	w.scene = newScene(t, 2, w.IntN(2))
	for i := range w.chains {
		settings := []dbus.Settings{{}, {}, {}, wholeOtherwise, byComparison, byOverlay}[w.IntN(6)]
		w.chains[i] = &watched{host: newHost(t), scene: w.scene, settings: settings}
		w.note("repository %s: %s", w.chains[i].offering, asked(settings))
	}
	t.Cleanup(func() {
		if t.Failed() {
			for i, step := range w.did {
				t.Logf("%d. %s", i+1, step)
			}
		}
	})
	figures.domains++
	return w
}

// asked is what backups are to be like, for people.
func asked(s dbus.Settings) string {
	switch {
	case s.Fallback != nil:
		return "fallback " + string(*s.Fallback)
	case s.Tracking != nil:
		return "tracking " + string(*s.Tracking)
	}
	return "nothing special"
}

// walk does it.
func (w *walk) walk() {
	defer w.chains[0].tellMarks(w.scene)
	for range walkSteps {
		switch n := w.IntN(10); {
		case n < 4 && w.state() == running:
			w.change()
		case n < 7:
			w.act()
		default:
			w.backup(w.IntN(len(w.chains)))
		}
		if w.t.Failed() {
			return
		}
	}
	for i, c := range w.chains {
		w.backup(i)
		c.allExact()
		w.compared, w.restored = w.compared+len(c.backups), w.restored+1
		c.removeAll()
	}
}

func (w *walk) note(format string, args ...any) { w.did = append(w.did, fmt.Sprintf(format, args...)) }

// target draws a disk.
func (w *walk) target() string {
	disks := w.disks()
	return disks[w.IntN(len(disks))].target
}

// change has the guest write.
func (w *walk) change() {
	target := w.target()
	var commands []string
	for range 1 + w.IntN(3) {
		where := fmt.Sprintf("%d %d", w.IntN(12<<10)*512, (1+w.IntN(1<<w.IntN(10)))*512)
		kinds := []string{fmt.Sprintf("write -P %d ", w.IntN(256)), "write -z ", "write -z -u ", "discard "}
		commands = append(commands, kinds[w.IntN(len(kinds))]+where)
	}
	w.note("%s: %v", target, commands)
	w.writes++
	w.io(target, commands...)
}

// act does one of the actions that can be done now.
func (w *walk) act() {
	state := w.state()
	list := slices.Concat(live, around)
	switch {
	case state != running:
		list = append(slices.Clone(atRest), action{name: "start", do: func(s *scene, _ string) { s.bring(running) }})
	case w.IntN(3) == 0:
		list = []action{{name: "destroy", do: func(s *scene, _ string) { s.bring(off) }}}
	}
	target := w.target()
	for _, i := range w.Perm(len(list)) {
		a := list[i]
		if a.name == "shutdown by the guest" || a.can != nil && !a.can(w.scene, target) {
			continue
		}
		w.note("%s of %s", a.name, target)
		w.actions[a.name]++
		w.copyIsStale(a, target)
		a.do(w.scene, target)
		return
	}
}

// copyIsStale forgets the copy of an image when what it was a copy of is not
// the disk's image any more: put back then, it would be what no admin would do.
func (w *walk) copyIsStale(a action, target string) {
	if slices.Contains([]string{"detach-disk, attach another", "another disk in the definition", "blockcopy --pivot", "blockresize"}, a.name) {
		delete(w.copies, target)
	}
}

// backup makes a backup and compares it, and sometimes all before it.
func (w *walk) backup(repository int) {
	c := w.chains[repository]
	w.note("backup to %s while it is %s", c.offering, w.state())
	b := c.take()
	var verdicts []string
	for _, d := range b.Disks {
		verdicts = append(verdicts, d.Target+": "+verdictOf(d))
		w.backups[verdictOf(d)]++
	}
	w.note("  is %s: %v", b.ID, verdicts)
	w.read, w.stored = w.read+b.ReadBytes, w.stored+b.StoredBytes
	last := len(c.backups) - 1
	switch w.IntN(6) {
	case 0:
		c.restoreIsExact(b, c.held[last])
		w.restored++
	case 1:
		for i, earlier := range c.backups {
			c.chainIsExact(earlier, c.held[i])
		}
		w.compared += len(c.backups)
	default:
		c.chainIsExact(b, c.held[last])
		w.compared++
	}
}

// removeAll makes room in the repository.
func (c *watched) removeAll() {
	c.t.Helper()
	chains := map[string]bool{}
	for _, b := range c.backups {
		chains[b.Chain] = true
	}
	for id := range chains {
		_, job, err := c.DeleteChain(c.t.Context(), id, dbus.DeleteChainOptions{})
		if err = c.outcome(job, err); err != nil {
			c.t.Errorf("cannot delete chain %s: %v", id, err)
		}
	}
}
