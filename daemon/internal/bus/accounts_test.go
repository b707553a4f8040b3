package bus

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

func TestUsageAndQuotas(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	c, ctx := client(t, address), t.Context()
	if text, err := c.Metrics(ctx); err != nil || text != "virtbackup_libvirt_connected 1\n" {
		t.Error(text, err)
	}
	if all, err := c.Usage(ctx, dbus.UsageByOffering); err != nil || len(all) != 1 || all[0].Of != "offering" || all[0].Backups != 3 ||
		all[0].StoredBytes != 1<<40 || all[0].Newest.UnixMicro() != 1_700_000_000_000_000 {
		t.Error(all, err)
	}
	if all, err := c.Quotas(ctx); err != nil || len(all) != 1 || all[0] != (dbus.Quota{Kind: dbus.QuotaUser, Of: "7", Bytes: 1 << 40, UsedChains: 2}) {
		t.Error(all, err)
	}
	for want, err := range map[dbus.ErrorName]error{
		dbus.ErrInvalidArgument: errors.Join(func() error { _, err := c.Usage(ctx, "size"); return err }()),
		dbus.ErrNotFound:        c.SetQuota(ctx, dbus.QuotaDomain, "nobody", dbus.QuotaOptions{Bytes: new(uint64(1))}),
	} {
		if !errors.Is(err, want) {
			t.Errorf("%v; %s is expected", err, want)
		}
	}
	if err := c.SetQuota(ctx, "host", "x", dbus.QuotaOptions{}); !errors.Is(err, dbus.ErrInvalidArgument) {
		t.Error(err)
	}
	for _, err := range []error{
		c.SetQuota(ctx, dbus.QuotaDomain, "web", dbus.QuotaOptions{Bytes: new(uint64(5))}),
		c.RemoveQuota(ctx, dbus.QuotaOffering, "gone"),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	uid := func(what string) string { return strconv.Itoa(os.Getuid()) + " " + what }
	if got, want := m.requests(), []string{uid("quota of domain web bytes=5 backups=true"), uid("no quota of offering gone")}; !slices.Equal(got, want) {
		t.Errorf("%q; %q is expected", got, want)
	}
}
