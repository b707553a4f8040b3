package service

import (
	"errors"
	"fmt"
	"os/user"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/backup"
	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/metrics"
	"github.com/virtbackup/virtbackup/dbus"
)

// stored records a backup of these sizes that is complete.
func stored(t *testing.T, s *Service, id, offering string, uid uint32, size, bytes uint64) {
	t.Helper()
	image := catalog.Image{Target: "vda", Kind: chain.Full, Tracking: chain.None, Size: size, StoredBytes: bytes}
	b := catalog.Backup{ID: id, Domain: domainUUID, DomainName: "web", Repository: "ID-nas", Kind: chain.Full, Isolated: true, Offering: offering, UID: uid,
		Created: time.UnixMicro(1_700_000_000_000_000), Images: []catalog.Image{image}}
	err := s.Catalog.CreateJob(t.Context(), catalog.Job{ID: "J" + id, Kind: "backup", Domain: domainUUID, Created: time.Now()})
	if err == nil {
		err = s.Catalog.StartJob(t.Context(), "J"+id, time.Now())
	}
	if err == nil {
		err = s.Catalog.CreateBackup(t.Context(), b, "", catalog.Step{Job: "J" + id, Name: "planned"})
	}
	if err == nil {
		err = s.Catalog.CommitBackup(t.Context(), id, catalog.Commit{Finished: time.Now(), Images: b.Images})
	}
	if err == nil {
		err = s.Catalog.EndJob(t.Context(), "J"+id, catalog.JobEnd{State: catalog.JobSucceeded, Finished: time.Now()})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestUsageHasNames(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas", "tape")
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	stored(t, s, "B1", "daily", 0, 100, 60)
	stored(t, s, "B2", "", 4_000_000_000, 110, 7)
	root, err := user.LookupId("0")
	if err != nil {
		t.Fatal(err)
	}
	at := time.UnixMicro(1_700_000_000_000_000).UTC()
	for by, want := range map[dbus.UsageBy][]dbus.Usage{
		dbus.UsageByDomain: {{Of: domainUUID, Name: "web", Backups: 2, Chains: 2, StoredBytes: 67, ProtectedBytes: 110, Newest: at}},
		dbus.UsageByOffering: {
			{Of: "", Name: "", Backups: 1, Chains: 1, StoredBytes: 7, ProtectedBytes: 110, Newest: at},
			{Of: "daily", Name: "daily", Backups: 1, Chains: 1, StoredBytes: 60, ProtectedBytes: 100, Newest: at},
		},
		dbus.UsageByUser: {
			{Of: "0", Name: root.Username, Backups: 1, Chains: 1, StoredBytes: 60, ProtectedBytes: 100, Newest: at},
			{Of: "4000000000", Name: "4000000000", Backups: 1, Chains: 1, StoredBytes: 7, ProtectedBytes: 110, Newest: at},
		},
		dbus.UsageByRepository: {{Of: "ID-nas", Name: "nas", Backups: 2, Chains: 2, StoredBytes: 67, ProtectedBytes: 110, Newest: at}},
	} {
		got, err := s.ListUsage(t.Context(), by)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("by %s: %v, %v; %v is expected", by, got, err, want)
		}
	}
}

func TestMetricsAreOfDomainsRepositoriesAndJobs(t *testing.T) {
	s, _ := newService(t)
	s.Version, s.Ended = "1.0", &metrics.Counter{}
	s.Ended.Count("backup", "succeeded", time.Second)
	s.domains = map[string]hypervisor.Domain{domainUUID: {UUID: domainUUID, Name: "web2"}, "u2": {UUID: "u2", Name: "mail"}}
	withRepositories(t, s, "nas")
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	if err := s.Catalog.AssignDomain(t.Context(), domainUUID, "web", "daily"); err != nil {
		t.Fatal(err)
	}
	stored(t, s, "B1", "daily", 0, 100, 60)
	text, err := s.Metrics(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`virtbackup_build_info{version="1.0"} 1`,
		`virtbackup_domain_info{domain="web2",uuid="` + domainUUID + `",offering="daily"} 1`,
		`virtbackup_domain_protection{domain="web2",uuid="` + domainUUID + `",protection="protected"} 1`,
		`virtbackup_domain_protection{domain="mail",uuid="u2",protection="unassigned"} 1`,
		`virtbackup_domain_last_success_timestamp_seconds{domain="web2",uuid="` + domainUUID + `"} 1.7e+09`,
		`virtbackup_domain_last_backup_succeeded{domain="web2",uuid="` + domainUUID + `"} 1`,
		`virtbackup_domain_stored_bytes{domain="web2",uuid="` + domainUUID + `"} 60`,
		`virtbackup_domain_protected_bytes{domain="web2",uuid="` + domainUUID + `"} 100`,
		`virtbackup_repository_stored_bytes{repository="nas"} 60`,
		`virtbackup_jobs{operation="backup",state="running"} 0`,
		`virtbackup_job_duration_seconds_count{operation="backup",result="succeeded"} 1`,
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("%s is not in\n%s", want, text)
		}
	}
	if strings.Contains(text, `virtbackup_domain_last_backup_succeeded{domain="mail"`) {
		t.Error("a domain that was never backed up has a result")
	}
}

