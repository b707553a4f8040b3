package step

import (
	"context"
	"errors"
	"slices"
)

// Judge is the verdict on the findings of all steps, and the step and cause
// that decide it: one that is not valid decides; else one that was unable; else
// it is valid, if any step found it so.
func Judge(findings []Finding) (Verdict, string, string) {
	for _, worst := range []Verdict{NotValid, Unable} {
		if i := slices.IndexFunc(findings, func(f Finding) bool { return f.Verdict == worst }); i >= 0 {
			return worst, findings[i].Step, findings[i].Cause
		}
	}
	if slices.ContainsFunc(findings, func(f Finding) bool { return f.Verdict == Valid }) {
		return Valid, "", ""
	}
	if len(findings) == 0 {
		return Unable, "", "no validation step is set: set some with --validation-steps"
	}
	last := findings[len(findings)-1]
	return Unable, last.Step, "no step could be done: " + last.Cause
}

// applies says whether a step makes sense after what was found: whoever needs
// the agent does not wait for it again after it did not come.
func applies(name string, before []Finding) bool {
	if name == NameScreenshot || name == NameJudge {
		return true
	}
	return !slices.ContainsFunc(before, func(f Finding) bool { return f.Step == NameBoot && f.Verdict != Valid })
}

// excuse turns what is not valid into unable where the host is to blame: a
// guest whose disks hang cannot boot, and says nothing about its backup.
func excuse(ctx context.Context, g Guest, f Finding) Finding {
	if f.Verdict != NotValid {
		return f
	}
	if err := g.Impeded(ctx); err != nil {
		f.Verdict, f.Cause = Unable, "the host kept the guest from going on: "+err.Error()
	}
	return f
}

// failed is the finding that an error of a guest makes. The guest's own failure
// is not valid; what is not there to be asked is skipped; all else is the host's.
func failed(err error) Finding {
	switch {
	case errors.Is(err, ErrNoAgent), errors.Is(err, ErrNoScreen):
		return Finding{Verdict: Skipped, Cause: err.Error()}
	case errors.Is(err, ErrSilent), errors.Is(err, ErrEnded):
		return Finding{Verdict: NotValid, Cause: err.Error()}
	}
	return Finding{Verdict: Unable, Cause: err.Error()}
}
