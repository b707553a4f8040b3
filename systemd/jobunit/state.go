package jobunit

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// State is what systemd knows of a unit at one moment.
type State struct {
	Name string
	// Known is false when systemd has no such unit: it never existed, ended successfully, or was forgotten.
	Known bool
	// Active is systemd's ActiveState: "activating", "active", "deactivating", "inactive", "failed".
	Active string
	// Result is systemd's Result: "success", "exit-code", "signal", "core-dump", "oom-kill", "timeout", …
	Result string
	// Signal ended the main process, or 0. Otherwise it ended with ExitStatus.
	Signal     unix.Signal
	ExitStatus int
	// Processes says that processes are left although the unit has ended: they hang in the kernel.
	Processes bool

	pending bool // a job of systemd's is queued or running
}

// Ended says whether the unit's main process has ended, as far as systemd could make it.
func (s State) Ended() bool {
	return !s.Known || s.Active == "inactive" || s.Active == "failed"
}

// executed says whether a unit that has ended got as far as its program.
func (s State) executed() bool {
	// Statuses from here on are systemd's own, of what it does before; systemd.exec(5), "Process Exit Codes".
	const ofSystemd = 200
	switch s.Result {
	case "exit-code":
		return s.ExitStatus < ofSystemd
	case "signal", "core-dump", "oom-kill":
		return true
	}
	return false
}

// String tells how the unit ended, for people.
func (s State) String() string {
	var how string
	switch {
	case !s.Known:
		return "not known to systemd (any more)"
	case !s.Ended():
		return s.Active
	case s.Processes:
		return "cannot be killed, a process hangs in the kernel"
	case s.Signal != 0:
		how = "killed by " + unix.SignalName(s.Signal)
	default:
		how = fmt.Sprintf("ended with status %d", s.ExitStatus)
	}
	switch s.Result {
	case "success", "signal", "exit-code":
	case "oom-kill":
		how += ", out of memory (oom-kill)"
	case "timeout":
		how += ", a time limit was reached (timeout)"
	default:
		how += " (" + s.Result + ")"
	}
	return how
}

// State asks systemd about a unit.
func (m *Manager) State(ctx context.Context, name string) (State, error) {
	if !unitName.MatchString(name) {
		return State{}, fmt.Errorf("%q is not the name of a service unit", name)
	}
	conn, err := m.connection()
	if err != nil {
		return State{}, err
	}
	properties, err := conn.GetAllPropertiesContext(ctx, name)
	if err != nil {
		return State{}, fmt.Errorf("cannot get the state of unit %s: %w", name, err)
	}
	return stateOf(name, properties), nil
}

func stateOf(name string, properties map[string]any) State {
	s := State{Name: name}
	if load, _ := properties["LoadState"].(string); load == "not-found" {
		return s
	}
	s.Known = true
	s.Active, _ = properties["ActiveState"].(string)
	s.Result, _ = properties["Result"].(string)
	if job, _ := properties["Job"].([]any); len(job) == 2 {
		id, _ := job[0].(uint32)
		s.pending = id != 0
	}
	// ExecMainCode is a CLD_* of siginfo_t, sigaction(2).
	const exited, killed, dumped = 1, 2, 3
	code, _ := properties["ExecMainCode"].(int32)
	status, _ := properties["ExecMainStatus"].(int32)
	switch code {
	case exited:
		s.ExitStatus = int(status)
	case killed, dumped:
		s.Signal = unix.Signal(status)
	}
	// systemd removes the cgroup of an ended unit as soon as it is empty.
	group, _ := properties["ControlGroup"].(string)
	s.Processes = s.Ended() && group != ""
	return s
}

// List gives the units that match a glob pattern and that systemd knows.
func (m *Manager) List(ctx context.Context, pattern string) ([]State, error) {
	conn, err := m.connection()
	if err != nil {
		return nil, err
	}
	units, err := conn.ListUnitsByPatternsContext(ctx, nil, []string{pattern})
	if err != nil {
		return nil, fmt.Errorf("cannot list units %s: %w", pattern, err)
	}
	var states []State
	for _, u := range units {
		if !strings.HasSuffix(u.Name, ".service") || u.LoadState == "not-found" {
			continue
		}
		s, err := m.State(ctx, u.Name)
		if err != nil {
			return nil, err
		}
		if s.Known {
			states = append(states, s)
		}
	}
	return states, nil
}
