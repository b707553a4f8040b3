package transfer

import (
	"bytes"
	"context"
)

// AttachSpec has a screenshot put beside a backup of Spec.Domain, in place of
// the one that was there. The backup itself is not changed.
type AttachSpec struct {
	Backup string `json:"backup"`
	PNG    []byte `json:"png"`
}

func (w *worker) attach(ctx context.Context) error {
	s := w.spec.Attach
	if s == nil || !bytes.HasPrefix(s.PNG, []byte("\x89PNG\r\n\x1a\n")) {
		return fail(ClassInternal, "the specification has no screenshot")
	}
	r, err := w.open()
	if err != nil {
		return err
	}
	defer r.Close()
	if err := w.status.enter(PhaseCommitting); err != nil {
		return err
	}
	claim, err := r.Claim(w.spec.Domain, w.spec.Job)
	if err != nil {
		return inRepository(err)
	}
	defer w.release(claim)
	return inRepository(r.AttachScreenshot(ctx, claim, s.Backup, s.PNG))
}