func TestQuotaIsSetChangedAndRemoved(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	makeOffering(t, s, "daily", "nas", dbus.Settings{})
	stored(t, s, "B1", "daily", 7, 100, 60)
	ctx, who := t.Context(), bus.Caller{}
	set := func(kind dbus.QuotaKind, name string, o dbus.QuotaOptions) error {
		return s.SetQuota(ctx, who, kind, name, o)
	}
	for name, err := range map[string]error{
		"nothing":         set(dbus.QuotaOffering, "daily", dbus.QuotaOptions{}),
		"zeroes":          set(dbus.QuotaOffering, "daily", dbus.QuotaOptions{Bytes: new(uint64(0))}),
		"too large":       set(dbus.QuotaOffering, "daily", dbus.QuotaOptions{Bytes: new(uint64(1 << 63))}),
		"no such user":    set(dbus.QuotaUser, "no-such-user", dbus.QuotaOptions{Bytes: new(uint64(1))}),
		"no such uid":     set(dbus.QuotaUser, "-1", dbus.QuotaOptions{Bytes: new(uint64(1))}),
		"no such quota":   s.RemoveQuota(ctx, who, dbus.QuotaUser, "root"),
		"of what is gone": s.RemoveQuota(ctx, who, dbus.QuotaOffering, "gone"),
	} {
		if !errors.Is(err, dbus.ErrInvalidArgument) && !errors.Is(err, dbus.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, err := range []error{
		set(dbus.QuotaOffering, "daily", dbus.QuotaOptions{Bytes: new(uint64(1000)), Backups: new(uint32(3))}),
		set(dbus.QuotaOffering, "daily", dbus.QuotaOptions{Bytes: new(uint64(0)), Chains: new(uint32(1))}), // the other stays
		set(dbus.QuotaUser, "root", dbus.QuotaOptions{Backups: new(uint32(1))}),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	all, err := s.ListQuotas(ctx)
	want := []dbus.Quota{
		{Kind: "offering", Of: "daily", Name: "daily", Backups: 3, Chains: 1, UsedBytes: 60, UsedBackups: 1, UsedChains: 1},
		{Kind: "user", Of: "0", Name: "root", Backups: 1},
	}
	if err != nil || fmt.Sprint(all) != fmt.Sprint(want) {
		t.Errorf("%v, %v; %v is expected", all, err, want)
	}
	request := backup.Request{Domain: domainUUID, Offering: "daily", Settings: catalog.Settings{Mode: chain.ModeIncremental}}
	if err := s.withinQuota(ctx, bus.Caller{UID: 7}, "web", request); err != nil {
		t.Error("an increment starts no chain: ", err)
	}
	request.Full = true
	if err := s.withinQuota(ctx, bus.Caller{UID: 7}, "web", request); !errors.Is(err, dbus.ErrQuotaExceeded) {
		t.Error(err)
	}
	if err := errors.Join(s.RemoveQuota(ctx, who, dbus.QuotaOffering, "daily"), s.RemoveQuota(ctx, who, dbus.QuotaUser, "0")); err != nil {
		t.Error(err)
	}
	if err := s.withinQuota(ctx, bus.Caller{UID: 7}, "web", request); err != nil {
		t.Error(err)
	}
}
