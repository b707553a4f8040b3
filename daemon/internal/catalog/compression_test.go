package catalog

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

func deferred(b Backup) Backup {
	b.Compression, b.CompressionTime = "zstd", "deferred"
	return b
}

func TestCompression(t *testing.T) {
	ctx, c := t.Context(), openNew(t)
	fixture(t, c)
	due := func(want ...string) {
		t.Helper()
		list, err := c.DueCompressions(ctx, epoch, 10)
		must(t, err)
		var ids []string
		for _, b := range list {
			ids = append(ids, b.ID)
		}
		if !slices.Equal(ids, want) {
			t.Errorf("%v are due, and not %v", ids, want)
		}
	}
	take(t, c, deferred(fullBackup("b1")))
	take(t, c, deferred(increment("b2", "b1", "b1")))
	plain := increment("b3", "b1", "b2")
	take(t, c, plain)
	due("b1", "b2")
	must(t, c.CompressedBackup(ctx, Compressed{Backup: "b1", Manifest: json.RawMessage(`{"format":2}`),
		Images: []MergedImage{{Target: "vda", Kind: chain.Full, StoredBytes: 2, DataBytes: 6}}}))
	due("b2")
	b, err := c.Backup(ctx, "b1")
	must(t, err)
	if b.CompressionState != CompressionDone || b.StoredBytes != 2 || b.DataBytes != 6 || string(b.Manifest) != `{"format":2}` || b.Cause != chain.FirstBackup {
		t.Errorf("%+v", b)
	}
	must(t, c.PutOffCompression(ctx, "b2", "away", epoch.Add(time.Hour)))
	due()
	must(t, c.PutOffCompression(ctx, "b2", "away", epoch))
	due("b2")
	must(t, c.CompressionFailed(ctx, "b2", "no room"))
	mustBe(t, ErrState, c.CompressionFailed(ctx, "b2", "once more"))
	mustBe(t, ErrState, c.CompressionFailed(ctx, "b1", "somebody asked to compress it again"))
	due()
	// What takes over something plain is to be compressed again.
	must(t, c.CompressedBackup(ctx, Compressed{Backup: "b2", Images: []MergedImage{{Target: "vda", Kind: chain.Incremental, Changes: chain.CBT, StoredBytes: 2}}}))
	if b, err = c.Backup(ctx, "b2"); err != nil || b.CompressionError != "" || b.CompressionState != CompressionDone {
		t.Errorf("%+v, %v", b, err)
	}
	merge := func(into, drop, base string) {
		t.Helper()
		must(t, c.MergeBackups(ctx, Merged{Merge: chain.Merge{Into: into, Drop: []string{drop}, Base: base}, Manifest: json.RawMessage("{}"),
			Images: []MergedImage{{Target: "vda", Kind: chain.Full, StoredBytes: 3}}}, Step{Job: "j", Name: "deleting"}))
	}
	merge("b2", "b1", "")
	due()
	must(t, c.DeleteBackups(ctx, []string{"b1"}))
	must(t, c.CompressedBackup(ctx, Compressed{Backup: "b3", Images: []MergedImage{{Target: "vda", Kind: chain.Incremental, Changes: chain.CBT, StoredBytes: 2}}}))
	_, err = c.writer.ExecContext(ctx, "UPDATE backups SET compression_state = 'failed' WHERE id = 'b2'")
	must(t, err)
	merge("b3", "b2", "")
	due("b3")
	mustBe(t, ErrState, c.CompressionFailed(ctx, "b2", "it is being deleted"))
	mustBe(t, ErrNotFound, c.CompressionFailed(ctx, "b9", "there is none"))
	must(t, c.DamagedBackup(ctx, "b3", "a bit"))
	due()
}

// TestCompressionWaitsForStorage has nothing due where it cannot be done.
func TestCompressionWaitsForStorage(t *testing.T) {
	ctx, c := t.Context(), openNew(t)
	fixture(t, c)
	take(t, c, deferred(fullBackup("b1")))
	for state, want := range map[string]int{"online": 1, "hung": 0, "gone": 0, "slow": 1, "full": 0} {
		must(t, c.FoundRepository(ctx, "r1", Finding{State: state, Checked: epoch}))
		if list, err := c.DueCompressions(ctx, epoch, 10); err != nil || len(list) != want {
			t.Errorf("%s: %d are due, %v", state, len(list), err)
		}
	}
}
