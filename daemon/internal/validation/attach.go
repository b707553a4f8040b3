package validation

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
)

// attachLimit bounds how long a repository may take for a screenshot.
const attachLimit = time.Minute

// attach puts the screenshot beside the backup, for whoever has only the
// repository. The catalog has it anyway, and the result is what it is: that it
// cannot be done is only told.
func (k *Kind) attach(ctx context.Context, h *job.Handle, b catalog.Backup, r step.Report) {
	if r.Screenshot == nil || b.Pin != "" { // other hosts' backups are theirs
		return
	}
	ctx, cancel := context.WithTimeout(ctx, attachLimit)
	defer cancel()
	repo, err := k.Catalog.Repository(ctx, b.Repository)
	if err == nil {
		_, err = k.Errand.Run(ctx, h, repo, transfer.Spec{
			Operation: transfer.OperationAttach, Domain: b.Domain, Attach: &transfer.AttachSpec{Backup: b.ID, PNG: r.Screenshot},
		})
	}
	if err != nil {
		h.Log(context.WithoutCancel(ctx), slog.LevelWarn, fmt.Sprintf("the screenshot of backup %s is not in the repository, only in the catalog: %v", b.ID, err))
	}
}
