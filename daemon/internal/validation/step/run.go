package step

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// The names of the steps.
const (
	NameBoot        = "wait_for_boot"
	NameFilesystems = "check_filesystems"
	NameCommand     = "execute_command"
	NamePorts       = "check_port"
	NameScreenshot  = "screenshot"
	NameJudge       = "judge_screen"
)

// Names are those of all steps, in the order in which they run.
func Names() []string {
	return []string{NameBoot, NameFilesystems, NameCommand, NamePorts, NameScreenshot, NameJudge}
}

// DefaultNames are the steps where none is set: what any guest can do.
func DefaultNames() []string { return []string{NameBoot, NameScreenshot, NameJudge} }

// New returns the steps with these names, or of DefaultNames if there are none,
// in the order in which they run; started is when the guest was.
func New(names []string, s Settings, started time.Time) ([]Step, error) {
	if len(names) == 0 {
		names = DefaultNames()
	}
	for _, name := range names {
		if !slices.Contains(Names(), name) {
			return nil, fmt.Errorf("there is no validation step %q: there are %v", name, Names())
		}
	}
	all := []Step{
		boot{s.BootTimeout, slices.Contains(names, NameJudge)},
		filesystems{s.CommandTimeout},
		command{Command{Path: s.Command, Arguments: s.Arguments}, s.Expected, s.CommandTimeout},
		ports{s.Ports, s.CommandTimeout},
		screenshot{started.Add(s.ScreenshotWait)},
		judge{screenshot{started.Add(s.ScreenshotWait)}},
	}
	return slices.DeleteFunc(all, func(s Step) bool { return !slices.Contains(names, s.Name()) }), nil
}

// Run lets the steps try the guest, one after the other, and tells of each
// before it begins. An error is that of ctx: nothing was decided.
func Run(ctx context.Context, g Guest, steps []Step, begin func(name string)) (Report, error) {
	var r Report
	for _, s := range steps {
		if !applies(s.Name(), r.Findings) {
			r.Findings = append(r.Findings, Finding{Step: s.Name(), Verdict: Skipped, Cause: "an earlier step did not get as far"})
			continue
		}
		begin(s.Name())
		start := time.Now()
		f := s.Run(ctx, g, r.Findings)
		if err := context.Cause(ctx); err != nil {
			return r, err
		}
		f.Step, f.Took, f.Output = s.Name(), time.Since(start), printable(f.Output)
		r.Findings = append(r.Findings, excuse(ctx, g, f))
	}
	r.Verdict, r.Step, r.Cause = Judge(r.Findings)
	r.Screenshot = lastScreenshot(r.Findings)
	if r.Screenshot == nil && r.Verdict != Valid {
		r.Screenshot, _, _ = take(ctx, g) // it tells people why; without it the verdict is the same
	}
	return r, context.Cause(ctx)
}

func lastScreenshot(findings []Finding) []byte {
	for _, f := range slices.Backward(findings) {
		if f.Screenshot != nil {
			return f.Screenshot
		}
	}
	return nil
}
