package announce

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/job"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
)

// units are systemd's, in memory.
type units struct {
	raised []string
	fail   error
}

func (u *units) Raise(_ context.Context, job string) error {
	if u.fail == nil {
		u.raised = append(u.raised, job)
	}
	return u.fail
}

func (u *units) Clear(_ context.Context, job string) error {
	u.raised = slices.DeleteFunc(u.raised, func(one string) bool { return one == job })
	return u.fail
}

func (u *units) Raised(context.Context) ([]string, error) { return slices.Clone(u.raised), u.fail }

// known is what the catalog knows: jobs and their domains.
type known map[string]string

func (k known) Job(_ context.Context, id string) (catalog.Job, error) {
	if domain, ok := k[id]; ok {
		return catalog.Job{ID: id, Domain: domain}, nil
	}
	return catalog.Job{}, catalog.ErrNotFound
}

func (known) Domain(_ context.Context, uuid string) (catalog.Domain, error) {
	if uuid == "" {
		return catalog.Domain{}, catalog.ErrNotFound
	}
	return catalog.Domain{UUID: uuid, Name: "name-" + uuid}, nil
}

func (known) Repository(_ context.Context, id string) (catalog.Repository, error) {
	return catalog.Repository{ID: id, Name: "nas"}, nil
}

func (k known) UntoldJobs(context.Context) ([]catalog.Job, error) {
	return []catalog.Job{ended("7", "backup", "a", catalog.JobFailed).Job}, nil
}

func (k known) ToldJob(_ context.Context, id string) error {
	if _, ok := k[id]; !ok {
		return catalog.ErrNotFound
	}
	k["told "+id] = "yes"
	return nil
}

func ended(id, kind, domain string, state catalog.JobState) job.Status {
	st := job.Status{Job: catalog.Job{ID: id, Kind: kind, Domain: domain, State: state, Repository: "R"}}
	if state == catalog.JobFailed {
		st.ErrorName, st.ErrorMessage = "RepositoryFull", "no space"
	}
	return st
}

func TestDomainHasOneUnitUntilABackupSucceeds(t *testing.T) {
	u := &units{raised: []string{"FORGOTTEN"}}
	a := &Announcer{Catalog: known{"1": "a", "2": "b", "3": "a", "4": "a", "5": "b"}, Units: u, Log: slog.New(slog.DiscardHandler)}
	for _, step := range []struct {
		st   job.Status
		want []string
	}{
		{ended("1", "backup", "a", catalog.JobFailed), []string{"1"}},
		{ended("2", "backup", "b", catalog.JobFailed), []string{"1", "2"}},
		{ended("3", "backup", "a", catalog.JobFailed), []string{"2", "3"}},
		{ended("4", "backup", "a", catalog.JobCancelled), []string{"2", "3"}},
		{ended("9", "verify", "a", catalog.JobFailed), []string{"2", "3"}},
		{ended("4", "backup", "a", catalog.JobSucceeded), []string{"2"}},
		{ended("5", "backup", "b", catalog.JobSucceeded), nil},
	} {
		if a.Ended(t.Context(), step.st); !slices.Equal(u.raised, step.want) {
			t.Errorf("after job %s (%s): %v, and not %v", step.st.ID, step.st.State, u.raised, step.want)
		}
	}
}

func TestJournalIsToldAlsoWhenSystemdRefuses(t *testing.T) {
	var log bytes.Buffer
	a := &Announcer{Catalog: known{}, Units: &units{fail: errors.New("refused")}, Log: slog.New(slog.NewTextHandler(&log, nil))}
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // the daemon goes down
	a.Ended(ctx, ended("1", "backup", "a", catalog.JobFailed))
	for _, want := range []string{
		`level=ERROR msg="backup of domain name-a failed" message_id=` + string(journal.BackupFailed) +
			` job=1 kind=backup domain=a domain_name=name-a repository=nas error_name=RepositoryFull error="no space"`,
		`level=WARN msg="cannot have systemd know of a failed backup" job=1 error=refused`,
	} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("%s is not in %s", want, log.String())
		}
	}
}

func TestWhatADeadDaemonDidNotTellIsTold(t *testing.T) {
	u, k := &units{}, known{"7": "a"}
	a := &Announcer{Catalog: k, Units: u, Log: slog.New(slog.DiscardHandler)}
	left, err := a.Untold(t.Context())
	if err != nil || len(left) != 1 {
		t.Fatal(left, err)
	}
	if a.Ended(t.Context(), left[0]); k["told 7"] != "yes" || !slices.Equal(u.raised, []string{"7"}) {
		t.Error(k, u.raised)
	}
}

func TestMessages(t *testing.T) {
	for _, c := range []struct {
		kind  string
		state catalog.JobState
		want  journal.Message
		level slog.Level
	}{
		{"backup", catalog.JobSucceeded, journal.BackupSucceeded, slog.LevelInfo},
		{"backup", catalog.JobCancelled, journal.JobCancelled, slog.LevelInfo},
		{"restore", catalog.JobFailed, journal.RestoreFailed, slog.LevelError},
		{"restore-in-place", catalog.JobSucceeded, journal.RestoreSucceeded, slog.LevelInfo},
		{"verify", catalog.JobFailed, journal.JobFailed, slog.LevelError},
		{"check", catalog.JobSucceeded, journal.JobSucceeded, slog.LevelInfo},
	} {
		if got, level := message(c.kind, c.state); got != c.want || level != c.level {
			t.Errorf("%s %s: %s, %s", c.kind, c.state, got, level)
		}
	}
}
