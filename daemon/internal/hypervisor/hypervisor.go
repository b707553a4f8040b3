// Package hypervisor knows libvirt: it is the only package that imports it. It
// looks up domains, fixes points in time (pull mode backups with a
// checkpoint), keeps checkpoints, talks to the guest agent, rebuilds domain
// definitions from an allow-list, and reports events. Of domains that are off it
// reads and changes the images, by qemu-img. Everything it returns is a plain Go
// value.
//
// libvirt calls block in C and cannot be interrupted. Each one runs in a
// goroutine of its own: when its context ends first, the caller gets an error
// at once, and the abandoned call ends whenever libvirtd answers or the
// connection breaks.
//
// libvirt's event loop is one per process. The first Connect registers the
// default implementation and runs it for the life of the process; nothing else
// in the process may register another.
package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"libvirt.org/go/libvirt"
)

var (
	// ErrNoDomain says that libvirt knows no such domain.
	ErrNoDomain = errors.New("no such domain")
	// ErrDomainExists says that a domain with that name or UUID is there already.
	ErrDomainExists = errors.New("a domain with this name or UUID exists already")
	// ErrNotRunning says that the operation needs a running domain.
	ErrNotRunning = errors.New("the domain is not running")
	// ErrNoCheckpoint says that libvirt knows no such checkpoint.
	ErrNoCheckpoint = errors.New("no such checkpoint")
	// ErrCheckpointBroken says that a checkpoint's bitmap is missing or inconsistent.
	ErrCheckpointBroken = errors.New("the checkpoint's bitmap is missing or inconsistent")
	// ErrAgent says that the guest agent is missing, does not answer, or refused.
	ErrAgent = errors.New("the guest agent did not do it")
	// ErrNoAgent is the ErrAgent of a domain that has none in its definition.
	ErrNoAgent = fmt.Errorf("%w: none is configured", ErrAgent)
	// ErrAgentSilent is the ErrAgent of one that does not answer.
	ErrAgentSilent = fmt.Errorf("%w: it does not answer", ErrAgent)
	// ErrForeignJob says that a backup job is active that is not ours.
	ErrForeignJob = errors.New("a backup job that virtbackup did not start is active")
	// ErrUnavailable says that libvirt could not be reached, or did not answer in time.
	ErrUnavailable = errors.New("libvirt does not answer")
	// ErrDisconnected is the ErrUnavailable of one to which there is no connection, or
	// to which it broke: it is libvirt that was away, whatever was asked.
	ErrDisconnected = fmt.Errorf("%w: there is no connection to it", ErrUnavailable)
)

// runEventLoop starts libvirt's event loop, once in a process. It never ends,
// because libvirt offers no way to unregister an implementation.
var runEventLoop = sync.OnceValue(func() error {
	if err := libvirt.EventRegisterDefaultImpl(); err != nil {
		return fmt.Errorf("cannot register libvirt's event loop: %w", err)
	}
	go func() {
		for {
			if err := libvirt.EventRunDefaultImpl(); err != nil {
				slog.Default().Error("libvirt's event loop failed", "error", err)
			}
		}
	}()
	return nil
})

// Hypervisor is a connection to libvirt that survives restarts of libvirtd.
// Its methods may be called from many goroutines at once.
type Hypervisor struct {
	uri  string
	log  *slog.Logger
	subs subscribers

	mu      sync.Mutex
	current *connection   // nil while there is none
	changed chan struct{} // closed and replaced whenever current changes

	stop context.CancelFunc
	done chan struct{}
}

// withConnect runs one libvirt call, named op in errors, and gives up waiting
// when ctx ends. fn owns what it makes: a value that arrives too late is
// dropped, so fn must return plain values and free libvirt objects itself.
func withConnect[T any](ctx context.Context, h *Hypervisor, op string, fn func(*libvirt.Connect) (T, error)) (T, error) {
	var zero T
	conn, err := h.acquire(ctx)
	if err != nil {
		return zero, fmt.Errorf("cannot %s: %w", op, err)
	}
	if ctx.Err() != nil { // a call that nobody waits for must not be begun
		release(conn)
		return zero, fmt.Errorf("cannot %s: %w", op, context.Cause(ctx))
	}
	type answer struct {
		value T
		err   error
	}
	ch := make(chan answer, 1)
	go func() {
		defer release(conn)
		v, err := fn(conn)
		ch <- answer{v, err}
	}()
	select {
	case a := <-ch:
		if a.err != nil {
			return zero, fmt.Errorf("cannot %s: %w", op, classify(a.err))
		}
		return a.value, nil
	case <-ctx.Done():
		return zero, fmt.Errorf("cannot %s: %w: gave up waiting (the call may still take effect): %w", op, ErrUnavailable, context.Cause(ctx))
	}
}

// withDomain is withConnect for one domain, found by its UUID.
func withDomain[T any](ctx context.Context, h *Hypervisor, uuid, op string, fn func(*libvirt.Domain) (T, error)) (T, error) {
	return withConnect(ctx, h, op+" domain "+uuid, func(c *libvirt.Connect) (T, error) {
		d, err := c.LookupDomainByUUIDString(uuid)
		if err != nil {
			var zero T
			return zero, err
		}
		defer freeDomain(d)
		return fn(d)
	})
}

// onDomain is withDomain for calls that return nothing but an error.
func (h *Hypervisor) onDomain(ctx context.Context, uuid, op string, fn func(*libvirt.Domain) error) error {
	_, err := withDomain(ctx, h, uuid, op, func(d *libvirt.Domain) (struct{}, error) { return struct{}{}, fn(d) })
	return err
}

func freeDomain(d *libvirt.Domain) { _ = d.Free() }

// classify adds the sentinel that belongs to a libvirt error, when there is one.
func classify(err error) error {
	var lv libvirt.Error
	if !errors.As(err, &lv) {
		return err
	}
	sentinel := map[libvirt.ErrorNumber]error{
		libvirt.ERR_NO_DOMAIN:               ErrNoDomain,
		libvirt.ERR_NO_DOMAIN_CHECKPOINT:    ErrNoCheckpoint,
		libvirt.ERR_CHECKPOINT_INCONSISTENT: ErrCheckpointBroken,
		libvirt.ERR_AGENT_UNRESPONSIVE:      ErrAgentSilent,
		libvirt.ERR_AGENT_UNSYNCED:          ErrAgentSilent,
		libvirt.ERR_AGENT_COMMAND_TIMEOUT:   ErrAgentSilent,
		libvirt.ERR_AGENT_COMMAND_FAILED:    ErrAgent,
		libvirt.ERR_NO_CONNECT:              ErrDisconnected,
		libvirt.ERR_RPC:                     ErrDisconnected,
	}[lv.Code]
	if broken(err) {
		sentinel = ErrDisconnected
	}
	if sentinel == nil {
		return fmt.Errorf("libvirt: %s (code %d)", lv.Message, int(lv.Code))
	}
	return fmt.Errorf("%w: libvirt: %s (code %d)", sentinel, lv.Message, int(lv.Code))
}

// broken tells whether err is that of a call whose connection broke, or was
// closed already (virnetclient.c, virnetsocket.c).
func broken(err error) bool {
	var lv libvirt.Error
	return errors.As(err, &lv) && lv.Domain == libvirt.FROM_RPC &&
		(lv.Code == libvirt.ERR_INTERNAL_ERROR || lv.Code == libvirt.ERR_SYSTEM_ERROR)
}

// isCode tells whether err is libvirt's error of that number.
func isCode(err error, code libvirt.ErrorNumber) bool {
	var lv libvirt.Error
	return errors.As(err, &lv) && lv.Code == code
}
