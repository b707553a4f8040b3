package catalog

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRepositoryOnStorageThatIsMounted(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	nas := Repository{
		ID: "r1", Name: "nas", Type: "nfs", Path: "/run/virtbackup/mounts/r1", Address: "nas:/a", Options: []string{"vers=4.2"},
		Credentials: true, MinimumFree: 7, Created: epoch, Finding: Finding{State: "unknown"},
	}
	must(t, c.CreateRepository(ctx, nas))
	got, err := c.Repository(ctx, "r1")
	must(t, err)
	if diff := cmp.Diff(nas, got); diff != "" {
		t.Error(diff)
	}
	other := nas
	other.ID, other.Name, other.Path = "r2", "again", "/run/virtbackup/mounts/r2"
	mustBe(t, ErrExists, c.CreateRepository(ctx, other))
	other.Address = "nas:/b"
	must(t, c.CreateRepository(ctx, other))
	other.Address = nas.Address
	mustBe(t, ErrExists, c.UpdateRepository(ctx, other))
	nas.Address, nas.Options, nas.Credentials, nas.MinimumFree = "nas2:/a", []string{}, false, 8
	must(t, c.UpdateRepository(ctx, nas))
	got, err = c.Repository(ctx, "r1")
	must(t, err)
	if diff := cmp.Diff(nas, got); diff != "" {
		t.Error(diff)
	}
	mustBe(t, ErrNotFound, c.UpdateRepository(ctx, Repository{ID: "r3"}))
}

// The time since which a repository has its state is that of the first look that found it so.
func TestRepositoryHasItsStateSince(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	must(t, c.CreateRepository(ctx, Repository{ID: "r1", Name: "one", Type: "dir", Path: "/srv/one", Created: epoch}))
	for i, want := range []struct {
		state, identity string
		since           int
	}{{"online", "a", 0}, {"online", "b", 0}, {"hung", "", 2}, {"hung", "", 2}, {"online", "a", 4}} {
		at := epoch.Add(time.Duration(i) * time.Second)
		must(t, c.FoundRepository(ctx, "r1", Finding{Identity: want.identity, State: want.state, Problem: "p", Total: 9, Free: uint64(i), Checked: at}))
		got, err := c.Repository(ctx, "r1")
		must(t, err)
		since := epoch.Add(time.Duration(want.since) * time.Second)
		if diff := cmp.Diff(Finding{Identity: "a", State: want.state, Since: since, Problem: "p", Total: 9, Free: uint64(i), Checked: at}, got.Finding); diff != "" {
			t.Errorf("look %d: %s", i, diff)
		}
	}
}

// What is forgotten of one repository is nothing of another's, and its bitmaps go.
func TestForgetBackups(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	elsewhere := fullBackup("b3")
	elsewhere.Repository = "r2"
	take(t, c, elsewhere)
	n, err := c.ForgetBackups(ctx, "r1")
	if must(t, err); n != 2 {
		t.Errorf("%d backups were forgotten", n)
	}
	if _, err := c.Backup(ctx, "b3"); err != nil {
		t.Error(err)
	}
	_, err = c.Backup(ctx, "b2")
	mustBe(t, ErrNotFound, err)
	want := map[string]CheckpointState{"b1": CheckpointObsolete, "b2": CheckpointObsolete, "b3": CheckpointCurrent}
	if diff := cmp.Diff(want, checkpointStates(t, c)); diff != "" {
		t.Error(diff)
	}
	must(t, c.CreateBackup(ctx, fullBackup("b4"), "", Step{Job: "j", Name: "created"}))
	_, err = c.ForgetBackups(ctx, "r1")
	mustBe(t, ErrState, err)
}
