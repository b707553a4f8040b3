package hypervisor

import (
	"context"
	"encoding/base64"
	"encoding/json"
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
	for {
		var now struct {
			Exited       bool   `json:"exited"`
			ExitCode     int    `json:"exitcode"`
			Signal       int    `json:"signal"`
			Out          string `json:"out-data"`
			Err          string `json:"err-data"`
			OutTruncated bool   `json:"out-truncated"`
			ErrTruncated bool   `json:"err-truncated"`
		}
		if err := h.askAgent(ctx, uuid, "ask for a program in", "guest-exec-status", map[string]int{"pid": started.PID}, &now); err != nil {
			return Executed{}, err
		}
		if now.Exited {
			out, err1 := base64.StdEncoding.DecodeString(now.Out)
			errors, err2 := base64.StdEncoding.DecodeString(now.Err)
			if err1 != nil || err2 != nil {
				return Executed{}, fmt.Errorf("%w: it gave output that is not base64", ErrAgent)
			}
			return Executed{now.ExitCode, now.Signal, out, errors, now.OutTruncated || now.ErrTruncated}, nil
		}
		select {
		case <-ctx.Done():
			return Executed{}, context.Cause(ctx)
		case <-time.After(execPoll):
		}
	}
}
