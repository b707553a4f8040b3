package catalog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

var epoch = time.UnixMicro(1_700_000_000_000_001).UTC()

func openNew(t *testing.T) *Catalog {
	t.Helper()
	c, err := Open(t.Context(), filepath.Join(t.TempDir(), "catalog ?#%.sqlite"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// fixture adds repositories r1 and r2, the offering "daily" in r1, and the running job j.
func fixture(t testing.TB, c *Catalog) {
	t.Helper()
	ctx := context.Background()
	must(t, c.CreateRepository(ctx, Repository{ID: "r1", Name: "one", Type: "dir", Path: "/srv/one", Created: epoch}))
	must(t, c.CreateRepository(ctx, Repository{ID: "r2", Name: "two", Type: "dir", Path: "/srv/two", Created: epoch}))
	must(t, c.CreateOffering(ctx, Offering{Name: "daily", Repository: "r1", Settings: settings, Created: epoch}))
	must(t, c.CreateJob(ctx, Job{ID: "j", Kind: "backup", Created: epoch}))
	must(t, c.StartJob(ctx, "j", epoch))
}

var settings = Settings{Mode: chain.ModeIncremental, Compression: "zstd", Level: 3, Threads: 2, ChainSize: 7, Quiesce: "agent",
	QuiescePolicy: "prefer", Tracking: chain.Digest, Fallback: chain.FallbackFull, CompressionTime: "inline"}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustBe(t *testing.T, want, got error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("got error %v, want %v", got, want)
	}
}

func fullBackup(id string) Backup {
	return Backup{ID: id, Domain: "d1", DomainName: "web", Repository: "r1", Job: "j", Kind: chain.Full, Cause: chain.FirstBackup,
		Created: epoch, Offering: "daily", Settings: settings,
		Images: []Image{{Target: "vda", Kind: chain.Full, Tracking: chain.CBT, Cause: chain.FirstBackup, Source: "/a", Format: "qcow2", Size: 10}}}
}

func increment(id, chainID, parent string) Backup {
	b := fullBackup(id)
	b.Kind, b.Cause, b.Chain, b.Parent = chain.Incremental, "", chainID, parent
	b.Images[0].Kind, b.Images[0].Cause = chain.Incremental, ""
	return b
}

func done(b Backup) Commit {
	images := make([]Image, len(b.Images))
	for i, image := range b.Images {
		images[i] = image
		images[i].StoredBytes, images[i].DataBytes = 4, 6
	}
	return Commit{Finished: epoch.Add(time.Minute), Consistency: "filesystem", Manifest: json.RawMessage(`{"format":1}`), Images: images}
}

// take creates and commits a backup.
func take(t *testing.T, c *Catalog, b Backup) {
	t.Helper()
	must(t, c.CreateBackup(t.Context(), b, "virtbackup-"+b.ID, Step{Job: "j", Name: "created"}))
	must(t, c.CommitBackup(t.Context(), b.ID, done(b)))
}

func checkpointStates(t *testing.T, c *Catalog) map[string]CheckpointState {
	t.Helper()
	all, err := c.Checkpoints(t.Context(), "")
	must(t, err)
	states := map[string]CheckpointState{}
	for _, p := range all {
		states[p.Backup] = p.State
	}
	return states
}

func TestInventory(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	mustBe(t, ErrExists, c.CreateRepository(ctx, Repository{ID: "r3", Name: "one", Type: "dir", Path: "/x", Created: epoch}))
	mustBe(t, ErrExists, c.CreateRepository(ctx, Repository{ID: "r1", Name: "x", Type: "dir", Path: "/x", Created: epoch}))
	mustBe(t, ErrExists, c.CreateRepository(ctx, Repository{ID: "r3", Name: "x", Type: "dir", Path: "/srv/one", Created: epoch}))
	mustBe(t, ErrInUse, c.RemoveRepository(ctx, "r1"))
	mustBe(t, ErrNotFound, c.RemoveRepository(ctx, "r9"))
	mustBe(t, ErrExists, c.CreateOffering(ctx, Offering{Name: "daily", Repository: "r1", Settings: settings}))
	mustBe(t, ErrNotFound, c.CreateOffering(ctx, Offering{Name: "x", Repository: "r9", Settings: settings}))
	mustBe(t, ErrNotFound, c.UpdateOffering(ctx, Offering{Name: "x", Repository: "r1", Settings: settings}))

	mustBe(t, ErrNotFound, c.AssignDomain(ctx, "d1", "web", "weekly"))
	if _, err := c.Domain(ctx, "d1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a failed assignment left a domain: %v", err)
	}
	must(t, c.AssignDomain(ctx, "d1", "web", "daily"))
	must(t, c.SeenDomain(ctx, "d1", "web-renamed"))
	must(t, c.SeenDomain(ctx, "d2", "db"))
	mustBe(t, ErrInUse, c.RemoveOffering(ctx, "daily"))
	domains, err := c.Domains(ctx, "")
	must(t, err)
	if diff := cmp.Diff([]Domain{{UUID: "d2", Name: "db"}, {UUID: "d1", Name: "web-renamed", Offering: "daily"}}, domains); diff != "" {
		t.Error(diff)
	}
	if domains, err = c.Domains(ctx, "daily"); err != nil || len(domains) != 1 {
		t.Errorf("assigned to daily: %v, %v", domains, err)
	}

	changed := Offering{Name: "daily", Repository: "r2", Settings: Settings{Mode: chain.ModeFull, Compression: "none", Quiesce: "none",
		QuiescePolicy: "require", Tracking: chain.CBT, Fallback: chain.FallbackDigest,
		CompressionTime: "deferred", Include: []string{"vda"}, Exclude: []string{"vdb", "vdc"}, Volatile: true}, Created: epoch,
		Description: "for the shop", Origin: "/etc/virtbackup/offerings.d/daily.toml", Disabled: true,
		Retention:  chain.Retention{Last: 1, Hourly: 2, Daily: 3, Weekly: 4, Monthly: 5, Yearly: 6},
		Rights:     Rights{Users: []string{"ann", "@ops"}, Backups: true, Schedules: false, QuickRestore: true, FileExtraction: false},
		Validation: Validation{Validate: true, Steps: []string{"screenshot"}}}
	must(t, c.UpdateOffering(ctx, changed))
	got, err := c.Offering(ctx, "daily")
	must(t, err)
	if diff := cmp.Diff(changed, got); diff != "" {
		t.Error(diff)
	}
	must(t, c.OverrideDomain(ctx, "d1", "web", []byte(`{"Mode":"full"}`)))
	if d, err := c.Domain(ctx, "d1"); err != nil || string(d.Overrides) != `{"Mode":"full"}` || d.Offering != "daily" || d.Name != "web" {
		t.Errorf("got %+v, %v", d, err)
	}
	must(t, c.RemoveRepository(ctx, "r1"))
	must(t, c.UnassignDomain(ctx, "d1"))
	mustBe(t, ErrNotFound, c.UnassignDomain(ctx, "d1"))
	must(t, c.RemoveOffering(ctx, "daily"))
	if r, err := c.RepositoryByName(ctx, "two"); err != nil || r.ID != "r2" || !r.Created.Equal(epoch) {
		t.Errorf("got %+v, %v", r, err)
	}
	if _, err := c.RepositoryByName(ctx, "one"); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestBackupIsStoredWhole(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	b := fullBackup("b1")
	must(t, c.CreateBackup(ctx, b, "virtbackup-b1", Step{Job: "j", Name: "created", Data: json.RawMessage(`{"n":1}`)}))
	got, err := c.Backup(ctx, "b1")
	must(t, err)
	want := b
	want.Chain, want.State = "b1", chain.Running
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	job, err := c.Job(ctx, "j")
	must(t, err)
	if job.Step != "created" || string(job.StepData) != `{"n":1}` {
		t.Errorf("the step was not recorded: %+v", job)
	}
	if _, err := c.LatestChain(ctx, "d1", "r1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a chain before the commit: %v", err)
	}

	must(t, c.CommitBackup(ctx, "b1", done(b)))
	must(t, c.CommitBackup(ctx, "b1", done(b))) // a resumed job does so
	got, err = c.Backup(ctx, "b1")
	must(t, err)
	want.State, want.Consistency, want.Finished, want.Manifest = chain.Complete, "filesystem", epoch.Add(time.Minute), json.RawMessage(`{"format":1}`)
	want.Sequence = 1
	want.Size, want.StoredBytes, want.DataBytes, want.Images = 10, 4, 6, done(b).Images
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	mustBe(t, ErrState, c.FailBackup(ctx, "b1", "too late", epoch))
	mustBe(t, ErrInUse, c.RemoveRepository(ctx, "r1"))
}

func TestChainGrowsAndEnds(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	// Fails: the chain goes on from b2, and its checkpoint is to be removed.
	must(t, c.CreateBackup(ctx, increment("b3", "b1", "b2"), "virtbackup-b3", Step{Job: "j"}))
	mustBe(t, ErrState, c.CreateBackup(ctx, increment("b3b", "b1", "b2"), "virtbackup-b3b", Step{Job: "j"}))
	must(t, c.FailBackup(ctx, "b3", "no space", epoch))
	must(t, c.FailBackup(ctx, "b3", "again", epoch))
	mustBe(t, ErrState, c.CommitBackup(ctx, "b3", Commit{}))
	take(t, c, increment("b4", "b1", "b2"))
	mustBe(t, ErrState, c.CreateBackup(ctx, increment("b5", "b1", "b2"), "virtbackup-b5", Step{Job: "j"}))
	isolated := fullBackup("b6")
	isolated.Isolated, isolated.Cause = true, chain.Isolated
	take(t, c, isolated)

	head, err := c.LatestChain(ctx, "d1", "r1")
	must(t, err)
	if head.ID != "b1" || head.State != chain.Open || head.Length != 3 || head.Tip.ID != "b4" || len(head.Tip.Images) != 1 ||
		head.Checkpoint == nil || head.Checkpoint.Name != "virtbackup-b4" {
		t.Errorf("got %+v", head)
	}
	want := map[string]CheckpointState{"b1": CheckpointObsolete, "b2": CheckpointObsolete, "b3": CheckpointObsolete,
		"b4": CheckpointCurrent, "b6": CheckpointObsolete}
	if diff := cmp.Diff(want, checkpointStates(t, c)); diff != "" {
		t.Error(diff)
	}
	line, err := c.ChainBackups(ctx, "b1")
	must(t, err)
	if plan, err := chain.PlanRestore([]chain.Backup{line[0].Link(), line[1].Link(), line[2].Link()}, "b4"); err != nil ||
		!cmp.Equal(plan[0].Backups, []string{"b4", "b2", "b1"}) {
		t.Errorf("plan %+v, %v", plan, err)
	}

	// A full backup ends the chain before it.
	again := fullBackup("b7")
	again.Cause = chain.ChainSize
	take(t, c, again)
	if old, err := c.Chain(ctx, "b1"); err != nil || old.State != chain.Finished || old.Cause != chain.ChainSize {
		t.Errorf("got %+v, %v", old, err)
	}
	must(t, c.EndChain(ctx, "b7", chain.Broken, chain.BitmapBroken))
	must(t, c.EndChain(ctx, "b7", chain.Finished, chain.ChainFinished))
	head, err = c.LatestChain(ctx, "d1", "r1")
	must(t, err)
	if head.ID != "b7" || head.State != chain.Broken || head.Cause != chain.BitmapBroken || head.Checkpoint != nil {
		t.Errorf("the first cause did not stay: %+v", head)
	}
	mustBe(t, ErrNotFound, c.EndChain(ctx, "b9", chain.Broken, chain.BitmapBroken))
}

func TestChainThatEndsDuringABackup(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	b := increment("b2", "b1", "b1")
	must(t, c.CreateBackup(ctx, b, "virtbackup-b2", Step{Job: "j"}))
	must(t, c.EndChain(ctx, "b1", chain.Broken, chain.BitmapBroken))
	must(t, c.CommitBackup(ctx, "b2", done(b)))
	head, err := c.LatestChain(ctx, "d1", "r1")
	must(t, err)
	if head.State != chain.Broken || head.Checkpoint != nil || head.Tip.ID != "b2" || head.Tip.State != chain.Complete {
		t.Errorf("got %+v", head)
	}
}

func TestCheckpointNamesAreForEver(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	must(t, c.SetCheckpointXML(ctx, "virtbackup-b1", "<domaincheckpoint/>"))
	mustBe(t, ErrState, c.RemovedCheckpoint(ctx, "virtbackup-b1"))
	must(t, c.BeginDelete(ctx, []string{"b1"}, Step{Job: "j"}))
	must(t, c.RemovedCheckpoint(ctx, "virtbackup-b1"))
	must(t, c.DeleteBackups(ctx, []string{"b1"}))
	mustBe(t, ErrNotFound, c.RemovedCheckpoint(ctx, "virtbackup-b9"))
	mustBe(t, ErrExists, c.CreateBackup(ctx, fullBackup("b2"), "virtbackup-b1", Step{Job: "j"}))
	if _, err := c.Backup(ctx, "b2"); !errors.Is(err, ErrNotFound) {
		t.Errorf("half of a refused backup is there: %v", err)
	}
}

func TestDelete(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	mustBe(t, ErrInUse, c.BeginDelete(ctx, []string{"b1"}, Step{Job: "j"}))
	mustBe(t, ErrState, c.DeleteBackups(ctx, []string{"b2"}))
	mustBe(t, ErrNotFound, c.BeginDelete(ctx, []string{"b9"}, Step{Job: "j"}))
	must(t, c.BeginDelete(ctx, []string{"b2"}, Step{Job: "j", Name: "deleting"}))
	if ended, err := c.Chain(ctx, "b1"); err != nil || ended.State != chain.Finished || ended.Cause != chain.BackupDeleted {
		t.Errorf("the chain lost its newest backup, and is %+v, %v", ended, err)
	}
	must(t, c.DeleteBackups(ctx, []string{"b2"}))
	must(t, c.DeleteBackups(ctx, []string{"b2"})) // a resumed job does so
	must(t, c.BeginDelete(ctx, []string{"b1"}, Step{Job: "j"}))
	must(t, c.DeleteBackups(ctx, []string{"b1"}))
	if all, err := c.Chains(ctx, "d1"); err != nil || len(all) != 0 {
		t.Errorf("left over: %v, %v", all, err)
	}
	must(t, c.RemoveOffering(ctx, "daily"))
	must(t, c.RemoveRepository(ctx, "r1"))
}

// TestNoHoldComesBetween holds what is just being merged, and merges what is held.
func TestNoHoldComesBetween(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	take(t, c, increment("b3", "b1", "b2"))
	for _, j := range []string{"j1", "j2"} { // one has no step
		must(t, c.CreateJob(ctx, Job{ID: j, Kind: "prune", Domain: "d1", Spec: json.RawMessage("{}")}))
		must(t, c.StartJob(ctx, j, epoch))
	}
	m := chain.Merge{Into: "b2", Drop: []string{"b1"}}
	begin := func() error {
		data, err := json.Marshal(map[string]any{"merge": m})
		must(t, err)
		return c.BeginMerge(ctx, m, Step{Job: "j1", Name: "merging", Data: data})
	}
	must(t, c.HoldBackup(ctx, "b1", "wanted"))
	mustBe(t, ErrInUse, begin())
	must(t, c.HoldBackup(ctx, "b1", ""))
	must(t, begin())
	mustBe(t, ErrInUse, c.HoldBackup(ctx, "b1", "wanted"))
	must(t, c.HoldBackup(ctx, "b2", "wanted"))
	b, err := c.Backup(ctx, "b2")
	must(t, err)
	merged := Merged{Merge: m, Manifest: json.RawMessage("{}")}
	for _, i := range b.Images {
		merged.Images = append(merged.Images, MergedImage{Target: i.Target, Kind: chain.Full})
	}
	must(t, c.MergeBackups(ctx, merged, Step{Job: "j1", Name: "deleting"}))
	mustBe(t, ErrState, c.HoldBackup(ctx, "b1", "wanted"))
	if head, err := c.LatestChain(ctx, "d1", "r1"); err != nil || head.Tip == nil || head.Tip.ID != "b3" || head.ID != "b1" {
		t.Errorf("the chain is %+v, %v", head, err)
	}
	must(t, c.DeleteBackups(ctx, []string{"b1"}))
	if b, err = c.Backup(ctx, "b2"); err != nil || b.Kind != chain.Full || b.Parent != "" || b.Chain != "b1" {
		t.Errorf("merged, it is %+v, %v", b, err)
	}
}

// TestKeep has a deletion given up: what is whole is what it was, in a chain
// that has ended.
func TestKeep(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	take(t, c, increment("b3", "b1", "b2"))
	must(t, c.DamagedBackup(ctx, "b3", "a block is not what was written"))
	must(t, c.BeginDelete(ctx, []string{"b3", "b2", "b1"}, Step{Job: "j", Name: "deleting"}))
	must(t, c.DeleteBackups(ctx, nil))
	must(t, c.KeepBackups(ctx, []string{"b1", "b3", "b9"}))
	for id, want := range map[string]chain.BackupState{"b1": chain.Complete, "b2": chain.Deleting, "b3": chain.Damaged} {
		if b, err := c.Backup(ctx, id); err != nil || b.State != want {
			t.Errorf("backup %s is %q (%v), want %q", id, b.State, err, want)
		}
	}
	if ended, err := c.Chain(ctx, "b1"); err != nil || ended.State == chain.Open {
		t.Errorf("the chain is %+v, %v", ended, err)
	}
}

func TestDamage(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	take(t, c, increment("b3", "b1", "b2"))
	running := increment("b4", "b1", "b3")
	must(t, c.CreateBackup(ctx, running, "", Step{Job: "j"}))
	must(t, c.DamagedBackup(ctx, "b2", "digest differs"))
	must(t, c.CommitBackup(ctx, "b4", done(running)))
	list, err := c.ListBackups(ctx, BackupFilter{States: []chain.BackupState{chain.Damaged}}, Page{})
	must(t, err)
	got := map[string]string{}
	for _, b := range list {
		got[b.ID] = b.Error
	}
	want := map[string]string{"b2": "digest differs", "b3": "its parent is damaged", "b4": "its parent is damaged"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if broken, err := c.Chain(ctx, "b1"); err != nil || broken.State != chain.Broken || broken.Cause != chain.ParentDamaged {
		t.Errorf("got %+v, %v", broken, err)
	}
}

// TestDamageOfADisk has a block be damaged that one of those that build on it holds itself.
func TestDamageOfADisk(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	take(t, c, increment("b3", "b1", "b2"))
	states := func(want ...chain.BackupState) {
		t.Helper()
		for i, id := range []string{"b1", "b2", "b3"} {
			if b, err := c.Backup(ctx, id); err != nil || b.State != want[i] || (b.Error == "") != (b.State == chain.Complete) {
				t.Errorf("%s is %s (%s), %v", id, b.State, b.Error, err)
			}
		}
		checkInvariants(t, c)
	}
	parts := []Damage{
		{Backup: "b1", Target: "vda", Offset: 65536, Length: 65536, Image: "b1", Donor: "b9"},
		{Backup: "b2", Target: "vda", Offset: 65536, Length: 65536, Image: "b1"},
		{Backup: "b0", Target: "vda", Offset: 65536, Length: 65536, Image: "b1"}, // which is gone
	}
	must(t, c.RecordDamage(ctx, "b1", "a block", parts))
	states(chain.Damaged, chain.Damaged, chain.Complete)
	if broken, err := c.Chain(ctx, "b1"); err != nil || broken.State != chain.Broken {
		t.Errorf("the chain is %+v, %v", broken, err)
	}
	got, err := c.Damage(ctx, "b1")
	must(t, err)
	if diff := cmp.Diff(parts[:1], got); diff != "" {
		t.Error(diff)
	}
	// Both are damaged for two reasons, and good again when neither is left.
	must(t, c.RecordDamage(ctx, "b2", "another", []Damage{{Backup: "b2", Target: "vda", Length: 1}}))
	must(t, c.RecordDamage(ctx, "b1", "less", parts[:1]))
	states(chain.Damaged, chain.Damaged, chain.Complete)
	must(t, c.VerifiedBackup(ctx, "b2", epoch))
	states(chain.Damaged, chain.Complete, chain.Complete)
	must(t, c.VerifiedBackup(ctx, "b1", epoch))
	states(chain.Complete, chain.Complete, chain.Complete)
	must(t, c.DamagedBackup(ctx, "b2", "gone"))
	states(chain.Complete, chain.Damaged, chain.Damaged)
}

func TestListPages(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	for i := range 10 {
		b := fullBackup(fmt.Sprintf("b%d", i))
		b.Domain, b.Created = fmt.Sprintf("d%d", i%2), epoch.Add(time.Duration(i)*time.Hour)
		take(t, c, b)
	}
	var ids []string
	page := Page{Limit: 2}
	for {
		list, err := c.ListBackups(ctx, BackupFilter{Domain: "d1", Since: epoch.Add(2 * time.Hour), Until: epoch.Add(9 * time.Hour)}, page)
		must(t, err)
		for _, b := range list {
			ids = append(ids, b.ID)
		}
		if len(list) < page.Limit {
			break
		}
		page.After = list[len(list)-1].ID
	}
	if diff := cmp.Diff([]string{"b7", "b5", "b3"}, ids); diff != "" {
		t.Error(diff)
	}
	list, err := c.ListBackups(ctx, BackupFilter{Chain: "b4", Repository: "r1", Offering: "daily"}, Page{})
	must(t, err)
	if len(list) != 1 || list[0].ID != "b4" {
		t.Errorf("got %+v", list)
	}
}

func TestJobs(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	j := Job{ID: "j1", Kind: "backup", Domain: "d1", Repository: "r1", Backup: "b1", Spec: json.RawMessage(`{"full":true}`),
		State: JobQueued, UID: 4294967294, Created: epoch, Priority: 99, Origin: OriginSchedule, Schedule: "s1", Parent: "g1", Attempts: 3}
	must(t, c.CreateJob(ctx, j))
	mustBe(t, ErrExists, c.CreateJob(ctx, j))
	mustBe(t, ErrState, c.RecordStep(ctx, Step{Job: "j1", Name: "early"}))
	must(t, c.StartJob(ctx, "j1", epoch))
	mustBe(t, ErrState, c.StartJob(ctx, "j1", epoch))
	must(t, c.RecordStep(ctx, Step{Job: "j1", Name: "frozen", Data: json.RawMessage(`1`)}))
	must(t, c.CancelJob(ctx, "j1"))
	must(t, c.CancelJob(ctx, "j1"))
	must(t, c.FailingJob(ctx, "j1", "Cancelled", "it was cancelled", false))
	for i := range maximumMessages + 5 {
		must(t, c.AddJobMessage(ctx, "j1", Message{Time: epoch, Level: -4, Text: fmt.Sprint(i)}))
	}
	if unfinished, err := c.UnfinishedJobs(ctx); err != nil || len(unfinished) != 1 || !unfinished[0].Undoing || unfinished[0].State != JobCancelling {
		t.Errorf("got %+v, %v", unfinished, err)
	}
	end := JobEnd{State: JobCancelled, ErrorName: "Cancelled", ErrorMessage: "it was cancelled", Result: json.RawMessage(`{}`),
		Finished: epoch.Add(time.Hour), Phase: "copying", Done: 3, Total: 4}
	must(t, c.EndJob(ctx, "j1", end))
	mustBe(t, ErrState, c.EndJob(ctx, "j1", end))
	mustBe(t, ErrState, c.CancelJob(ctx, "j1"))
	mustBe(t, ErrNotFound, c.CancelJob(ctx, "j9"))
	j.State, j.Step, j.StepData, j.Undoing, j.Started = JobCancelled, "frozen", json.RawMessage(`1`), true, epoch
	j.Attempt = 1
	j.Result, j.ErrorName, j.ErrorMessage, j.Finished, j.Phase, j.Done, j.Total = end.Result, end.ErrorName, end.ErrorMessage, end.Finished, "copying", 3, 4
	got, err := c.Job(ctx, "j1")
	must(t, err)
	if diff := cmp.Diff(j, got); diff != "" {
		t.Error(diff)
	}
	messages, err := c.JobMessages(ctx, "j1")
	must(t, err)
	if len(messages) != maximumMessages || messages[0] != (Message{epoch, -4, "5"}) {
		t.Errorf("%d messages from %+v", len(messages), messages[0])
	}
}

func TestRetryJob(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	for _, id := range []string{"j1", "j2"} {
		must(t, c.CreateJob(ctx, Job{ID: id, Kind: "backup", Backup: "b1", Parent: "g", Attempts: 2, Created: epoch}))
		must(t, c.StartJob(ctx, id, epoch))
		must(t, c.RecordStep(ctx, Step{Job: id, Name: "frozen", Data: json.RawMessage(`1`)}))
		must(t, c.FailingJob(ctx, id, "Unavailable", "it is away", true))
	}
	must(t, c.CancelJob(ctx, "j2"))
	mustBe(t, ErrState, c.RetryJob(ctx, "j2", "b2", epoch))
	must(t, c.RetryJob(ctx, "j1", "b2", epoch.Add(time.Minute)))
	mustBe(t, ErrState, c.RetryJob(ctx, "j1", "b3", epoch))
	want := Job{ID: "j1", Kind: "backup", Backup: "b2", Parent: "g", State: JobQueued, Origin: OriginUser, Attempts: 2, Attempt: 1,
		ErrorName: "Unavailable", ErrorMessage: "it is away", NextTry: epoch.Add(time.Minute), Created: epoch}
	children, err := c.ChildJobs(ctx, "g")
	must(t, err)
	if diff := cmp.Diff(want, children[0]); diff != "" || len(children) != 2 {
		t.Errorf("%d children: %s", len(children), diff)
	}
	must(t, c.StartJob(ctx, "j1", epoch.Add(time.Hour)))
	got, err := c.Job(ctx, "j1")
	must(t, err)
	if got.Attempt != 2 || !got.NextTry.IsZero() || got.Undoing || got.Again {
		t.Errorf("got %+v", got)
	}
}

// TestGroupsKeepTheirJobs has a group find what it has started, however long it takes.
func TestGroupsKeepTheirJobs(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	must(t, c.CreateJob(ctx, Job{ID: "g", Kind: "group", Created: epoch}))
	must(t, c.CreateJob(ctx, Job{ID: "j", Kind: "backup", Parent: "g", Created: epoch}))
	must(t, c.EndJob(ctx, "j", JobEnd{State: JobFailed, Finished: epoch.Add(time.Minute)}))
	for _, want := range []int{1, 0} {
		must(t, c.PruneJobs(ctx, epoch.Add(time.Hour), 100))
		if children, err := c.ChildJobs(ctx, "g"); err != nil || len(children) != want {
			t.Errorf("%+v are left, %v", children, err)
		}
		if want == 1 {
			must(t, c.EndJob(ctx, "g", JobEnd{State: JobFailed, Finished: epoch.Add(2 * time.Hour)}))
		}
	}
}

func TestPruneJobs(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	for i := range 6 {
		id := fmt.Sprintf("j%d", i)
		must(t, c.CreateJob(ctx, Job{ID: id, Kind: "k", Created: epoch}))
		if i > 0 {
			must(t, c.EndJob(ctx, id, JobEnd{State: JobFailed, Finished: epoch.Add(time.Duration(i) * time.Hour)}))
			must(t, c.AddJobMessage(ctx, id, Message{Time: epoch, Text: "x"}))
		}
	}
	must(t, c.PruneJobs(ctx, epoch.Add(90*time.Minute), 3)) // j1 is too old, j2 one too many
	list, err := c.ListJobs(ctx, JobFilter{}, Page{})
	must(t, err)
	var ids []string
	for _, j := range list {
		ids = append(ids, j.ID)
	}
	if diff := cmp.Diff([]string{"j5", "j4", "j3", "j0"}, ids, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	list, err = c.ListJobs(ctx, JobFilter{States: []JobState{JobQueued}, Kind: "k"}, Page{})
	must(t, err)
	if len(list) != 1 || list[0].ID != "j0" {
		t.Errorf("got %+v", list)
	}
}

func TestConcurrentUse(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			last := ""
			for i := range 20 {
				b := fullBackup(fmt.Sprintf("b%d-%02d", worker, i))
				if i > 0 {
					b = increment(b.ID, fmt.Sprintf("b%d-00", worker), last)
				}
				b.Domain, last = fmt.Sprintf("d%d", worker), b.ID
				if err := c.CreateBackup(ctx, b, "virtbackup-"+b.ID, Step{Job: "j"}); err != nil {
					t.Error(err)
					return
				}
				if err := c.CommitBackup(ctx, b.ID, done(b)); err != nil {
					t.Error(err)
					return
				}
				head, err := c.LatestChain(ctx, b.Domain, "r1")
				if err != nil || head.Tip.ID != b.ID || head.Checkpoint.Backup != b.ID || head.Length != i+1 {
					t.Errorf("after %s: %+v, %v", b.ID, head, err)
					return
				}
			}
		})
	}
	all.Wait()
}

