package backup

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

const gib = 1 << 30

func running(disks ...hypervisor.Disk) hypervisor.Domain {
	return hypervisor.Domain{
		UUID: "52475cdd-d300-4ce3-8422-1636b8b82c3f", Name: "web", Active: true, State: hypervisor.StateRunning,
		StateReason: "booted", Disks: disks,
	}
}

func disk(target, format string) hypervisor.Disk {
	return hypervisor.Disk{
		Target: target, Device: "disk", SourceType: "file", Source: "/images/web-" + target, Format: format, Capacity: gib,
	}
}

func factsOf(d hypervisor.Domain) facts {
	return facts{
		request: Request{Domain: d.UUID, Repository: "R", Offering: "daily", Settings: catalog.Settings{Mode: chain.ModeIncremental, Quiesce: "none"}},
		backup:  "01M7ZDM", checkpoint: "virtbackup-new", domain: d, definition: "<domain/>",
		repository: catalog.Repository{ID: "R", Name: "nas", Path: "/srv/backups"},
	}
}

// after is the facts of a domain whose last backup left a checkpoint on its qcow2 disks.
func after(d hypervisor.Domain) facts {
	f := factsOf(d)
	tip := &catalog.Backup{ID: "01M7ABC", State: chain.Complete}
	f.bitmaps = map[string]bool{}
	for _, k := range d.Disks {
		i := catalog.Image{Target: k.Target, Source: k.Source, Format: k.Format, Size: k.Capacity, Tracking: chain.None}
		if k.Format == "qcow2" {
			i.Tracking, f.bitmaps[k.Target] = chain.CBT, true
		}
		tip.Images = append(tip.Images, i)
	}
	f.last = &catalog.Head{
		Chain:      catalog.Chain{ID: "01CHAIN", Repository: "R", Offering: "daily", State: chain.Open, Length: 1},
		Tip:        tip,
		Checkpoint: &catalog.Checkpoint{Name: "virtbackup-old"},
	}
	return f
}

func TestPlanRefusals(t *testing.T) {
	with := func(change func(*hypervisor.Domain)) hypervisor.Domain {
		d := running(disk("vda", "qcow2"))
		change(&d)
		return d
	}
	state := func(name, reason string, active bool) hypervisor.Domain {
		return with(func(d *hypervisor.Domain) { d.State, d.StateReason, d.Active = name, reason, active })
	}
	changed := func(change func(*hypervisor.Disk)) hypervisor.Domain {
		return with(func(d *hypervisor.Domain) { change(&d.Disks[0]) })
	}
	tests := map[string]struct {
		domain     hypervisor.Domain
		repository string
		name       dbus.ErrorName
		says       string
	}{
		"crashed":            {state(hypervisor.StateCrashed, "panicked", true), "", dbus.ErrUnsupported, "crashed"},
		"being shut down":    {state(hypervisor.StateShutdown, "user", true), "", dbus.ErrBusy, "being shut down"},
		"paused, I/O error":  {state(hypervisor.StatePaused, hypervisor.ReasonIOError, true), "", dbus.ErrUnsupported, "I/O error"},
		"paused, crashed":    {state(hypervisor.StatePaused, "crashed", true), "", dbus.ErrUnsupported, "failure"},
		"paused, migrating":  {state(hypervisor.StatePaused, "migration", true), "", dbus.ErrBusy, "migration"},
		"foreign job":        {with(func(d *hypervisor.Domain) { d.Job = true }), "", dbus.ErrBusy, "virtbackup did not start"},
		"block job":          {with(func(d *hypervisor.Domain) { d.BlockJobs = []string{"vda"} }), "", dbus.ErrBusy, "block job on vda"},
		"no disk":            {running(), "", dbus.ErrUnsupported, "no disk"},
		"only a CD-ROM":      {changed(func(k *hypervisor.Disk) { k.Device = "cdrom" }), "", dbus.ErrUnsupported, "vda: it is a cdrom"},
		"encrypted":          {changed(func(k *hypervisor.Disk) { k.Encrypted = true }), "", dbus.ErrUnsupported, "encrypted"},
		"vmdk":               {changed(func(k *hypervisor.Disk) { k.Format = "vmdk" }), "", dbus.ErrUnsupported, `"vmdk"`},
		"vhost-user":         {changed(func(k *hypervisor.Disk) { k.SourceType = "vhostuser" }), "", dbus.ErrUnsupported, "vhostuser"},
		"storage is away":    {changed(func(k *hypervisor.Disk) { k.Capacity = 0 }), "", dbus.ErrUnsupported, "no size"},
		"disk in repository": {running(disk("vda", "raw")), "/images", dbus.ErrInvalidArgument, "is in repository"},
		"repository by disk": {running(disk("vda", "raw")), "/images/backups", dbus.ErrInvalidArgument, "in the directory of disk vda"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			f := factsOf(tt.domain)
			if tt.repository != "" {
				f.repository.Path = tt.repository
			}
			_, err := newPlan(f)
			if err == nil {
				t.Fatal("not refused")
			}
			if !errors.Is(err, tt.name) {
				t.Errorf("error %q is not %s", err, tt.name)
			}
			if !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), `"web"`) {
				t.Errorf("error %q does not say %q and which domain", err, tt.says)
			}
		})
	}
}

