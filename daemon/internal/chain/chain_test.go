package chain

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// good is a domain with one qcow2 and one raw disk, and a chain that can go on.
func good() (Options, Domain, *Last) {
	return Options{Backup: "b4", Mode: ModeIncremental, Offering: "daily", Repository: "r1", ChainSize: 7, Tracking: CBT, Fallback: FallbackDigest},
		Domain{Disks: []Disk{
			{Target: "vda", Source: "/d/a.qcow2", Format: "qcow2", Size: 10, Bitmap: BitmapValid},
			{Target: "vdb", Source: "/d/b.qcow2", Format: "qcow2", Size: 20, Bitmap: BitmapValid},
			{Target: "vdc", Source: "/d/c.raw", Format: "raw", Size: 30},
		}},
		&Last{
			Chain: "c1", State: Open, Offering: "daily", Repository: "r1", Length: 3,
			Backup: "b3", BackupState: Complete, Checkpoint: "virtbackup-b3",
			Disks: []LastDisk{
				{Target: "vda", Source: "/d/a.qcow2", Format: "qcow2", Size: 10, CBT: true},
				{Target: "vdb", Source: "/d/b.qcow2", Format: "qcow2", Size: 20, CBT: true},
				{Target: "vdc", Source: "/d/c.raw", Format: "raw", Size: 30},
			},
		}
}

func TestDecideIncrement(t *testing.T) {
	want := Verdict{Kind: Incremental, Parent: "b3", Chain: "c1", Checkpoint: true, Disks: []DiskVerdict{
		{Target: "vda", Kind: Incremental, Changes: CBT, Base: "virtbackup-b3", Tracking: CBT},
		{Target: "vdb", Kind: Incremental, Changes: CBT, Base: "virtbackup-b3", Tracking: CBT},
		{Target: "vdc", Kind: Incremental, Changes: Digest, Cause: RawDisk, Tracking: Digest},
	}}
	if diff := cmp.Diff(want, Decide(good())); diff != "" {
		t.Error(diff)
	}
}

// TestDecideNewChain has everything that starts a new chain, one at a time.
func TestDecideNewChain(t *testing.T) {
	for _, c := range []struct {
		want       Cause
		checkpoint bool
		change     func(*Options, *Domain, *Last)
	}{
		{Isolated, false, func(o *Options, _ *Domain, _ *Last) { o.Isolated = true }},
		{FullMode, false, func(o *Options, _ *Domain, _ *Last) { o.Mode = ModeFull }},
		{FullRequested, true, func(o *Options, _ *Domain, _ *Last) { o.Full = true }},
		{RepositoryChanged, true, func(o *Options, _ *Domain, _ *Last) { o.Repository = "r2" }},
		{OfferingChanged, true, func(o *Options, _ *Domain, _ *Last) { o.Offering = "weekly" }},
		{ClockSetBack, true, func(o *Options, _ *Domain, _ *Last) { o.Backup = "b2" }},
		{ChainSize, true, func(o *Options, _ *Domain, _ *Last) { o.ChainSize = 3 }},
		{ChainSize, true, func(o *Options, _ *Domain, _ *Last) { o.ChainSize = 1 }},
		{ChainFinished, true, func(_ *Options, _ *Domain, l *Last) { l.State = Finished }},
		{BackupDeleted, true, func(_ *Options, _ *Domain, l *Last) { l.State, l.Cause = Finished, BackupDeleted }},
		{ChainBroken, true, func(_ *Options, _ *Domain, l *Last) { l.State = Broken }},
		{ParentMissing, true, func(_ *Options, _ *Domain, l *Last) { l.Backup = "" }},
		{ParentMissing, true, func(_ *Options, _ *Domain, l *Last) { l.BackupState = Deleting }},
		{ParentDamaged, true, func(_ *Options, _ *Domain, l *Last) { l.BackupState = Damaged }},
		{CheckpointMissing, true, func(_ *Options, d *Domain, l *Last) { d.Disks, l.Checkpoint = d.Disks[:2], "" }},
		{InternalSnapshot, false, func(_ *Options, d *Domain, _ *Last) { d.Disks, d.InternalSnapshots = d.Disks[:2], true }},
		{RawDisk, false, func(_ *Options, d *Domain, _ *Last) { d.Disks = d.Disks[2:] }},
		{NoDiskTracked, true, func(_ *Options, d *Domain, _ *Last) {
			d.Disks[0].Bitmap, d.Disks[1].Size = BitmapInconsistent, 21
		}},
	} {
		o, d, last := good()
		o.Fallback = FallbackFull
		c.change(&o, &d, last)
		v := Decide(o, d, last)
		if v.Kind != Full || v.Cause != c.want || v.Parent != "" || v.Chain != "" || v.Checkpoint != c.checkpoint {
			t.Errorf("%s: got %+v", c.want, v)
		}
		for _, disk := range v.Disks {
			if disk.Kind != Full || disk.Base != "" || disk.Cause == "" {
				t.Errorf("%s: disk %+v in a full backup", c.want, disk)
			}
		}
	}
}

