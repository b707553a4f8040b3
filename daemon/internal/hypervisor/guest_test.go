package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"libvirt.org/go/libvirt"
)

// TestAgentIsAskedAgain has an agent be busy while a program runs.
func TestAgentIsAskedAgain(t *testing.T) {
	silent := fmt.Errorf("cannot ask: %w", ErrAgentSilent)
	other := errors.New("other")
	for name, c := range map[string]struct {
		answers []error // the last one stays; nil: it has ended
		want    error
	}{
		"at once": {[]error{nil}, nil}, "silent for a while": {[]error{silent, silent, silent, nil}, nil},
		"silent for good": {[]error{silent}, context.DeadlineExceeded}, "refused": {[]error{silent, ErrAgent}, ErrAgent},
		"no agent": {[]error{ErrNoAgent}, ErrNoAgent}, "away": {[]error{silent, ErrDisconnected}, ErrDisconnected}, "other": {[]error{other}, other},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+time.Millisecond)
			defer cancel()
			asked := 0
			e, err := untilExited(ctx, func() (execStatus, error) {
				answer := c.answers[min(asked, len(c.answers)-1)]
				asked++
				return execStatus{Exited: answer == nil, ExitCode: 3, Out: "aGk="}, answer
			})
			if !errors.Is(err, c.want) || c.want == nil && (e.ExitCode != 3 || string(e.Stdout) != "hi") || asked < len(c.answers) {
				t.Errorf("%s, asked %d times: %+v, %v", name, asked, e, err)
			}
		})
	}
	if _, err := (execStatus{Exited: true, Err: "?"}).executed(); !errors.Is(err, ErrAgent) {
		t.Errorf("what is no base64 was taken: %v", err)
	}
}

// TestDisconnected tells a libvirt that is away from one that is slow, and from
// an agent that refuses.
func TestDisconnected(t *testing.T) {
	h := &Hypervisor{changed: make(chan struct{}), done: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	err := h.PingAgent(ctx, "aaaaaaaa-bbbb-8ccc-8ddd-eeeeeeeeeeee")
	if !errors.Is(err, ErrDisconnected) || !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without a connection: %v", err)
	}
	for _, c := range []struct {
		err  libvirt.Error
		want bool
	}{
		{libvirt.Error{Domain: libvirt.FROM_RPC, Code: libvirt.ERR_INTERNAL_ERROR, Message: "client socket is closed"}, true},
		{libvirt.Error{Domain: libvirt.FROM_RPC, Code: libvirt.ERR_SYSTEM_ERROR, Message: "Cannot write data: Broken pipe"}, true},
		{libvirt.Error{Domain: libvirt.FROM_RPC, Code: libvirt.ERR_RPC}, true},
		{libvirt.Error{Domain: libvirt.FROM_QEMU, Code: libvirt.ERR_INTERNAL_ERROR, Message: "unable to execute QEMU agent command"}, false},
		{libvirt.Error{Domain: libvirt.FROM_QEMU, Code: libvirt.ERR_AGENT_UNRESPONSIVE}, false},
	} {
		err := classify(agentError(c.err))
		if errors.Is(err, ErrDisconnected) != c.want || errors.Is(err, ErrAgent) == c.want {
			t.Errorf("%v: %v", c.err, err)
		}
	}
	slow := testDriver(t)
	within, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = withConnect(within, slow, "be slow", func(*libvirt.Connect) (struct{}, error) {
		time.Sleep(200 * time.Millisecond)
		return struct{}{}, nil
	})
	if !errors.Is(err, ErrUnavailable) || errors.Is(err, ErrDisconnected) {
		t.Errorf("slow: %v", err)
	}
}