func TestRepositoryPlacesThatAreFine(t *testing.T) {
	block := disk("vda", "raw")
	block.SourceType, block.Source = "block", "/dev/vg/web"
	atRoot := disk("vda", "raw")
	atRoot.Source = "/web.img"
	for name, f := range map[string]facts{
		"a name that begins alike": func() facts {
			f := factsOf(running(disk("vda", "raw")))
			f.repository.Path = "/images-of-backups"
			return f
		}(),
		"block device": factsOf(running(block)),
		"image in /":   factsOf(running(atRoot)),
	} {
		if _, err := newPlan(f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSkippedDisks(t *testing.T) {
	odd := func(change func(*hypervisor.Disk)) hypervisor.Disk {
		k := disk("vdb", "raw")
		change(&k)
		return k
	}
	for why, k := range map[string]hypervisor.Disk{
		"cdrom":     odd(func(k *hypervisor.Disk) { k.Device = "cdrom" }),
		"floppy":    odd(func(k *hypervisor.Disk) { k.Device = "floppy" }),
		"lun":       odd(func(k *hypervisor.Disk) { k.Device = "lun" }),
		"transient": odd(func(k *hypervisor.Disk) { k.Transient = true }),
		"read-only": odd(func(k *hypervisor.Disk) { k.ReadOnly = true }),
		"shared":    odd(func(k *hypervisor.Disk) { k.Shareable = true }),
		"no source": odd(func(k *hypervisor.Disk) { k.SourceType, k.Source = "", "" }),
		// What would be refused does not matter on a disk that is left out.
		"a floppy": odd(func(k *hypervisor.Disk) { k.Device, k.Encrypted, k.Format = "floppy", true, "vmdk" }),
	} {
		p, err := newPlan(factsOf(running(disk("vda", "qcow2"), k)))
		if err != nil {
			t.Errorf("%s: %v", why, err)
			continue
		}
		if len(p.Disks) != 1 || p.Disks[0].Target != "vda" {
			t.Errorf("%s: disks are %v", why, p.Disks)
		}
		if len(p.Skipped) != 1 || p.Skipped[0].Target != "vdb" || !strings.Contains(p.Skipped[0].Why, why) {
			t.Errorf("%s: skipped are %v", why, p.Skipped)
		}
	}
}

// one is what a test wants of a planned disk.
type one struct {
	kind     chain.Kind
	changes  chain.Tracking
	cause    chain.Cause
	tracking chain.Tracking
}

func TestPlanKinds(t *testing.T) {
	mixed := running(disk("vda", "qcow2"), disk("vdb", "raw"))
	full, increment, none, digest := chain.Full, chain.Incremental, chain.None, chain.Digest
	tests := map[string]struct {
		facts            facts
		change           func(*facts)
		kind             chain.Kind
		cause            chain.Cause
		checkpoint, base string
		vda, vdb         one
	}{
		"first": {factsOf(mixed), nil, full, chain.FirstBackup, "virtbackup-new", "",
			one{full, "", chain.FirstBackup, chain.CBT}, one{full, "", chain.FirstBackup, digest}},
		"increment": {after(mixed), nil, chain.Incremental, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{increment, digest, chain.RawDisk, digest}},
		"isolated": {after(mixed), func(f *facts) { f.request.Isolated = true }, full, chain.Isolated, "", "",
			one{full, "", chain.Isolated, none}, one{full, "", chain.Isolated, none}},
		"full mode": {after(mixed), func(f *facts) { f.request.Mode = chain.ModeFull }, full, chain.FullMode, "", "",
			one{full, "", chain.FullMode, none}, one{full, "", chain.FullMode, none}},
		"full asked for": {after(mixed), func(f *facts) { f.request.Full = true }, full, chain.FullRequested, "virtbackup-new", "",
			one{full, "", chain.FullRequested, chain.CBT}, one{full, "", chain.FullRequested, digest}},
		"broken bitmap": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) { f.bitmaps["vdb"] = false },
			chain.Incremental, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{increment, digest, chain.BitmapBroken, chain.CBT}},
		"libvirt cannot say": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) { f.bitmaps = nil },
			increment, "", "virtbackup-new", "",
			one{increment, digest, chain.CheckpointMissing, chain.CBT}, one{increment, digest, chain.CheckpointMissing, chain.CBT}},
		"internal snapshot": {after(mixed), func(f *facts) { f.domain.Snapshots = []hypervisor.Snapshot{{Name: "s", Internal: true}} },
			increment, "", "", "", one{increment, digest, chain.InternalSnapshot, digest}, one{increment, digest, chain.RawDisk, digest}},
		"full fallback": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) { f.bitmaps["vdb"], f.request.Fallback = false, chain.FallbackFull },
			increment, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{full, "", chain.BitmapBroken, chain.CBT}},
		"attached anew": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) {
			f.boot, f.domain.ID = "b", 1
			for i := range f.last.Tip.Images {
				f.last.Tip.Images[i].Run, f.last.Tip.Images[i].Node = "b/1", i+1
				f.domain.Disks[i].Index = i + 1
			}
			f.domain.Disks[1].Index = 7
		}, increment, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{increment, digest, chain.DiskReplaced, chain.CBT}},
		"marked": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) {
			f.last.Tip.Mark = 5
			f.marks = []catalog.Mark{{Number: 6, Target: "vdb", Cause: chain.ChangedWhileOff}, {Number: 5, Cause: chain.Unseen}}
		}, increment, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{increment, digest, chain.ChangedWhileOff, chain.CBT}},
		"all marked": {after(mixed), func(f *facts) {
			f.marks = []catalog.Mark{{Number: 7, Cause: chain.Unseen}}
		}, increment, "", "virtbackup-new", "",
			one{increment, digest, chain.Unseen, chain.CBT}, one{increment, digest, chain.Unseen, digest}},
		"off": {after(mixed), func(f *facts) { f.domain.Active, f.domain.State = false, hypervisor.StateShutoff },
			increment, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{increment, digest, chain.RawDisk, digest}},
		"snapshots unknown to libvirt": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) { f.snapshotted = true },
			chain.Incremental, "", "", "",
			one{increment, digest, chain.InternalSnapshot, digest}, one{increment, digest, chain.InternalSnapshot, digest}},
		"old qcow2": {after(running(disk("vda", "qcow2"), disk("vdb", "qcow2"))), func(f *facts) { f.oldQcow2 = map[string]bool{"vdb": true} },
			chain.Incremental, "", "virtbackup-new", "virtbackup-old",
			one{increment, chain.CBT, "", chain.CBT}, one{increment, digest, chain.RawDisk, digest}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.change != nil {
				tt.change(&tt.facts)
			}
			p, err := newPlan(tt.facts)
			if err != nil {
				t.Fatal(err)
			}
			if p.Kind != tt.kind || p.Cause != tt.cause || p.Checkpoint != tt.checkpoint || p.Base != tt.base {
				t.Errorf("plan is %s (%s), checkpoint %q, base %q", p.Kind, p.Cause, p.Checkpoint, p.Base)
			}
			for i, want := range []one{tt.vda, tt.vdb} {
				if got := (one{p.Disks[i].Kind, p.Disks[i].Changes, p.Disks[i].Cause, p.Disks[i].Tracking}); got != want {
					t.Errorf("disk %s is %v, want %v", p.Disks[i].Target, got, want)
				}
			}
			checkAgreement(t, p)
		})
	}
}

