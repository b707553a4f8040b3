package catalog

import (
	"encoding/json"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// found is a backup as a scan finds it.
func found(id, parent string) Backup {
	b := fullBackup(id)
	b.State, b.Manifest = chain.Complete, []byte("{}")
	b.Chain, b.Offering = "b1", "daily"
	if parent != "" {
		b.Kind, b.Cause, b.Parent = chain.Incremental, "", parent
	}
	return b
}

func TestImportedBackups(t *testing.T) {
	ctx, c := t.Context(), openNew(t)
	fixture(t, c)
	must(t, c.ImportBackup(ctx, found("b1", "")))
	must(t, c.ImportBackup(ctx, found("b3", "b1")))
	mustBe(t, ErrExists, c.ImportBackup(ctx, found("b1", "")))
	mustBe(t, ErrState, c.ImportBackup(ctx, found("b5", "b4")))
	foreign := found("b4", "b3")
	foreign.Pin = "pin"
	mustBe(t, ErrState, c.ImportBackup(ctx, foreign)) // on one of ours
	foreign = found("f1", "")
	foreign.Chain, foreign.Pin = "f1", "pin"
	must(t, c.ImportBackup(ctx, foreign))
	damaged := found("b6", "b3")
	damaged.State, damaged.Error = chain.Damaged, "its file is gone"
	must(t, c.ImportBackup(ctx, damaged))
	must(t, c.ImportBackup(ctx, found("b7", "b6"))) // damaged as well
	late := found("b0", "")
	late.Chain = "b0"
	must(t, c.ImportBackup(ctx, late))
	list, err := c.PlaceBackups(ctx, "d1", "r1")
	must(t, err)
	got := ""
	for _, b := range list {
		got += b.ID + " " + string(b.State) + ", "
	}
	if want := "b0 complete, b1 complete, b3 complete, b6 damaged, b7 damaged, f1 complete, "; got != want {
		t.Errorf("there are %s and not %s", got, want)
	}
	for id, want := range map[string]chain.State{"b1": chain.Broken, "f1": chain.Finished, "b0": chain.Finished} {
		if one, err := c.Chain(ctx, id); err != nil || one.State == chain.Open && id != "b0" || one.State != want && id != "b0" {
			t.Errorf("chain %s is %s and not %s, %v", id, one.State, want, err)
		}
	}
	pins, err := c.Pins(ctx, "r1")
	if err != nil || len(pins) != 1 || pins["f1"] != "pin" {
		t.Errorf("pins %v, %v", pins, err)
	}
	checkInvariants(t, c)
	// One that was found damaged, and then read back, is complete again, and so is what builds on it.
	states := func(b6, b7 chain.BackupState) {
		t.Helper()
		for id, want := range map[string]chain.BackupState{"b6": b6, "b7": b7} {
			if b, err := c.Backup(ctx, id); err != nil || b.State != want || (b.Error == "") != (want == chain.Complete) {
				t.Errorf("%s is %s (%s), and not %s, %v", id, b.State, b.Error, want, err)
			}
		}
	}
	must(t, c.VerifiedBackup(ctx, "b7", epoch))
	states(chain.Damaged, chain.Damaged)
	must(t, c.VerifiedBackup(ctx, "b6", epoch))
	states(chain.Complete, chain.Complete)
	checkInvariants(t, c)
}

func TestRepin(t *testing.T) {
	ctx, c := t.Context(), openNew(t)
	fixture(t, c)
	foreign := fullBackup("b1")
	foreign.Chain, foreign.State, foreign.Pin, foreign.Job = "b1", chain.Complete, "then", ""
	foreign.Images[0].StoredBytes = 9
	must(t, c.ImportBackup(ctx, foreign))
	take(t, c, fullBackup("b2"))
	now := func(id string) Compressed {
		return Compressed{Backup: id, Manifest: json.RawMessage(`{"generation":1}`), Images: []MergedImage{{Target: "vda", Kind: chain.Full, StoredBytes: 3}}}
	}
	must(t, c.RepinBackup(ctx, now("b1"), "now"))
	pins, err := c.Pins(ctx, "r1")
	must(t, err)
	b, err := c.Backup(ctx, "b1")
	must(t, err)
	if pins["b1"] != "now" || b.StoredBytes != 3 || string(b.Manifest) != `{"generation":1}` {
		t.Errorf("pinned as %q: %+v", pins["b1"], b)
	}
	mustBe(t, ErrState, c.RepinBackup(ctx, now("b2"), "now"))
	mustBe(t, ErrState, c.RepinBackup(ctx, now("b9"), "now"))
}
