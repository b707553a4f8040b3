package catalog

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/quota"
)

// store makes a committed backup of these sizes.
func store(t *testing.T, c *Catalog, b Backup, size, stored uint64) {
	t.Helper()
	must(t, c.CreateBackup(t.Context(), b, "", Step{Job: "j", Name: "planned"}))
	i := b.Images[0]
	i.Size, i.StoredBytes = size, stored
	must(t, c.CommitBackup(t.Context(), b.ID, Commit{Finished: epoch, Images: []Image{i}}))
}

func of(b Backup, domain, offering, repository string, uid uint32, created time.Time) Backup {
	b.Domain, b.DomainName, b.Offering, b.Repository, b.UID, b.Created = domain, "name-"+domain, offering, repository, uid, created
	return b
}

func TestUsage(t *testing.T) {
	c := openNew(t)
	fixture(t, c)
	later := epoch.Add(time.Hour)
	store(t, c, of(fullBackup("b1"), "d1", "daily", "r1", 0, epoch), 100, 50)
	store(t, c, of(increment("b2", "b1", "b1"), "d1", "daily", "r1", 7, later), 120, 5)
	store(t, c, of(fullBackup("b3"), "d1", "", "r2", 7, epoch), 100, 40)
	store(t, c, of(fullBackup("b4"), "d2", "daily", "r1", 10, epoch), 1000, 1)
	must(t, c.DamagedBackup(t.Context(), "b2", "x")) // it takes space, and protects nothing
	must(t, c.CreateBackup(t.Context(), of(fullBackup("b5"), "d2", "daily", "r1", 10, later), "", Step{Job: "j", Name: "planned"}))
	must(t, c.CreateBackup(t.Context(), of(fullBackup("b6"), "d1", "daily", "r1", 10, later), "", Step{Job: "j", Name: "planned"}))
	must(t, c.FailBackup(t.Context(), "b6", "x", later))
	for by, want := range map[UsageBy][]Usage{
		ByDomain: {
			{Of: "d1", Backups: 3, Chains: 2, StoredBytes: 95, ProtectedBytes: 100, Newest: epoch},
			{Of: "d2", Backups: 1, Chains: 1, StoredBytes: 1, ProtectedBytes: 1000, Newest: epoch},
		},
		ByOffering: {
			{Of: "", Backups: 1, Chains: 1, StoredBytes: 40, ProtectedBytes: 100, Newest: epoch},
			{Of: "daily", Backups: 3, Chains: 2, StoredBytes: 56, ProtectedBytes: 1100, Newest: epoch},
		},
		ByUser: {
			{Of: "0", Backups: 1, Chains: 1, StoredBytes: 50, ProtectedBytes: 100, Newest: epoch},
			{Of: "7", Backups: 2, Chains: 2, StoredBytes: 45, ProtectedBytes: 100, Newest: epoch},
			{Of: "10", Backups: 1, Chains: 1, StoredBytes: 1, ProtectedBytes: 1000, Newest: epoch},
		},
		ByRepository: {
			{Of: "r1", Backups: 3, Chains: 2, StoredBytes: 56, ProtectedBytes: 1100, Newest: epoch},
			{Of: "r2", Backups: 1, Chains: 1, StoredBytes: 40, ProtectedBytes: 100, Newest: epoch},
		},
	} {
		got, err := c.Usage(t.Context(), by)
		must(t, err)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("by %s: %s", by, diff)
		}
	}
	if _, err := c.Usage(t.Context(), "size"); err == nil {
		t.Error("usage is told by anything")
	}
	for subject, want := range map[Quota]quota.Use{
		{Kind: QuotaDomain, Subject: "d1"}:      {Bytes: 95, Backups: 3, Chains: 2},
		{Kind: QuotaDomain, Subject: "d2"}:      {Bytes: 1, Backups: 1, Chains: 1, Running: 1, RunningChains: 1},
		{Kind: QuotaOffering, Subject: "daily"}: {Bytes: 56, Backups: 3, Chains: 2, Running: 1, RunningChains: 1},
		{Kind: QuotaUser, Subject: "7"}:         {Bytes: 45, Backups: 2, Chains: 2},
		{Kind: QuotaUser, Subject: "1"}:         {},
	} {
		got, err := c.QuotaUse(t.Context(), subject.Kind, subject.Subject)
		must(t, err)
		if got != want {
			t.Errorf("%s %s: %+v, and not %+v", subject.Kind, subject.Subject, got, want)
		}
	}
}

