package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
	"golang.org/x/time/rate"
)

// Request is one call that somebody made.
type Request struct {
	// Sender is the caller's unique bus name. It, and never a process id, is
	// what polkit judges: a process id may be another process by then
	// (CVE-2013-4288).
	Sender string
	// UID is the caller's user, from the bus.
	UID uint32
	// Method is the full name of the method.
	Method string
	// Details tell a rule what the call is about.
	Details map[string]string
	// Interactive lets polkit ask for a password.
	Interactive bool
}

// Polkit authorizes requests with polkitd.
type Polkit struct {
	conn *godbus.Conn
	log  *slog.Logger
	// Limits of the time that polkitd gets to answer, without and with
	// somebody being asked for a password.
	quick, interactive time.Duration
	// refusals limits how many are logged.
	refusals *rate.Limiter
	// prompts counts the checks that may be cancelled, to name them.
	prompts atomic.Uint64
}

// NewPolkit makes an authorizer that asks the polkitd on the bus of conn. The
// senders to be judged must be on the same bus.
func NewPolkit(conn *godbus.Conn, log *slog.Logger) *Polkit {
	return &Polkit{conn: conn, log: log, quick: 10 * time.Second, interactive: 2 * time.Minute, refusals: rate.NewLimiter(1, 60)}
}

// Authorize returns nil when the request may go on, and dbus.ErrNotAuthorized
// otherwise.
func (p *Polkit) Authorize(ctx context.Context, r Request) error {
	action, ok := actionOf(r.Method)
	switch {
	case !ok:
		p.refused(r, "no action is set for it")
		return dbus.Errorf(dbus.ErrNotAuthorized, "%s is not open to anybody", r.Method)
	case action == ActionNone:
		return nil
	case action == ActionRoot:
		if r.UID != 0 {
			p.refused(r, "it is for root only")
			return dbus.Errorf(dbus.ErrNotAuthorized, "%s is for root only", r.Method)
		}
		return nil
	}
	answer, err := p.check(ctx, action, r)
	if err != nil {
		p.refused(r, fmt.Sprintf("polkit could not be asked about %s: %v", action, err))
		return dbus.Errorf(dbus.ErrNotAuthorized, "polkit could not be asked about %s: is polkitd running?", action)
	}
	if answer.Authorized {
		return nil
	}
	p.refused(r, fmt.Sprintf("polkit does not allow %s", action))
	if answer.Challenge && !r.Interactive {
		return dbus.Errorf(dbus.ErrNotAuthorized, "polkit wants a password for %s, and nobody can be asked here", action)
	}
	return dbus.Errorf(dbus.ErrNotAuthorized, "polkit does not allow %s", action)
}

// refused logs a refusal, unless there were too many of late: somebody without
// any rights must not be able to fill the journal.
func (p *Polkit) refused(r Request, why string) {
	if p.refusals.Allow() {
		p.log.Warn(fmt.Sprintf("refused %s to uid %d: %s", r.Method, r.UID, why), "method", r.Method, "uid", r.UID, "sender", r.Sender)
	}
}

// answer is AuthorizationResult of polkit's D-Bus API.
type answer struct {
	Authorized bool
	Challenge  bool
	Details    map[string]string
}

// subject is Subject of polkit's D-Bus API.
type subject struct {
	Kind    string
	Details map[string]godbus.Variant
}

const (
	polkitName      = "org.freedesktop.PolicyKit1"
	polkitPath      = "/org/freedesktop/PolicyKit1/Authority"
	polkitInterface = "org.freedesktop.PolicyKit1.Authority"
	// allowUserInteraction is the flag AllowUserInteraction.
	allowUserInteraction = uint32(1)
)

// check calls CheckAuthorization. When it is given up, polkit is told to take
// its password prompt away.
func (p *Polkit) check(ctx context.Context, action Action, r Request) (answer, error) {
	limit, flags, cancellation := p.quick, uint32(0), ""
	if r.Interactive {
		limit, flags = p.interactive, allowUserInteraction
		cancellation = fmt.Sprintf("virtbackup-%d", p.prompts.Add(1))
	}
	ctx, stop := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v", limit))
	defer stop()
	details := maps.Clone(r.Details)
	if details == nil {
		details = map[string]string{}
	}
	authority := p.conn.Object(polkitName, polkitPath)
	var a answer
	err := authority.CallWithContext(ctx, polkitInterface+".CheckAuthorization", 0,
		subject{"system-bus-name", map[string]godbus.Variant{"name": godbus.MakeVariant(r.Sender)}},
		string(action), details, flags, cancellation).Store(&a)
	if err == nil {
		return a, nil
	}
	if ctx.Err() != nil && cancellation != "" {
		authority.Go(polkitInterface+".CancelCheckAuthorization", godbus.FlagNoReplyExpected, nil, cancellation)
	}
	return answer{}, errors.Join(err, context.Cause(ctx))
}

// Methods returns the methods that the table knows, sorted.
func Methods() []string { return slices.Sorted(maps.Keys(table())) }
