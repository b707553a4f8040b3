package hypervisor

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"libvirt.org/go/libvirt"
)

// Executed is what a program in a guest left, as far as its agent tells.
type Executed struct {
	ExitCode       int
	Signal         int // that ended it; 0 for none
	Stdout, Stderr []byte
	Truncated      bool
}

// execPoll is how often the agent is asked whether a program has ended.
const execPoll = 250 * time.Millisecond

// maximumAnswer bounds an answer of the agent's, in bytes: it keeps 16 MiB of
// each stream of a program (QEMU, qga/commands.c), which become more by base64.
const maximumAnswer = 48 << 20

// ask sends the agent a command and reads its answer.
func (h *Hypervisor) askAgent(ctx context.Context, uuid, op, command string, arguments, answer any) error {
	text, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, arguments})
	if err != nil {
		return err
	}
	return h.withAgent(ctx, uuid, op, func(d *libvirt.Domain) error {
		said, err := d.QemuAgentCommand(string(text), libvirt.DomainQemuAgentCommandTimeout(agentSeconds(ctx)), 0)
		if err != nil {
			return err
		}
		if len(said) > maximumAnswer {
			return fmt.Errorf("%w: its answer has more than %d bytes", ErrAgent, maximumAnswer)
		}
		envelope := struct {
			Return any `json:"return"`
		}{answer}
		if err := json.Unmarshal([]byte(said), &envelope); err != nil {
			return fmt.Errorf("%w: its answer is not what it should be", ErrAgent)
		}
		return nil
	})
}

// PingAgent asks the guest agent for an answer.
func (h *Hypervisor) PingAgent(ctx context.Context, uuid string) error {
	var nothing struct{}
	return h.askAgent(ctx, uuid, "ask the agent of", "guest-ping", nil, &nothing)
}

// GuestSystem is what the agent calls the guest's system, as "debian" or
// "mswindows"; "" if it does not tell.
func (h *Hypervisor) GuestSystem(ctx context.Context, uuid string) (string, error) {
	var answer struct {
		ID string `json:"id"`
	}
	err := h.askAgent(ctx, uuid, "ask for the system of", "guest-get-osinfo", nil, &answer)
	return answer.ID, err
}

// Execute runs a program in the guest, without a shell, until it has ended or ctx has.
func (h *Hypervisor) Execute(ctx context.Context, uuid, path string, arguments []string, input []byte) (Executed, error) {
	type request struct {
		Path    string   `json:"path"`
		Args    []string `json:"arg,omitempty"`
		Input   string   `json:"input-data,omitempty"`
		Capture bool     `json:"capture-output"`
	}
	var started struct {
		PID int `json:"pid"`
	}
	err := h.askAgent(ctx, uuid, "run a program in", "guest-exec", request{path, arguments, base64.StdEncoding.EncodeToString(input), true}, &started)
	if err != nil {
		return Executed{}, err
	}
	return untilExited(ctx, func() (now execStatus, err error) {
		err = h.askAgent(ctx, uuid, "ask for a program in", "guest-exec-status", map[string]int{"pid": started.PID}, &now)
		return now, err
	})
}

// execStatus is what the agent answers to guest-exec-status.
type execStatus struct {
	Exited       bool   `json:"exited"`
	ExitCode     int    `json:"exitcode"`
	Signal       int    `json:"signal"`
	Out          string `json:"out-data"`
	Err          string `json:"err-data"`
	OutTruncated bool   `json:"out-truncated"`
	ErrTruncated bool   `json:"err-truncated"`
}

// untilExited asks for a program until it has ended or ctx has. It may be asked
// for again, so that an agent that is busy once costs nothing.
func untilExited(ctx context.Context, ask func() (execStatus, error)) (Executed, error) {
	for {
		now, err := ask()
		switch {
		case err == nil && now.Exited:
			return now.executed()
		case errors.Is(err, ErrAgentSilent) && ctx.Err() == nil: // next time
		case err != nil:
			return Executed{}, err
		}
		select {
		case <-ctx.Done():
			return Executed{}, context.Cause(ctx)
		case <-time.After(execPoll):
		}
	}
}

func (s execStatus) executed() (Executed, error) {
	stdout, err1 := base64.StdEncoding.DecodeString(s.Out)
	stderr, err2 := base64.StdEncoding.DecodeString(s.Err)
	if err1 != nil || err2 != nil {
		return Executed{}, fmt.Errorf("%w: it gave output that is not base64", ErrAgent)
	}
	return Executed{s.ExitCode, s.Signal, stdout, stderr, s.OutTruncated || s.ErrTruncated}, nil
}
