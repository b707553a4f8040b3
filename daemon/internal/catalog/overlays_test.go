package catalog

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// TestOverlays has overlays kept only of the newest backup of an open chain.
func TestOverlays(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	of := func(backup string) Overlay {
		return Overlay{Path: "/d/vda." + backup, Domain: "d1", Backup: backup, Target: "vda"}
	}
	kept := func(when string, want ...Overlay) {
		t.Helper()
		got, err := c.KeptOverlays(ctx, "d1")
		must(t, err)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", when, diff)
		}
	}
	overlaid := func(b Backup) Overlay {
		must(t, c.AddOverlays(ctx, []Overlay{of(b.ID)}))
		must(t, c.AddOverlays(ctx, []Overlay{of(b.ID)})) // after a restart
		must(t, c.CreateBackup(ctx, b, "", Step{Job: "j", Name: "created"}))
		return of(b.ID)
	}
	first := overlaid(fullBackup("b1"))
	kept("while it is made")
	must(t, c.CommitBackup(ctx, "b1", done(fullBackup("b1"))))
	kept("after the first", first)

	second := overlaid(increment("b2", "b1", "b1"))
	kept("while the second is made", first)
	must(t, c.FailBackup(ctx, "b2", "no", epoch))
	kept("after the second failed", first)
	third := overlaid(increment("b3", "b1", "b1"))
	must(t, c.CommitBackup(ctx, "b3", done(increment("b3", "b1", "b1"))))
	kept("after the third", third)

	other := fullBackup("b4")
	other.Repository, other.Offering = "r2", ""
	fourth := overlaid(other)
	must(t, c.CommitBackup(ctx, "b4", done(other)))
	kept("after one in another repository", fourth)
	must(t, c.EndChain(ctx, "b4", chain.Finished, chain.ChainFinished))
	kept("after the end of that chain", third)
	take(t, c, increment("b5", "b1", "b3"))
	kept("after a backup without overlay")

	must(t, c.RemovedOverlay(ctx, second.Path))
	mustBe(t, ErrNotFound, c.CommittingOverlay(ctx, second.Path))
	must(t, c.CommittingOverlay(ctx, third.Path))
	must(t, c.CommittedOverlay(ctx, third.Path, epoch))
	mustBe(t, ErrNotFound, c.CommittedOverlay(ctx, second.Path, epoch))
	third.Committing, third.Committed = true, epoch.UnixNano()
	all, err := c.Overlays(ctx, "")
	must(t, err)
	if diff := cmp.Diff([]Overlay{first, third, fourth}, all); diff != "" {
		t.Error(diff)
	}
}