// checkAgreement checks what must hold between the parts of every plan: the
// worker reads bitmaps exactly where libvirt is asked for them, and checkpoints
// are on the tracked disks.
func checkAgreement(t *testing.T, p Plan) {
	t.Helper()
	if incremental := p.Kind == chain.Incremental; incremental != (p.Parent != "") || incremental == (p.Chain == p.Backup) {
		t.Errorf("%s plan has parent %q and chain %q", p.Kind, p.Parent, p.Chain)
	}
	spec, begin := p.backupSpec("1.0", live{&run{stepData: stepData{Plan: p}}}.server()), p.begin("/scratch")
	var tracked []string
	for i, k := range p.Disks {
		d, b, m := spec.Disks[i], begin.Disks[i], spec.Manifest.Disks[i]
		if (d.Bitmap != "") != (b.Incremental != "") || (d.Bitmap != "" || d.Compare) != (m.Kind == "incremental") || d.Bitmap != "" && d.Compare {
			t.Errorf("disk %s: the worker reads %q, libvirt exports changes since %q, the manifest says %s", k.Target, d.Bitmap, b.Incremental, m.Kind)
		}
		if d.Socket != begin.Socket || d.Export != b.Export || d.Size != m.Size {
			t.Errorf("disk %s: worker %+v, libvirt %+v, manifest %+v", k.Target, d, b, m)
		}
		if (k.Tracking == chain.CBT) != (m.Checkpoint != "") {
			t.Errorf("disk %s is tracked by %s and has checkpoint %q in the manifest", k.Target, k.Tracking, m.Checkpoint)
		}
		if k.Tracking == chain.CBT {
			tracked = append(tracked, k.Target)
		}
	}
	if !slices.Equal(tracked, begin.CheckpointDisks) || (len(tracked) > 0) != (begin.Checkpoint != "") {
		t.Errorf("checkpoint %q on %v, tracked are %v", begin.Checkpoint, begin.CheckpointDisks, tracked)
	}
}

