package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

const (
	hookFile   = "/etc/libvirt/hooks/qemu.d/virtbackup"
	hookAside  = "/etc/libvirt/virtbackup-hook-aside"
	hookRounds = 20
)

// hookState is one of the states of a host in which the hook is measured.
type hookState struct {
	name         string
	enter, leave []string // commands; may be empty
	alone        bool     // whether the hook is there to be measured by itself
	// By round, of: the hook at prepare, virsh start, virsh destroy.
	took [3][]time.Duration
}

func hookStates() []*hookState {
	daemon := func(signal string) []string {
		return []string{"systemctl", "kill", "--kill-whom=main", "--signal=" + signal, "virtbackupd"}
	}
	return []*hookState{
		{name: "without the hook", enter: []string{"mv", hookFile, hookAside}, leave: []string{"mv", hookAside, hookFile}},
		{name: "daemon up", alone: true},
		{name: "daemon stopped", alone: true, enter: []string{"systemctl", "stop", "virtbackupd"}, leave: []string{"systemctl", "start", "virtbackupd"}},
		{name: "daemon hangs", alone: true, enter: daemon("STOP"), leave: daemon("CONT")},
	}
}

// hook measures what the hook adds to starting and stopping a guest. The guest
// stays paused, so that all is libvirt's, QEMU's and the hook's time.
func (b *host) hook(ctx context.Context, text *strings.Builder) error {
	const name = "hooked"
	if err := command(ctx, "lab-domain", "create", name, "--disk", "qcow2:64M", "--disk", "raw:64M"); err != nil {
		return err
	}
	definition, err := output(ctx, "virsh", "-q", "dumpxml", name)
	if err != nil {
		return err
	}
	states := hookStates()
	for round := range hookRounds {
		for i := range states {
			s := states[(i+round)%len(states)]
			if err := s.measure(ctx, name, definition); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
		fmt.Fprintf(os.Stderr, "bench: hook: round %d of %d\n", round+1, hookRounds)
	}
	fmt.Fprintf(text, "\n| hook, medians of %d interleaved rounds, in ms (greatest) | hook at prepare | virsh start | virsh destroy |\n| --- | --- | --- | --- |\n", hookRounds)
	for _, s := range states {
		fmt.Fprintf(text, "| %s |", s.name)
		for _, times := range s.took {
			fmt.Fprintf(text, " %s |", milliseconds(times))
		}
		fmt.Fprintln(text)
	}
	return nil
}

// measure takes each time once in a state.
func (s *hookState) measure(ctx context.Context, name, definition string) error {
	if len(s.enter) > 0 {
		if err := command(ctx, s.enter...); err != nil {
			return err
		}
	}
	if s.alone {
		c := exec.CommandContext(ctx, hookFile, name, "prepare", "begin", "-")
		c.Stdin = strings.NewReader(definition)
		began := time.Now()
		if err := c.Run(); err != nil {
			return err
		}
		s.took[0] = append(s.took[0], time.Since(began))
	}
	for i, args := range [][]string{{"virsh", "-q", "start", "--paused", name}, {"virsh", "-q", "destroy", name}} {
		began := time.Now()
		if err := command(ctx, args...); err != nil {
			return err
		}
		s.took[i+1] = append(s.took[i+1], time.Since(began))
	}
	if len(s.leave) > 0 {
		return command(ctx, s.leave...)
	}
	return nil
}

// milliseconds is the median, and the greatest in parentheses.
func milliseconds(times []time.Duration) string {
	if len(times) == 0 {
		return ""
	}
	sorted := slices.Sorted(slices.Values(times))
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 }
	n := len(sorted)
	return fmt.Sprintf("%.0f (%.0f)", (ms(sorted[(n-1)/2])+ms(sorted[n/2]))/2, ms(sorted[n-1]))
}
