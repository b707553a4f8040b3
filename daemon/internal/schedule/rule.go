// Package schedule has backups made by themselves: it keeps the timers of
// schedules as the catalog says, decides what becomes of each run that is due,
// and remembers what became of it.
//
// A run starts when it is due, unless something is in its way. What may go away
// by itself, as the last run that still goes on or a repository that is away,
// has a run skipped or wait, as the schedule says; what will not, as a domain
// that is gone, has it skipped. At most one run goes on and one waits, so that
// nothing piles up, and each has its reason kept.
package schedule

import (
	"fmt"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
)

// Obstacle is why no run can start.
type Obstacle struct {
	Reason  string
	Passing bool // it may go away by itself
}

// decide says what becomes of a run that is due: whether it starts (RunRunning),
// waits or is skipped, and why. unfinished are the runs of the schedule that go on or wait.
func decide(s catalog.Schedule, unfinished []catalog.ScheduleRun, o *Obstacle) (catalog.RunState, string) {
	running, waiting := find(unfinished, catalog.RunRunning), find(unfinished, catalog.RunWaiting)
	if running != nil {
		o = &Obstacle{fmt.Sprintf("the run of %s still goes on", moment(running.Created)), true}
	}
	switch {
	case o == nil && waiting == nil:
		return catalog.RunRunning, ""
	case waiting != nil:
		return catalog.RunSkipped, fmt.Sprintf("the run of %s waits already: %s", moment(waiting.Created), waiting.Reason)
	case o.Passing && s.Overlap == catalog.OverlapQueue:
		return catalog.RunWaiting, o.Reason
	}
	return catalog.RunSkipped, o.Reason
}

func find(runs []catalog.ScheduleRun, state catalog.RunState) *catalog.ScheduleRun {
	for i := range runs {
		if runs[i].State == state {
			return &runs[i]
		}
	}
	return nil
}

func moment(t time.Time) string { return t.Local().Format(time.DateTime) }

// toldFailures is how many jobs of a run are told why they failed; the jobs tell themselves, too.
const toldFailures = 3

// outcome says how a run ended of which these are the jobs; false: one goes on.
func outcome(jobs []catalog.Job, name func(uuid string) string) (state catalog.RunState, reason string, ended bool) {
	var failed, cancelled []string
	tell := func(j catalog.Job, what string) string {
		if j.Domain == "" { // a group, which tells of its own
			return what
		}
		return name(j.Domain) + ": " + what
	}
	for _, j := range jobs {
		switch {
		case !j.State.Ended():
			return catalog.RunRunning, "", false
		case j.State == catalog.JobFailed:
			failed = append(failed, tell(j, j.ErrorMessage))
		case j.State == catalog.JobCancelled:
			cancelled = append(cancelled, tell(j, "cancelled"))
		}
	}
	ends := append(failed, cancelled...)
	switch {
	case len(ends) == 0:
		return catalog.RunSucceeded, "", true
	case len(failed) == 0:
		state = catalog.RunCancelled
	default:
		state = catalog.RunFailed
	}
	more := ""
	if len(ends) > toldFailures {
		more = fmt.Sprintf("; and %d more", len(ends)-toldFailures)
		ends = ends[:toldFailures]
	}
	if len(jobs) == 1 {
		return state, ends[0], true
	}
	return state, fmt.Sprintf("%d of %d backups were not made: %s%s", len(failed)+len(cancelled), len(jobs), strings.Join(ends, "; "), more), true
}

// reasons joins what is to be told, without what is empty.
func reasons(all ...string) string {
	var told []string
	for _, r := range all {
		if r != "" {
			told = append(told, r)
		}
	}
	return strings.Join(told, "; ")
}
