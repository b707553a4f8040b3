package main

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/dbus"
)

func TestUsageTable(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.Local)
	want := `OFFERING  BACKUPS  CHAINS   STORED  PROTECTED  NEWEST
(none)          1       1    100 B      200 B
gold           12       2  1.5 GiB    3.0 GiB  2026-03-04 05:06:07
`
	if diff := cmp.Diff(want, text(func(p *page) {
		usageTable(p, dbus.UsageByOffering, []dbus.Usage{
			{Backups: 1, Chains: 1, StoredBytes: 100, ProtectedBytes: 200},
			{Of: "gold", Name: "gold", Backups: 12, Chains: 2, StoredBytes: 3 << 29, ProtectedBytes: 3 << 30, Newest: at},
		})
	})); diff != "" {
		t.Error(diff)
	}
}

func TestQuotaTable(t *testing.T) {
	want := `KIND    NAME               BYTES  BACKUPS  CHAINS
domain  u-1   1.0 GiB of 2.0 GiB        3       1
user    root                 0 B   0 of 5  0 of 2
`
	if diff := cmp.Diff(want, text(func(p *page) {
		quotaTable(p, []dbus.Quota{
			{Kind: dbus.QuotaDomain, Of: "u-1", Bytes: 2 << 30, UsedBytes: 1 << 30, UsedBackups: 3, UsedChains: 1},
			{Kind: dbus.QuotaUser, Of: "0", Name: "root", Backups: 5, Chains: 2},
		})
	})); diff != "" {
		t.Error(diff)
	}
}