// TestMarks has what is known of a domain replaced, its marks numbered for
// ever, and the newest of each disk kept however many there are.
func TestMarks(t *testing.T) {
	c := openNew(t)
	ctx := t.Context()
	if known, err := c.Tracking(ctx, "d1"); err != nil || known != nil {
		t.Fatalf("of an unknown domain: %s, %v", known, err)
	}
	first := Mark{Target: "vdb", Cause: chain.ChangedWhileOff, Detail: "size", Time: epoch}
	must(t, c.SetTracking(ctx, "d1", json.RawMessage(`{"a":1}`), []Mark{first}))
	for range marksKept + 5 {
		must(t, c.SetTracking(ctx, "d1", json.RawMessage(`{"a":2}`), []Mark{{Cause: chain.Unseen, Time: epoch}}))
	}
	must(t, c.SetTracking(ctx, "d2", json.RawMessage(`{}`), nil))
	known, err := c.Tracking(ctx, "d1")
	if err != nil || string(known) != `{"a":2}` {
		t.Errorf("known is %s, %v", known, err)
	}
	marks, err := c.Marks(ctx, "d1", 0)
	must(t, err)
	first.Number, first.Domain = 1, "d1"
	if len(marks) != marksKept+1 || marks[0] != first || marks[marksKept].Number != marksKept+6 {
		t.Errorf("got %d marks from %+v on", len(marks), marks[0])
	}
	if newer, err := c.Marks(ctx, "d1", marksKept+5); err != nil || len(newer) != 1 {
		t.Errorf("newer ones: %+v, %v", newer, err)
	}
	if n, err := c.LastMark(ctx); err != nil || n != marksKept+6 {
		t.Errorf("the last one is %d, %v", n, err)
	}
	if all, err := c.TrackedDomains(ctx); err != nil || !slices.Equal(all, []string{"d1", "d2"}) {
		t.Errorf("known domains: %v, %v", all, err)
	}

	// Only what is in the catalog is kept for ever; a number is never given twice.
	must(t, c.SeenDomain(ctx, "d2", "two"))
	for _, domain := range []string{"d1", "d2"} {
		must(t, c.ForgetTracking(ctx, domain))
	}
	if all, err := c.TrackedDomains(ctx); err != nil || !slices.Equal(all, []string{"d2"}) {
		t.Errorf("known domains: %v, %v", all, err)
	}
	must(t, c.SetTracking(ctx, "d1", json.RawMessage(`{}`), []Mark{{Cause: chain.Unseen, Time: epoch}}))
	if marks, err := c.Marks(ctx, "d1", 0); err != nil || len(marks) != 1 || marks[0].Number != marksKept+7 {
		t.Errorf("after it was forgotten: %+v, %v", marks, err)
	}
}
