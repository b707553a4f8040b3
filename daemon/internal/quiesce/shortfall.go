package quiesce

import (
	"errors"
	"fmt"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

// nothingToFreeze is the Shortfall of a guest whose agent did as it was asked.
const nothingToFreeze = "the guest has no filesystem to freeze"

var (
	errWatchdog = errors.New("cannot start the thaw watchdog")
	errLetGo    = errors.New("the guest was let go on before the point in time was fixed")
)

// notRunningError says that a guest is in no state to be held.
type notRunningError struct{ state, reason string }

func (e *notRunningError) Error() string {
	switch {
	case e.state == hypervisor.StatePaused && e.reason == hypervisor.ReasonPausedBy:
		return "the domain was paused by its admin"
	case e.reason == "":
		return "the domain is " + e.state
	}
	return fmt.Sprintf("the domain is %s (%s)", e.state, e.reason)
}

// shortfall says in our words why a guest was not held: what libvirt says may
// hold what a guest made up.
func shortfall(err error) string {
	if e := (*notRunningError)(nil); errors.As(err, &e) {
		return e.Error()
	}
	for _, known := range []struct {
		err error
		why string
	}{
		{errBusy, errBusy.Error()},
		{errWatchdog, errWatchdog.Error()},
		{errLetGo, errLetGo.Error()},
		{hypervisor.ErrNoAgent, "no guest agent is configured"},
		{hypervisor.ErrAgentSilent, "the guest agent does not answer"},
		{hypervisor.ErrAgent, "the guest agent refused"},
		{hypervisor.ErrUnavailable, "the guest did not stop in time"},
	} {
		if errors.Is(err, known.err) {
			return known.why
		}
	}
	return ErrHold.Error()
}

// judge notes what a point in time is worth that was fixed while the guest was
// held: still says whether it was to the end.
func (r *Result) judge(still error, mode Mode) {
	switch {
	case still != nil:
		r.Shortfall = shortfall(still)
	case mode == Suspend:
		r.Consistency = Suspended
	default:
		r.Consistency = Filesystem
	}
}