func TestDecideFirst(t *testing.T) {
	o, d, _ := good()
	if v := Decide(o, d, nil); v.Kind != Full || v.Cause != FirstBackup || !v.Checkpoint {
		t.Errorf("got %+v", v)
	}
}

// TestDecideDemotesOneDisk has everything that keeps one disk from being an
// increment by its bitmap, while the others go on.
func TestDecideDemotesOneDisk(t *testing.T) {
	for _, c := range []struct {
		want    Cause
		compare bool // with the parent's digests
		change  func(*Options, *Disk, *LastDisk)
	}{
		{DiskAttached, false, func(_ *Options, _ *Disk, l *LastDisk) { l.Target = "vdx" }},
		{DiskResized, false, func(_ *Options, d *Disk, _ *LastDisk) { d.Size++ }},
		{DiskResized, false, func(_ *Options, d *Disk, _ *LastDisk) { d.Size-- }},
		{DiskReplaced, true, func(_ *Options, d *Disk, _ *LastDisk) { d.Source = "/d/other.qcow2" }},
		{DiskReplaced, true, func(_ *Options, _ *Disk, l *LastDisk) { l.Format = "raw" }},
		{DiskReplaced, true, func(_ *Options, d *Disk, l *LastDisk) { d.Run, d.Node, l.Run, l.Node = "1", 5, "1", 3 }},
		{ChangedWhileOff, true, func(_ *Options, d *Disk, _ *LastDisk) { d.Unseen = ChangedWhileOff }},
		{RawDisk, true, func(_ *Options, d *Disk, l *LastDisk) { d.Format, l.Format = "raw", "raw" }},
		{CheckpointMissing, true, func(_ *Options, _ *Disk, l *LastDisk) { l.CBT = false }},
		{CheckpointMissing, true, func(_ *Options, d *Disk, _ *LastDisk) { d.Bitmap = BitmapMissing }},
		{CheckpointMissing, true, func(_ *Options, d *Disk, _ *LastDisk) { d.Bitmap = "" }},
		{BitmapBroken, true, func(_ *Options, d *Disk, _ *LastDisk) { d.Bitmap = BitmapInconsistent }},
	} {
		for _, fallback := range []Fallback{"", FallbackDigest, FallbackFull} {
			o, d, last := good()
			o.Fallback = fallback
			c.change(&o, &d.Disks[1], &last.Disks[1])
			v := Decide(o, d, last)
			if v.Kind != Incremental || v.Parent != "b3" || v.Disks[0].Changes != CBT {
				t.Errorf("%s: the others do not go on: %+v", c.want, v)
			}
			want := DiskVerdict{Target: "vdb", Kind: Full, Cause: c.want, Tracking: v.Disks[1].Tracking}
			if c.compare && fallback != FallbackFull {
				want.Kind, want.Changes = Incremental, Digest
			}
			if diff := cmp.Diff(want, v.Disks[1]); diff != "" {
				t.Errorf("%s with fallback %q: %s", c.want, fallback, diff)
			}
		}
	}
}

