// Package step knows how a machine that was started from a backup is tried:
// steps that look at it from outside, ask its guest agent, or run commands in
// it, and the rules by which what they saw becomes a verdict. It knows of the
// machine only what [Guest] says, and nothing of backups, libvirt or jobs.
//
// Whatever the guest answers may be forged or without end: it is bounded, kept
// as evidence, compared, and never interpreted otherwise.
package step

import (
	"context"
	"errors"
	"time"
)

// Guest is a machine that is being tried. Its errors are the guest's own
// failures when they are one of those below; all others are the host's, of
// which nothing follows about the backup.
type Guest interface {
	// Ping asks the guest agent for an answer, and waits for it a few seconds at most.
	Ping(ctx context.Context) error
	// System is what guest-get-osinfo calls the guest's system, as "debian" or
	// "mswindows"; "" if it does not tell.
	System(ctx context.Context) (string, error)
	// Execute runs a program in the guest through its agent, until it has ended
	// or ctx has. At most MaxOutput of each stream is kept.
	Execute(ctx context.Context, c Command) (Output, error)
	// Screenshot is the first screen, as PPM or PNG, or ErrNoScreen.
	Screenshot(ctx context.Context) ([]byte, error)
	// Impeded says what on the host keeps the guest from going on as it would, as
	// a repository that does not answer or a QEMU that was killed; nil if nothing does.
	Impeded(ctx context.Context) error
}

// What a guest does not do. They are compared with errors.Is.
var (
	// ErrNoAgent: the machine has no channel to an agent.
	ErrNoAgent = errors.New("the domain has no guest agent")
	// ErrSilent: the agent did not answer in time.
	ErrSilent = errors.New("the guest agent does not answer")
	// ErrRefused: the agent answered that it cannot or must not do it, as for a program that does not exist.
	ErrRefused = errors.New("the guest agent refused")
	// ErrNoScreen: the machine has no video device.
	ErrNoScreen = errors.New("the domain has no screen")
	// ErrEnded: the guest powered itself off, or crashed.
	ErrEnded = errors.New("the guest ended")
)

// MaxOutput is how much of each stream of a command is kept, in bytes.
const MaxOutput = 64 << 10

// Command is a program to run in a guest, without a shell.
type Command struct {
	Path      string
	Arguments []string
	Input     []byte
}

// Output is what a program in a guest left.
type Output struct {
	ExitCode       int // or a signal's number, with Signalled
	Signalled      bool
	Stdout, Stderr []byte
	Truncated      bool // there was more of Stdout or Stderr
}

// Verdict is what a step, or all of them, found.
type Verdict string

// The verdicts.
const (
	Valid    Verdict = "valid"
	NotValid Verdict = "not-valid"
	Unable   Verdict = "unable"  // nothing follows about the backup
	Skipped  Verdict = "skipped" // a step that does not apply, or whose condition an earlier one did not meet
)

// Finding is what one step found.
type Finding struct {
	Step    string        `json:"step"`
	Verdict Verdict       `json:"verdict"`
	Cause   string        `json:"cause,omitempty"`  // one sentence; "" for a valid one
	Output  string        `json:"output,omitempty"` // what the guest said, bounded and made printable
	Took    time.Duration `json:"took"`
	// Screenshot is a PNG; nil for a step that takes none.
	Screenshot []byte `json:"-"`
}

// Step is one way to try a guest. It returns when ctx ends, whatever the guest
// does; what it says then is not used.
type Step interface {
	Name() string
	// before is what the steps before it found.
	Run(ctx context.Context, g Guest, before []Finding) Finding
}

// Report is what all steps found.
type Report struct {
	Verdict    Verdict // Valid, NotValid or Unable
	Step       string  // that decided it; "" for a valid one
	Cause      string
	Findings   []Finding
	Screenshot []byte // the last one, as PNG
}

// Settings say how the steps of one backup are made.
type Settings struct {
	BootTimeout    time.Duration // of wait_for_boot
	Command        string        // of execute_command, which is skipped without one
	Arguments      []string
	Expected       []byte // what the command must write; nil: its exit code must be 0
	CommandTimeout time.Duration
	ScreenshotWait time.Duration // after which the screenshot is taken, counted from the start of the guest
	Ports          []uint16      // that somebody must listen at in the guest
}
