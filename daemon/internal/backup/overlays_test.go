package backup

import (
	"slices"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/overlay"
)

const lastID = "01M7ZDM0000000000000000000"

// overlaid is the facts of a domain whose last backup put overlays on a qcow2
// and a raw disk.
func overlaid() facts {
	var disks []hypervisor.Disk
	bare := []hypervisor.Disk{disk("vda", "qcow2"), disk("vdb", "raw")}
	for _, k := range bare {
		k.Backing, k.Source, k.Format = []string{k.Source}, overlay.Name(k.Source, lastID), "qcow2"
		disks = append(disks, k)
	}
	f := factsOf(running(disks...))
	f.domain.Persistent = true
	f.backup, f.request.Tracking = "01M7ZDM0000000000000000001", chain.Snapshot
	f.stacked, f.made = map[string]stacked{}, map[string]string{}
	tip := &catalog.Backup{ID: lastID, State: chain.Complete}
	for i, k := range bare {
		f.stacked[k.Target] = stacked{own: own{Source: k.Source, Format: k.Format}, top: disks[i].Source, stack: []hypervisor.Stacked{
			{Path: disks[i].Source, Type: "file", Format: "qcow2"}, {Path: k.Source, Type: "file", Format: k.Format},
		}}
		f.made[k.Target] = disks[i].Source
		tip.Images = append(tip.Images, catalog.Image{Target: k.Target, Source: k.Source, Format: k.Format, Size: k.Capacity, Tracking: chain.Snapshot})
	}
	f.last = &catalog.Head{Chain: catalog.Chain{ID: "01CHAIN", Repository: "R", Offering: "daily", State: chain.Open, Length: 1}, Tip: tip}
	return f
}

// TestPlanByOverlays has backups know a disk by what is below our overlays.
func TestPlanByOverlays(t *testing.T) {
	f := overlaid()
	p, err := newPlan(f)
	if err != nil {
		t.Fatal(err)
	}
	if p.Source != sourceFrozen || p.Kind != chain.Incremental || p.Checkpoint != "" {
		t.Errorf("got %+v", p)
	}
	m := p.manifest("1.0")
	for i, k := range p.Disks {
		want := f.stacked[k.Target].own
		if image := p.image(k); k.Changes != chain.Snapshot || k.Tracking != chain.Snapshot || image.Source != want.Source || image.Format != want.Format {
			t.Errorf("got %+v, recorded as %+v", k, image)
		}
		if m.Disks[i].Source != want.Source || m.Disks[i].Format != want.Format {
			t.Errorf("the manifest has %+v", m.Disks[i])
		}
		if !slices.Equal(k.Stack, f.stacked[k.Target].stack) {
			t.Errorf("%s is to be frozen with %+v", k.Target, k.Stack)
		}
	}
	if err := p.unchanged(f.boot, f.domain); err != nil {
		t.Error(err)
	}
}

// TestNoOverlays has everything that keeps overlays from being put on disks.
func TestNoOverlays(t *testing.T) {
	for name, change := range map[string]func(*facts){
		"transient":    func(f *facts) { f.domain.Persistent = false },
		"snapshot":     func(f *facts) { f.domain.Snapshots = []hypervisor.Snapshot{{Name: "s"}} },
		"managed save": func(f *facts) { f.domain.HasManagedSave = true },
		"saved": func(f *facts) {
			f.domain.Active, f.domain.State, f.domain.StateReason = false, hypervisor.StateShutoff, "saved"
		},
		"volume":           func(f *facts) { f.domain.Disks[1].SourceType = "volume" },
		"block device":     func(f *facts) { f.domain.Disks[1].SourceType = "block"; delete(f.stacked, "vdb") },
		"on a block layer": func(f *facts) { f.stacked["vdb"].stack[1].Type = "block" },
		"network layer":    func(f *facts) { f.stacked["vda"].stack[1].Type = "network" },
		"layers not seen":  func(f *facts) { f.stacked = nil },
	} {
		f := overlaid()
		change(&f)
		p, err := newPlan(f)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, k := range p.Disks {
			if p.Source == sourceFrozen || k.Changes == chain.Snapshot || k.Tracking == chain.Snapshot || k.Stack != nil {
				t.Errorf("%s: got %+v of %s", name, k, p.Source)
			}
		}
	}
}