// TestDecideGoesOnOverLayers has snapshots that were put on top of a disk, or
// committed into it, and a new run of QEMU: bitmaps go along with all of these.
func TestDecideGoesOnOverLayers(t *testing.T) {
	for name, change := range map[string]func(*Disk, *LastDisk){
		"snapshot": func(d *Disk, _ *LastDisk) { d.Source, d.Backing = "/d/overlay", []string{"/d/b.qcow2"} },
		"commit":   func(d *Disk, l *LastDisk) { l.Source, l.Backing = "/d/overlay", []string{"/d/b.qcow2"} },
		"started":  func(d *Disk, l *LastDisk) { d.Run, d.Node, l.Run, l.Node = "2", 5, "1", 3 },
		"stopped":  func(_ *Disk, l *LastDisk) { l.Run, l.Node = "1", 3 },
		"same run": func(d *Disk, l *LastDisk) { d.Run, d.Node, l.Run, l.Node = "1", 3, "1", 3 },
	} {
		o, d, last := good()
		change(&d.Disks[1], &last.Disks[1])
		if got := Decide(o, d, last).Disks[1]; got.Changes != CBT || got.Cause != "" {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func TestDecideByDigestAlone(t *testing.T) {
	for _, fallback := range []Fallback{FallbackDigest, FallbackFull} {
		o, d, last := good()
		o.Tracking, o.Fallback, d.Disks = Digest, fallback, d.Disks[:2]
		v := Decide(o, d, last)
		if v.Kind != Incremental || v.Checkpoint {
			t.Errorf("got %+v", v)
		}
		for _, disk := range v.Disks {
			if disk.Changes != Digest || disk.Cause != OfferingDigest || disk.Tracking != Digest {
				t.Errorf("got %+v", disk)
			}
		}
	}
}

// overlaid is good with the tracking by overlays, which the last backup made.
func overlaid() (Options, Domain, *Last) {
	o, d, last := good()
	o.Tracking, d.Overlays, last.Checkpoint = Snapshot, true, ""
	for i := range d.Disks {
		d.Disks[i].Overlay = d.Disks[i].Source + ".b3"
		d.Disks[i].Bitmap, last.Disks[i].CBT, last.Disks[i].Overlaid, last.Disks[i].Overlay = "", false, true, d.Disks[i].Overlay
	}
	return o, d, last
}

func TestDecideByOverlay(t *testing.T) {
	v := Decide(overlaid())
	if v.Kind != Incremental || v.Checkpoint {
		t.Errorf("got %+v", v)
	}
	for _, disk := range v.Disks { // the raw one too
		if disk.Changes != Snapshot || disk.Cause != "" || disk.Base != "" || disk.Tracking != Snapshot {
			t.Errorf("got %+v", disk)
		}
	}
}

// TestDecideDemotesByOverlay has everything that keeps a disk from being an
// increment by its overlay.
func TestDecideDemotesByOverlay(t *testing.T) {
	for _, c := range []struct {
		want     Cause
		compare  bool
		tracking Tracking
		change   func(*Options, *Domain, *Disk, *LastDisk)
	}{
		{DiskAttached, false, Snapshot, func(_ *Options, _ *Domain, _ *Disk, l *LastDisk) { l.Target = "vdx" }},
		{DiskResized, false, Snapshot, func(_ *Options, _ *Domain, d *Disk, _ *LastDisk) { d.Size++ }},
		{DiskReplaced, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, _ *LastDisk) { d.Source = "/d/other.qcow2" }},
		{DiskReplaced, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, l *LastDisk) { d.Run, d.Node, l.Run, l.Node = "1", 5, "1", 3 }},
		{Unseen, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, _ *LastDisk) { d.Unseen = Unseen }},
		{OverlayMissing, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, _ *LastDisk) { d.Overlay = "" }},
		{OverlayMissing, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, l *LastDisk) {
			d.Overlay, d.Run, d.Node, l.Run, l.Node = "", "1", 5, "1", 3
		}},
		{OverlayMissing, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, _ *LastDisk) { d.Overlay = "/d/b.qcow2.b2" }},
		{CheckpointMissing, true, CBT, func(o *Options, _ *Domain, d *Disk, l *LastDisk) {
			o.Tracking, d.Overlay, l.Overlay, d.Run, d.Node, l.Run, l.Node = CBT, "", "", "1", 5, "1", 3
		}},
		{OverlayMissing, true, Snapshot, func(_ *Options, _ *Domain, _ *Disk, l *LastDisk) { l.Overlay = "" }},
		{OverlayMissing, true, Snapshot, func(_ *Options, _ *Domain, d *Disk, l *LastDisk) { d.Overlay, l.Overlay = "", "" }},
		{OverlayUnsupported, true, Digest, func(_ *Options, d *Domain, _ *Disk, _ *LastDisk) { d.Overlays = false }},
		{InternalSnapshot, true, Digest, func(_ *Options, d *Domain, _ *Disk, _ *LastDisk) { d.InternalSnapshots = true }},
		{CheckpointMissing, true, CBT, func(o *Options, _ *Domain, d *Disk, _ *LastDisk) { o.Tracking, d.Overlay = CBT, "" }},
		{CheckpointMissing, true, Digest, func(o *Options, _ *Domain, _ *Disk, _ *LastDisk) { o.Tracking = CBT }},
		{OfferingDigest, true, Digest, func(o *Options, _ *Domain, _ *Disk, _ *LastDisk) { o.Tracking = Digest }},
	} {
		o, d, last := overlaid()
		c.change(&o, &d, &d.Disks[1], &last.Disks[1])
		v := Decide(o, d, last)
		want := DiskVerdict{Target: "vdb", Kind: Full, Cause: c.want, Tracking: c.tracking}
		if c.compare {
			want.Kind, want.Changes = Incremental, Digest
		}
		if diff := cmp.Diff(want, v.Disks[1]); diff != "" {
			t.Errorf("%s: %s", c.want, diff)
		}
	}
}

