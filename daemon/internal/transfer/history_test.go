package transfer

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// workerJob is the job directory of a process that is a worker and nothing else.
const workerJob = "TRANSFER_WORKER_JOB"

// life is a domain with all that happens to its backups over time: retention,
// holds, deletions, and workers that are killed anywhere.
type life struct {
	*history
	past  map[string]map[string]string // what the disks held at each backup ever made
	order []string
	holds map[string]bool
	crash bool // workers may be killed
	kills int
}

// listed returns the backups as the repository has them.
func (l *life) listed() map[string]*repository.Manifest {
	l.Helper()
	all := map[string]*repository.Manifest{}
	for _, b := range l.mustRun(Spec{Operation: OperationList, Domain: testDomain}).Backups {
		if b.Error != nil {
			l.Fatalf("%s is listed, and %v", b.Backup, b.Error)
		}
		all[b.Backup] = b.Manifest
	}
	return all
}

// exact holds every backup that is listed against what the disks held: as QEMU
// reads it, and as a restore does.
func (l *life) exact(where string) {
	l.Helper()
	restored := false
	for id := range l.listed() {
		for target, reference := range l.past[id] {
			out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference, l.image(id, target)).CombinedOutput()
			if err != nil {
				l.Fatalf("%s: disk %s of backup %s: %v: %s", where, target, id, err, out)
			}
		}
		if !restored && l.IntN(2) == 0 {
			restored = true
			l.checkRestored(id, l.past[id])
		}
	}
}

// take makes a backup, an increment if it can be one.
func (l *life) take() {
	l.Helper()
	l.change()
	if l.IntN(8) == 0 {
		l.points = nil // a new chain
	}
	l.backup()
	p := l.points[len(l.points)-1]
	l.past[p.id], l.order = p.held, append(l.order, p.id)
}

// plan has the rules say what goes.
func (l *life) plan() chain.RetentionPlan {
	l.Helper()
	var points []chain.Point
	for id, m := range l.listed() {
		b := chain.Backup{ID: id, Chain: m.Chain, Parent: m.Parent, Kind: chain.Kind(m.Kind), State: chain.Complete}
		points = append(points, chain.Point{Backup: b, Sequence: int64(slices.Index(l.order, id)), Created: time.UnixMicro(m.Created), Hold: l.holds[id]})
	}
	return chain.PlanRetention(points, chain.Retention{Last: 1 + l.IntN(4)}, time.UTC)
}

// prune carries a plan out, as long as nobody is killed.
func (l *life) prune() {
	l.Helper()
	p := l.plan()
	for _, ids := range p.Delete {
		if !l.work(Spec{Operation: OperationDelete, Backups: ids}) {
			return
		}
	}
	for _, m := range p.Merge {
		if !l.work(Spec{Operation: OperationMerge, Merge: &MergeSpec{Into: m.Into, Drop: m.Drop, Base: m.Base}}) {
			return
		}
		if !l.work(Spec{Operation: OperationDelete, Backups: m.Drop}) {
			return
		}
	}
	if len(l.listed()) != len(p.Keep) {
		l.Fatalf("%d are to stay, and %d are there", len(p.Keep), len(l.listed()))
	}
}

// work has a worker do its work, or be killed at some call. Then all that is
// listed must be exact, before and after somebody clears up.
func (l *life) work(s Spec) (done bool) {
	l.Helper()
	if !l.crash || l.IntN(4) == 0 {
		l.mustRun(s)
		l.exact("done")
		return true
	}
	dir := l.job(s)
	kill := []struct {
		call string
		most int // at about so many of them
	}{{"openat2", 60}, {"pwrite64", 3}, {"fsync", 8}, {"renameat", 8}, {"unlinkat", 8}}[l.IntN(5)]
	call, inject := kill.call, fmt.Sprintf("inject=%s:signal=KILL:when=%d", kill.call, 1+l.IntN(kill.most))
	program, err := os.Executable()
	if err != nil {
		l.Fatal(err)
	}
	c := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call, "-e", inject, program)
	c.Env = append(os.Environ(), workerJob+"="+dir)
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	l.Logf("%s %s: %v", s.Operation, inject, err)
	if err == nil {
		l.exact("done")
		return true
	}
	if !errors.As(err, &exit) || exit.ExitCode() > 0 {
		l.Fatalf("%s: %v\n%s", s.Operation, err, out)
	}
	l.kills++
	where := fmt.Sprintf("%s killed at %s", s.Operation, inject)
	l.exact(where)
	l.mustRun(Spec{Operation: OperationProbe, Collect: true, Live: []string{}})
	l.exact(where + ", and cleared up")
	l.checkClean()
	return false
}

// TestAnyHistoryIsExact lets anything happen in any order; TEST_HISTORIES says
// how often.
func TestAnyHistoryIsExact(t *testing.T) {
	seed, runs := uint64(time.Now().UnixNano()), uint64(1)
	if n, err := strconv.ParseUint(os.Getenv("TEST_HISTORIES"), 10, 32); err == nil {
		runs = n
	}
	_, err := exec.LookPath("strace")
	for run := range runs {
		t.Run(fmt.Sprint(seed+run), func(t *testing.T) {
			t.Parallel()
			l := &life{history: newHistory(t, seed+run), past: map[string]map[string]string{}, holds: map[string]bool{}, crash: err == nil}
			for range 9 {
				l.take()
				if n := len(l.order); l.IntN(3) == 0 {
					id := l.order[l.IntN(n)]
					l.holds[id] = !l.holds[id]
				}
				if l.IntN(6) == 0 && !l.holds[l.order[len(l.order)-1]] {
					tip := l.order[len(l.order)-1]
					l.work(Spec{Operation: OperationDelete, Backups: []string{tip}})
					l.points = nil // what is made next is full
				}
				for range 3 { // and again, if somebody was killed
					l.prune()
				}
			}
			t.Logf("%d backups, of which %d are left; %d workers were killed", len(l.order), len(l.listed()), l.kills)
		})
	}
}
