package catalog

import (
	"context"
	"database/sql"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// TestNoTableIsReadWhole has SQLite tell how it finds what the API asks for: a
// catalog may have a hundred thousand backups.
func TestNoTableIsReadWhole(t *testing.T) {
	c := openNew(t)
	all := map[string][]any{
		"SELECT max(sequence) + 1 FROM backups": nil, // of each commit
		summaryQuery:                            nil,
		"SELECT " + chainColumns + ` FROM chains WHERE domain = ? AND repository = ? AND isolated = 0 ORDER BY state = 'open' DESC, id DESC LIMIT 1`: {"d", "r"},
		"SELECT " + chainColumns + " FROM chains WHERE domain = ? ORDER BY id DESC LIMIT 100":                                                        {"d"},
		"SELECT " + jobColumns + " FROM jobs WHERE finished = 0 ORDER BY id DESC LIMIT 100":                                                          nil,
		"SELECT " + jobColumns + " FROM jobs WHERE state IN (?) ORDER BY id DESC LIMIT 100":                                                          {"failed"},
		"SELECT id FROM backups WHERE id >= ?1 AND id < ?1 || '~' AND state NOT IN ('running', 'failed') ORDER BY id LIMIT 2":                        {"01"},
	}
	for _, f := range []BackupFilter{
		{Domain: "d"}, {Repository: "r"}, {Chain: "c"}, {Offering: "o"}, {Domain: "d", States: []chain.BackupState{chain.Complete}},
		{States: []chain.BackupState{chain.Running}}, {States: []chain.BackupState{chain.Damaged}}, {States: []chain.BackupState{chain.Deleting}},
	} {
		query, args := f.query(Page{})
		all[query] = args
	}
	// Indexes of what there are never many of.
	few := []string{"backups_running", "backups_damaged", "backups_deleting", "jobs_live"}
	for query, args := range all {
		var steps []string
		must(t, c.read(t.Context(), "explain", func(tx *sql.Tx) (err error) {
			steps, err = plan(t.Context(), tx, query, args)
			return err
		}))
		for _, step := range steps {
			index, _ := strings.CutPrefix(step, "SCAN ")
			_, index, _ = strings.Cut(index, " USING INDEX ")
			if strings.HasPrefix(step, "SCAN") && step != "SCAN d" && !slices.Contains(few, index) {
				t.Errorf("%s\n%s", query, strings.Join(steps, "\n"))
			}
		}
	}
}

func plan(ctx context.Context, tx *sql.Tx, query string, args []any) ([]string, error) {
	return collect(ctx, tx, func(from row) (step string, err error) {
		var id, parent, unused int
		err = from.Scan(&id, &parent, &unused, &step)
		return step, err
	}, "EXPLAIN QUERY PLAN "+query, args...)
}

func TestSummariesTellHowDomainsAreProtected(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	must(t, c.AssignDomain(ctx, "d1", "web", "daily"))
	must(t, c.SeenDomain(ctx, "d2", "mail"))
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	must(t, c.CreateBackup(ctx, increment("b3", "b1", "b2"), "", Step{Job: "j", Name: "created"}))
	must(t, c.CreateJob(ctx, Job{ID: "j1", Kind: "backup", Domain: "d1", Created: epoch}))
	must(t, c.EndJob(ctx, "j1", JobEnd{State: JobFailed, ErrorMessage: "no space", Finished: epoch}))
	must(t, c.CreateJob(ctx, Job{ID: "j2", Kind: "verify", Domain: "d1", Created: epoch}))
	must(t, c.EndJob(ctx, "j2", JobEnd{State: JobSucceeded, Finished: epoch}))
	all, err := c.Summaries(ctx, "")
	if err != nil || len(all) != 2 {
		t.Fatal(all, err)
	}
	for _, s := range all {
		one, err := c.Summaries(ctx, s.UUID)
		if err != nil || len(one) != 1 || one[0].LastBackup != s.LastBackup || one[0].Name != s.Name {
			t.Error(one, err)
		}
		want := Summary{Domain: Domain{UUID: "d2", Name: "mail"}}
		if s.UUID == "d1" {
			want = Summary{Domain: Domain{UUID: "d1", Name: "web", Offering: "daily"}, LastBackup: "b2", LastBackupTime: epoch,
				LastJob: JobFailed, LastError: "no space", Chain: "b1", ChainLength: 2}
		}
		if s.UUID != want.UUID || s.Offering != want.Offering || s.LastBackup != want.LastBackup || !s.LastBackupTime.Equal(want.LastBackupTime) ||
			s.LastJob != want.LastJob || s.LastError != want.LastError || s.Chain != want.Chain || s.ChainLength != want.ChainLength {
			t.Errorf("%+v, want %+v", s, want)
		}
	}
	if none, err := c.Summaries(ctx, "d3"); len(none) > 0 || err != nil {
		t.Error(none, err)
	}
}

func TestListsHaveWhatSingleReadsHave(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	isolated := fullBackup("b3")
	isolated.Isolated = true
	take(t, c, isolated)
	must(t, c.AddJobMessage(ctx, "j", Message{Time: epoch, Level: 0, Text: "well"}))
	must(t, c.AddJobMessage(ctx, "j", Message{Time: epoch, Level: 4, Text: "not so well"}))
	list, children, err := c.WholeBackups(ctx, BackupFilter{}, Page{})
	if err != nil || len(list) != 3 || list[2].ID != "b1" || len(children) != 1 || len(children["b1"]) != 1 || children["b1"][0] != "b2" {
		t.Fatal(list, children, err)
	}
	for _, got := range list {
		want, err := c.Backup(ctx, got.ID)
		if err != nil || string(got.Manifest) != string(want.Manifest) || len(got.Images) != 1 || got.Images[0].Target != want.Images[0].Target {
			t.Errorf("%+v, want %+v, %v", got, want, err)
		}
	}
	chains, err := c.ListChains(ctx, ChainFilter{Domain: "d1", Repository: "r1"}, Page{})
	if err != nil || len(chains) != 2 || chains[0].ID != "b3" {
		t.Error(chains, err)
	}
	if open, err := c.ListChains(ctx, ChainFilter{States: []chain.State{chain.Open}}, Page{}); err != nil || len(open) != 1 || open[0].ID != "b1" {
		t.Error(open, err)
	}
	links, err := c.Links(ctx, []string{"b1", "b3"})
	if err != nil || len(links["b1"]) != 2 || links["b1"][0].ID != "b1" || links["b1"][1].ID != "b2" || links["b1"][1].StoredBytes != 4 || len(links["b3"]) != 1 {
		t.Error(links, err)
	}
	warnings, err := c.JobWarnings(ctx, []string{"j", "other"})
	if err != nil || len(warnings) != 1 || len(warnings["j"]) != 1 || warnings["j"][0] != "not so well" {
		t.Error(warnings, err)
	}
	if live, err := c.ListJobs(ctx, JobFilter{Unfinished: true}, Page{}); err != nil || len(live) != 1 {
		t.Error(live, err)
	}
	must(t, c.EndJob(ctx, "j", JobEnd{State: JobSucceeded, Finished: time.Now()}))
	if live, err := c.ListJobs(ctx, JobFilter{Unfinished: true}, Page{}); err != nil || len(live) != 0 {
		t.Error(live, err)
	}
}