// TestDecideNeverIncrementInDoubt draws any facts at all: an increment needs
// every one of its conditions.
func TestDecideNeverIncrementInDoubt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		o, d, last := drawFacts(t)
		v := Decide(o, d, last)
		if again := Decide(o, d, last); !cmp.Equal(v, again) {
			t.Fatalf("two verdicts on the same facts: %+v, %+v", v, again)
		}
		if len(v.Disks) != len(d.Disks) {
			t.Fatalf("%d verdicts on %d disks", len(v.Disks), len(d.Disks))
		}
		increments := 0
		for i, got := range v.Disks {
			if (got.Changes == CBT || got.Changes == Snapshot) != (got.Cause == "") || (got.Changes == CBT) != (got.Base != "") || (got.Kind == Full) != (got.Changes == "") {
				t.Fatalf("disk does not say why: %+v", got)
			}
			if got.Tracking == CBT && (d.InternalSnapshots || d.Disks[i].Format != "qcow2" || o.Isolated || o.Tracking != CBT || d.Disks[i].Overlay != "") {
				t.Fatalf("a bitmap where none may be: %+v", got)
			}
			if got.Tracking == Snapshot && (d.InternalSnapshots || !d.Overlays || o.Isolated || o.Tracking != Snapshot) {
				t.Fatalf("an overlay where none may be: %+v", got)
			}
			if got.Changes == Snapshot {
				mayBeByOverlay(t, o, d.Disks[i], last)
			}
			if got.Changes == CBT {
				mayBeIncrement(t, d.Disks[i], last)
			}
			if got.Changes == Digest {
				mayBeCompared(t, d.Disks[i], last)
			}
			if got.Kind == Incremental {
				increments++
			}
		}
		if (v.Kind == Incremental) != (increments > 0) || (v.Kind == Full) != (v.Cause != "") || (v.Kind == Full) != (v.Parent == "") {
			t.Fatalf("backup and disks do not fit: %+v", v)
		}
		if v.Kind == Incremental && (o.Full || o.Isolated || o.Mode == ModeFull || last.State != Open || last.BackupState != Complete ||
			last.Offering != o.Offering || last.Repository != o.Repository || o.ChainSize > 0 && last.Length >= o.ChainSize) {
			t.Fatalf("chain goes on: %+v after %+v", v, last)
		}
	})
}

func mayBeIncrement(t *rapid.T, disk Disk, last *Last) {
	i := slices.IndexFunc(last.Disks, func(l LastDisk) bool { return l.Target == disk.Target })
	if i < 0 || !last.Disks[i].CBT || last.Checkpoint == "" || disk.Bitmap != BitmapValid ||
		last.Disks[i].Size != disk.Size || last.Disks[i].Source != disk.Source || disk.Format != "qcow2" || disk.Unseen != "" {
		t.Fatalf("increment of %+v after %+v", disk, last)
	}
}

