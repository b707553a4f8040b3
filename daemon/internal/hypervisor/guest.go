package hypervisor

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"libvirt.org/go/libvirt"
)

// FilesystemStatus is the guest agent's word on its filesystems.
type FilesystemStatus string

// What guest-fsfreeze-status answers.
const (
	Thawed FilesystemStatus = "thawed"
	Frozen FilesystemStatus = "frozen"
)

// agentTimeout is how long libvirt waits for the agent when the context has no
// deadline. libvirt's own default is to wait for ever.
const agentTimeout = 10 * time.Second

// agentSeconds is the timeout to tell libvirt, in whole seconds, at least one:
// less than what is left of the context, so that it is libvirt that gives up,
// and knows the order of its commands.
func agentSeconds(ctx context.Context) int {
	left := agentTimeout
	if deadline, ok := ctx.Deadline(); ok {
		left = min(left, time.Until(deadline))
	}
	return max(1, int((left-1)/time.Second))
}

// withAgent calls fn after limiting libvirt's wait for the agent. libvirt keeps
// that limit for the domain.
func (h *Hypervisor) withAgent(ctx context.Context, uuid, op string, fn func(*libvirt.Domain) error) error {
	return h.onDomain(ctx, uuid, op, func(d *libvirt.Domain) error {
		active, err := d.IsActive()
		if err != nil {
			return err
		}
		if !active {
			return ErrNotRunning
		}
		if err := d.AgentSetResponseTimeout(agentSeconds(ctx), 0); err != nil {
			return agentError(err)
		}
		return agentError(fn(d))
	})
}

// agentError marks the errors of a domain that has no agent configured, and
// what the agent itself refuses, which libvirt calls an internal error.
func agentError(err error) error {
	switch {
	case broken(err):
		return err
	case isCode(err, libvirt.ERR_ARGUMENT_UNSUPPORTED), isCode(err, libvirt.ERR_CONFIG_UNSUPPORTED):
		return fmt.Errorf("%w: %s", ErrNoAgent, err.Error())
	case isCode(err, libvirt.ERR_INTERNAL_ERROR):
		return fmt.Errorf("%w: %s", ErrAgent, err.Error())
	}
	return err
}

// Freeze freezes all filesystems in the guest. When it fails or times out the
// agent may still do it later: Thaw until FSStatus says Thawed.
func (h *Hypervisor) Freeze(ctx context.Context, uuid string) error {
	return h.withAgent(ctx, uuid, "freeze the filesystems of", func(d *libvirt.Domain) error { return d.FSFreeze(nil, 0) })
}

// Thaw thaws all filesystems in the guest. A guest that is not frozen stays so.
func (h *Hypervisor) Thaw(ctx context.Context, uuid string) error {
	return h.withAgent(ctx, uuid, "thaw the filesystems of", func(d *libvirt.Domain) error { return d.FSThaw(nil, 0) })
}

// FSStatus asks the agent whether the filesystems are frozen. The agent works
// off its commands in order, so the answer counts for all that came before.
func (h *Hypervisor) FSStatus(ctx context.Context, uuid string) (FilesystemStatus, error) {
	var status FilesystemStatus
	err := h.withAgent(ctx, uuid, "ask for the state of the filesystems of", func(d *libvirt.Domain) error {
		text, err := d.QemuAgentCommand(`{"execute":"guest-fsfreeze-status"}`, libvirt.DomainQemuAgentCommandTimeout(agentSeconds(ctx)), 0)
		if err != nil {
			return err
		}
		status, err = parseStatus(text)
		return err
	})
	return status, err
}

// parseStatus reads the agent's answer, which the guest may have forged: it is
// one of two words, or an error.
func parseStatus(text string) (FilesystemStatus, error) {
	var answer struct {
		Return FilesystemStatus `json:"return"`
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		return "", fmt.Errorf("%w: it gave an answer that is not JSON", ErrAgent)
	}
	if answer.Return != Thawed && answer.Return != Frozen {
		return "", fmt.Errorf("%w: it gave an unknown state of the filesystems", ErrAgent)
	}
	return answer.Return, nil
}

// Suspend pauses a running domain.
func (h *Hypervisor) Suspend(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, "suspend", func(d *libvirt.Domain) error { return d.Suspend() })
}

// Resume lets a paused domain go on.
func (h *Hypervisor) Resume(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, "resume", func(d *libvirt.Domain) error { return d.Resume() })
}