func TestQuotasForbidBackups(t *testing.T) {
	c := openNew(t)
	fixture(t, c)
	store(t, c, of(fullBackup("b1"), "d1", "daily", "r1", 7, epoch), 100, 50)
	next, full := increment("b2", "b1", "b1"), fullBackup("b3")
	next, full = of(next, "d1", "daily", "r1", 7, epoch), of(full, "d1", "daily", "r1", 7, epoch)
	for _, q := range []struct {
		Quota
		next, full error
	}{
		{Quota{QuotaDomain, "d1", quota.Limits{Backups: 1}}, ErrQuota, ErrQuota},
		{Quota{QuotaDomain, "d1", quota.Limits{Backups: 2}}, nil, nil},
		{Quota{QuotaDomain, "d2", quota.Limits{Backups: 1}}, nil, nil},
		{Quota{QuotaOffering, "daily", quota.Limits{Bytes: 50}}, ErrQuota, ErrQuota},
		{Quota{QuotaOffering, "weekly", quota.Limits{Bytes: 50}}, nil, nil},
		{Quota{QuotaUser, "7", quota.Limits{Chains: 1}}, nil, ErrQuota},
		{Quota{QuotaUser, "0", quota.Limits{Chains: 1}}, nil, nil},
	} {
		must(t, c.SetQuota(t.Context(), q.Quota))
		mustBe(t, q.next, c.CheckQuota(t.Context(), next))
		mustBe(t, q.full, c.CheckQuota(t.Context(), full))
		if q.full != nil { // what is asked for too early is refused when it begins
			mustBe(t, ErrQuota, c.CreateBackup(t.Context(), full, "", Step{Job: "j", Name: "planned"}))
		}
		all, err := c.Quotas(t.Context())
		must(t, err)
		if diff := cmp.Diff([]Quota{q.Quota}, all); diff != "" {
			t.Error(diff)
		}
		must(t, c.RemoveQuota(t.Context(), q.Kind, q.Subject))
		mustBe(t, ErrNotFound, c.RemoveQuota(t.Context(), q.Kind, q.Subject))
	}
	must(t, c.SetQuota(t.Context(), Quota{QuotaDomain, "d1", quota.Limits{Backups: 1}}))
	const want = `cannot back up domain name-d1: the quota is used up for domain "name-d1": 1 of 1 backups are used: delete backups, or have the quota raised`
	if err := c.CheckQuota(t.Context(), next); err == nil || err.Error() != want {
		t.Error(err)
	}
}

func TestEndsAreToldOnce(t *testing.T) {
	c := openNew(t)
	fixture(t, c) // with a job that runs
	ids := func() (ids []string) {
		t.Helper()
		list, err := c.UntoldJobs(t.Context())
		must(t, err)
		for _, j := range list {
			ids = append(ids, j.ID)
		}
		return ids
	}
	for _, id := range []string{"k2", "k1"} {
		must(t, c.CreateJob(t.Context(), Job{ID: id, Kind: "check", Created: epoch}))
		must(t, c.EndJob(t.Context(), id, JobEnd{State: JobFailed, Finished: epoch}))
	}
	if got := ids(); !slices.Equal(got, []string{"k1", "k2"}) {
		t.Error(got)
	}
	must(t, c.ToldJob(t.Context(), "k1"))
	if got := ids(); !slices.Equal(got, []string{"k2"}) {
		t.Error(got)
	}
	mustBe(t, ErrNotFound, c.ToldJob(t.Context(), "k3"))
}

// BenchmarkUsage is of 1,000 domains and 100,000 backups.
func BenchmarkUsage(b *testing.B) {
	f := filling{path: b.TempDir() + "/catalog", domains: 1000, each: 100, now: epoch}
	c, err := Open(b.Context(), f.path)
	must(b, err)
	defer c.Close()
	must(b, f.fill(b.Context(), c))
	for _, by := range []UsageBy{ByDomain, ByOffering, ByUser, ByRepository} {
		b.Run(string(by), func(b *testing.B) {
			for range b.N {
				all, err := c.Usage(b.Context(), by)
				must(b, err)
				if len(all) == 0 {
					b.Fatal("nothing")
				}
			}
		})
	}
	for kind, subject := range map[QuotaKind]string{QuotaDomain: f.uuid(1), QuotaUser: "0"} {
		b.Run(fmt.Sprint("quota of ", kind), func(b *testing.B) {
			for range b.N {
				u, err := c.QuotaUse(b.Context(), kind, subject)
				must(b, err)
				if u.Backups == 0 {
					b.Fatal("nothing")
				}
			}
		})
	}
}