func mayBeByOverlay(t *rapid.T, o Options, disk Disk, last *Last) {
	i := slices.IndexFunc(last.Disks, func(l LastDisk) bool { return l.Target == disk.Target })
	if i < 0 || o.Tracking != Snapshot || disk.Overlay == "" || last.Disks[i].Overlay != disk.Overlay ||
		last.Disks[i].Size != disk.Size || last.Disks[i].Source != disk.Source || last.Disks[i].Format != disk.Format || disk.Unseen != "" {
		t.Fatalf("increment by overlay of %+v after %+v", disk, last)
	}
}

func mayBeCompared(t *rapid.T, disk Disk, last *Last) {
	i := slices.IndexFunc(last.Disks, func(l LastDisk) bool { return l.Target == disk.Target })
	if i < 0 || last.Disks[i].Size != disk.Size {
		t.Fatalf("nothing to compare %+v with after %+v", disk, last)
	}
}

func drawFacts(t *rapid.T) (Options, Domain, *Last) {
	oneIn := func(label string) bool { return rapid.IntRange(0, 7).Draw(t, label) == 0 }
	o, d, last := good()
	o.Full, o.Isolated, d.InternalSnapshots = oneIn("full"), oneIn("isolated"), oneIn("snapshots")
	o.ChainSize = rapid.IntRange(0, 5).Draw(t, "chain size")
	o.Tracking, d.Overlays = rapid.SampledFrom([]Tracking{CBT, CBT, Digest, Snapshot, Snapshot}).Draw(t, "tracking"), !oneIn("overlays")
	o.Fallback = rapid.SampledFrom([]Fallback{FallbackDigest, FallbackFull}).Draw(t, "fallback")
	if oneIn("offering") {
		o.Offering = "other"
	}
	if oneIn("mode") {
		o.Mode = ModeFull
	}
	if oneIn("state") {
		last.State = rapid.SampledFrom([]State{Finished, Broken}).Draw(t, "ended")
	}
	if oneIn("tip") {
		last.BackupState = rapid.SampledFrom([]BackupState{Damaged, Deleting, Running, Failed}).Draw(t, "tip state")
	}
	if oneIn("checkpoint") {
		last.Checkpoint = ""
	}
	for i := range d.Disks {
		d.Disks[i].Bitmap = rapid.SampledFrom([]Bitmap{BitmapValid, BitmapValid, BitmapValid, BitmapMissing, BitmapInconsistent, ""}).Draw(t, "bitmap")
		d.Disks[i].Format = rapid.SampledFrom([]string{d.Disks[i].Format, "qcow2", "raw"}).Draw(t, "format")
		last.Disks[i].CBT = !oneIn("covered")
		overlay := rapid.SampledFrom([]string{"/d/overlay", "/d/overlay", "/d/overlay", "/d/another", ""})
		d.Disks[i].Overlay, last.Disks[i].Overlay = overlay.Draw(t, "overlay"), overlay.Draw(t, "last overlay")
		if oneIn("unseen") {
			d.Disks[i].Unseen = rapid.SampledFrom([]Cause{Unseen, ChangedWhileOff, HostRestarted}).Draw(t, "cause")
		}
		if oneIn("resized") {
			d.Disks[i].Size *= 2
		}
		if oneIn("replaced") {
			d.Disks[i].Source = "/elsewhere"
		}
	}
	d.Disks = d.Disks[rapid.IntRange(0, 3).Draw(t, "detached"):]
	if oneIn("first") {
		last = nil
	}
	return o, d, last
}

// line is a chain of a full backup and two increments; vdb came with the second.
func line() []Backup {
	return []Backup{
		{ID: "1", Chain: "1", Kind: Full, State: Complete, Images: []Image{{"vda", Full, 10}}},
		{ID: "2", Chain: "1", Parent: "1", Kind: Incremental, State: Complete, Images: []Image{{"vda", Incremental, 10}, {"vdb", Full, 5}}},
		{ID: "3", Chain: "1", Parent: "2", Kind: Incremental, State: Complete, Images: []Image{{"vda", Incremental, 10}, {"vdb", Incremental, 5}}},
	}
}

