package repository

import (
	"context"
	"errors"
	"fmt"
)

// ScreenshotName is the file in which a backup's guest is seen. It is no part of
// the backup: no manifest lists it, nothing is wrong without it, and it goes
// when the backup does.
const ScreenshotName = "screenshot.png"

// screenshotLimit bounds it, in bytes.
const screenshotLimit = 2 << 20

// AttachScreenshot puts a screenshot beside a committed backup of this host, in
// place of the one that was there. It is whole or not there; what a crash leaves
// of it, Settle removes.
func (r *Repository) AttachScreenshot(ctx context.Context, c *Claim, backup string, png []byte) error {
	if err := r.attach(ctx, c, backup, png); err != nil {
		return fmt.Errorf("cannot put a screenshot beside backup %s: %w", truncated(backup), err)
	}
	return nil
}

func (r *Repository) attach(ctx context.Context, c *Claim, backup string, png []byte) error {
	if len(png) > screenshotLimit {
		return fmt.Errorf("it has %d bytes, and at most %d are kept", len(png), screenshotLimit)
	}
	w, err := r.Rewrite(c, backup)
	if err != nil {
		return err
	}
	pending := w.path(w.generation().name(ScreenshotName))
	if err := r.tree.writeNew(pending, png); err != nil {
		return errors.Join(err, w.Discard())
	}
	if ctx.Err() != nil {
		return errors.Join(context.Cause(ctx), w.Discard())
	}
	if err := errors.Join(c.Check(), r.tree.rename(pending, w.path(ScreenshotName))); err != nil {
		return errors.Join(err, w.Discard())
	}
	return r.tree.sync(w.path("."))
}