func TestPlanPaused(t *testing.T) {
	d := running(disk("vda", "qcow2"))
	d.State, d.StateReason = hypervisor.StatePaused, hypervisor.ReasonPausedBy
	p, err := newPlan(factsOf(d))
	if err != nil || len(p.Disks) == 0 {
		t.Errorf("plan of a domain that somebody paused: %+v, error %v", p, err)
	}
}

func TestUnchanged(t *testing.T) {
	d := running(disk("vda", "qcow2"), disk("vdb", "raw"))
	d.Disks[1].Capacity = 1000 // no whole sectors
	p, err := newPlan(factsOf(d))
	if err != nil {
		t.Fatal(err)
	}
	if p.Disks[1].Size != 1024 {
		t.Errorf("size is %d, QEMU's would be 1024", p.Disks[1].Size)
	}
	if err := p.unchanged("", d); err != nil {
		t.Errorf("unchanged disks: %v", err)
	}
	for name, change := range map[string]func(*hypervisor.Domain){
		"resized":      func(d *hypervisor.Domain) { d.Disks[0].Capacity *= 2 },
		"started anew": func(d *hypervisor.Domain) { d.ID++ },
		"stopped":      func(d *hypervisor.Domain) { d.Active = false },
		"opened anew":  func(d *hypervisor.Domain) { d.Disks[0].Index++ },
		"replaced":     func(d *hypervisor.Domain) { d.Disks[0].Source = "/images/other" },
		"format":       func(d *hypervisor.Domain) { d.Disks[0].Format = "raw" },
		"attached":     func(d *hypervisor.Domain) { d.Disks = append(d.Disks, disk("vdc", "raw")) },
		"detached":     func(d *hypervisor.Domain) { d.Disks = d.Disks[:1] },
	} {
		other := d
		other.Disks = slices.Clone(d.Disks)
		change(&other)
		if err := p.unchanged("", other); !errors.Is(err, dbus.ErrBusy) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestSpecFiles(t *testing.T) {
	d := running(disk("vda", "qcow2"))
	d.Firmware.NVRAM = "/var/lib/libvirt/qemu/nvram/web_VARS.fd"
	p, err := newPlan(factsOf(d))
	if err != nil {
		t.Fatal(err)
	}
	files := p.backupSpec("1.0", server{}).Files
	if len(files) != 2 || files[0].Name != "domain.xml" || string(files[0].Content) != "<domain/>" || files[1].Name != "nvram" || files[1].Path != d.Firmware.NVRAM {
		t.Errorf("files are %+v", files)
	}
}

// TestSkip has settings say which disks a backup has.
func TestSkip(t *testing.T) {
	of := func(target string, transient bool) hypervisor.Disk {
		return hypervisor.Disk{Target: target, Device: "disk", SourceType: "file", Transient: transient}
	}
	type settings = catalog.Settings
	for what, c := range map[string]struct {
		settings settings
		disk     hypervisor.Disk
		active   bool
		want     string
	}{
		"nothing said":           {settings{}, of("vda", false), true, ""},
		"excluded":               {settings{Exclude: []string{"vdb", "vda"}}, of("vda", false), true, "it is excluded"},
		"another excluded":       {settings{Exclude: []string{"vdb"}}, of("vda", false), true, ""},
		"included":               {settings{Include: []string{"vda"}}, of("vda", false), false, ""},
		"not included":           {settings{Include: []string{"vdb"}}, of("vda", false), false, "it is not among those that are included"},
		"both":                   {settings{Include: []string{"vda"}, Exclude: []string{"vda"}}, of("vda", false), false, "it is excluded"},
		"transient":              {settings{}, of("vda", true), false, "it is transient"},
		"volatile":               {settings{Volatile: true}, of("vda", true), false, ""},
		"volatile, running":      {settings{Volatile: true}, of("vda", true), true, skipRunning},
		"volatile, but excluded": {settings{Volatile: true, Exclude: []string{"vda"}}, of("vda", true), true, "it is excluded"},
		"included, but no disk":  {settings{Include: []string{"sda"}}, hypervisor.Disk{Target: "sda", Device: "cdrom"}, false, "it is a cdrom"},
	} {
		if got := Skip(c.disk, c.settings, c.active); got != c.want {
			t.Errorf("%s: %q instead of %q", what, got, c.want)
		}
	}
}