func TestPlanRestore(t *testing.T) {
	got, err := PlanRestore(line(), "3")
	if err != nil {
		t.Fatal(err)
	}
	want := []DiskChain{{"vda", 10, []string{"3", "2", "1"}}, {"vdb", 5, []string{"3", "2"}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	hit := line() // by nothing that is seen in the newest
	hit[0].State, hit[1].State = Damaged, Damaged
	if got, err = PlanRestore(hit, "3"); err != nil || cmp.Diff(want, got) != "" {
		t.Errorf("on damaged ones: %v, %v", got, err)
	}
}

func TestPlanRestoreRefusesGaps(t *testing.T) {
	for name, change := range map[string]func([]Backup) []Backup{
		"missing parent":     func(b []Backup) []Backup { return b[1:] },
		"damaged":            func(b []Backup) []Backup { b[2].State = Damaged; return b },
		"parent going":       func(b []Backup) []Backup { b[1].State = Deleting; return b },
		"itself running":     func(b []Backup) []Backup { b[2].State = Running; return b },
		"no image below":     func(b []Backup) []Backup { b[1].Images = b[1].Images[1:]; return b },
		"builds on itself":   func(b []Backup) []Backup { b[2].Parent = "3"; return b },
		"increment at root":  func(b []Backup) []Backup { b[0].Images[0].Kind = Incremental; return b },
		"builds in a circle": func(b []Backup) []Backup { b[0].Parent, b[0].Images[0].Kind = "3", Incremental; return b },
	} {
		if plan, err := PlanRestore(change(line()), "3"); !errors.Is(err, ErrGap) {
			t.Errorf("%s: got %v, %v", name, plan, err)
		}
	}
	if _, err := PlanRestore(line(), "4"); !errors.Is(err, ErrUnknown) {
		t.Errorf("unknown backup: got %v", err)
	}
}

func TestPlanDelete(t *testing.T) {
	running := append(line(), Backup{ID: "4", Chain: "1", Parent: "3", Kind: Incremental, State: Running})
	for name, c := range map[string]struct {
		backups      []Backup
		ids          []string
		withChildren bool
		want         []string
		err          error
	}{
		"newest":              {line(), []string{"3"}, false, []string{"3"}, nil},
		"one with increments": {line(), []string{"2"}, false, nil, ErrHasChildren},
		"all of them":         {line(), []string{"1", "3", "2"}, false, []string{"3", "2", "1"}, nil},
		"with children":       {line(), []string{"2"}, true, []string{"3", "2"}, nil},
		"the same twice":      {line(), []string{"3", "3"}, false, []string{"3"}, nil},
		"unknown":             {line(), []string{"9"}, true, nil, ErrUnknown},
		"running child":       {running, []string{"3"}, true, nil, ErrRunning},
	} {
		got, err := PlanDelete(c.backups, c.ids, c.withChildren)
		if !errors.Is(err, c.err) || !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, %v, want %v, %v", name, got, err, c.want, c.err)
		}
	}
}

// TestPlanDeleteLeavesWholeChains deletes at random: what stays can be restored.
func TestPlanDeleteLeavesWholeChains(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var backups []Backup
		for i := range rapid.IntRange(1, 12).Draw(t, "backups") {
			b := Backup{ID: fmt.Sprint(i), Kind: Full, State: Complete}
			if i > 0 && rapid.IntRange(0, 4).Draw(t, "full") > 0 {
				b.Kind, b.Parent = Incremental, fmt.Sprint(rapid.IntRange(0, i-1).Draw(t, "parent"))
			}
			b.Images = []Image{{"vda", b.Kind, 1}}
			backups = append(backups, b)
		}
		ids := rapid.SliceOfDistinct(rapid.Map(rapid.IntRange(0, len(backups)-1), func(i int) string { return fmt.Sprint(i) }),
			rapid.ID[string]).Draw(t, "ids")
		order, err := PlanDelete(backups, ids, rapid.Bool().Draw(t, "with children"))
		if err != nil {
			if !errors.Is(err, ErrHasChildren) {
				t.Fatal(err)
			}
			return
		}
		for _, id := range order { // also when it stops in the middle
			backups = slices.DeleteFunc(backups, func(b Backup) bool { return b.ID == id })
			for _, b := range backups {
				if _, err := PlanRestore(backups, b.ID); err != nil {
					t.Fatalf("after deletion of %s of %v: %v", id, order, err)
				}
			}
		}
		for _, id := range ids {
			if slices.ContainsFunc(backups, func(b Backup) bool { return b.ID == id }) {
				t.Fatalf("%s is still there", id)
			}
		}
	})
}
