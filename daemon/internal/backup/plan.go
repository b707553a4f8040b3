package backup

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/lifecycle"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/dbus"
)

// Plan is all that is decided before anything is done. It is part of each of
// the job's steps, so that a daemon that was restarted carries on with it.
type Plan struct {
	Backup     string // id
	Domain     string // UUID
	DomainName string
	Repository catalog.Repository
	Offering   string // name; "" for none
	catalog.Settings
	Isolated bool

	Source     string // what the disks are copied from, see source
	Kind       chain.Kind
	Cause      chain.Cause // why it is full; "" for an increment
	Chain      string
	Parent     string // "" for a full backup
	Checkpoint string // that is made at the point in time; "" for none
	Base       string // the checkpoint whose changes are copied; "" for none
	Mark       int64  // number of the newest mark that it takes account of
	Run        string // of QEMU; "" when the domain is off

	Disks      []Disk
	Skipped    []Skipped
	Definition string // the domain's, as XML
	NVRAM      string // path of the variable store; "" for none
	Saved      bool   // the domain is off and has a saved state
	TPM        string // path of the state of its TPM; "" for none
	Secrets    []repository.Secret
}

// Disk is one disk of a Plan.
type Disk struct {
	Target     string
	Source     string // path; "" for a network disk
	Format     string
	Size       uint64   // bytes
	SectorSize uint32   // bytes; 0 for the default
	Backing    []string // paths of the layers below, top first
	Node       int      // libvirt's index of the top layer in QEMU's run
	Own        own      // as it is without overlays of ours
	// Stack are its layers, the top one first; only if an overlay is to be put on it.
	Stack     []hypervisor.Stacked
	Kind      chain.Kind
	Changes   chain.Tracking // how an increment's are found: CBT, Snapshot or Digest; "" for a full image
	Cause     chain.Cause    // why it is not an increment by CBT or Snapshot; "" if it is
	Tracking  chain.Tracking
	Expected  uint64 // bytes that its image will take, as far as that can be told
	Container string // format of an encrypted image that is copied as it is, see container; "" for others
}

// Skipped is a disk that the backup leaves out.
type Skipped struct{ Target, Why string }

// facts are what a Plan is made from.
type facts struct {
	request     Request
	backup      string // id
	checkpoint  string // a fresh name
	domain      hypervisor.Domain
	definition  string // the domain's, as XML
	repository  catalog.Repository
	last        *catalog.Head      // nil: the domain has no chain in the repository
	bitmaps     map[string]bool    // target → usable, of the last one's checkpoint
	oldQcow2    map[string]bool    // targets whose qcow2 is of version 2, which has no place for bitmaps
	snapshotted bool               // an image has internal snapshots, which libvirt may not know
	boot        string             // id of the host's
	mark        int64              // number of the newest mark
	marks       []catalog.Mark     // the newest of each disk
	offline     error              // why the disks of a stopped domain cannot be read
	stacked     map[string]stacked // by target; nil if overlays have nothing to do with it
	made        map[string]string  // target → path of the overlay that the last backup made
}

// newPlan decides what the backup is, or why there can be none.
func newPlan(f facts) (Plan, error) {
	p := Plan{
		Backup: f.backup, Domain: f.domain.UUID, DomainName: f.domain.Name, Repository: f.repository,
		Offering: f.request.Offering, Settings: f.request.Settings, Isolated: f.request.Isolated,
		Source: f.source(), Run: runOf(f.boot, f.domain), Mark: f.mark, Definition: f.definition, NVRAM: f.domain.Firmware.NVRAM,
		Saved: !f.domain.Active && f.domain.HasManagedSave,
		TPM:   f.domain.TPM.State, Secrets: secretsOf(f.domain),
	}
	if err := checkState(f.domain); err != nil {
		return Plan{}, err
	}
	disks, skipped, err := selectDisks(f.domain, f.request.Settings)
	if err != nil {
		return Plan{}, err
	}
	if err := checkPlaces(f.domain.Name, disks, f.repository); err != nil {
		return Plan{}, err
	}
	if f.offline != nil {
		return Plan{}, f.offline
	}
	p.Skipped = skipped
	v := chain.Decide(f.options(), f.now(disks), f.before())
	p.Kind, p.Cause, p.Parent, p.Chain = v.Kind, v.Cause, v.Parent, v.Chain
	if p.Kind == chain.Full {
		p.Chain = p.Backup
	}
	if v.Checkpoint {
		p.Checkpoint = f.checkpoint
	}
	for i, d := range v.Disks {
		one := Disk{
			Target: d.Target, Source: disks[i].Source, Format: disks[i].Format, Size: wholeSectors(disks[i].Capacity),
			SectorSize: uint32(disks[i].LogicalBlockSize), Backing: disks[i].Backing, Node: disks[i].Index,
			Kind: d.Kind, Changes: d.Changes, Cause: d.Cause, Tracking: d.Tracking,
			Container: containerFormat(f.domain, d.Target),
		}
		one.Own = f.own(disks[i])
		if d.Base != "" {
			p.Base = d.Base
		}
		one.Expected = expect(one.Kind, p.written(), disks[i], f.tip())
		if d.Tracking == chain.Snapshot {
			p.Source, one.Stack = sourceFrozen, f.stacked[d.Target].stack
		}
		p.Disks = append(p.Disks, one)
	}
	return p, nil
}

// tip is the newest backup of the chain before; nil if there is none.
func (f facts) tip() *catalog.Backup {
	if f.last == nil {
		return nil
	}
	return f.last.Tip
}

// wholeSectors rounds up as QEMU does: its block devices have whole sectors,
// also when the file of a raw disk has not.
func wholeSectors(size uint64) uint64 {
	const sector = 512
	return (size + sector - 1) / sector * sector
}

func (f facts) options() chain.Options {
	r := f.request
	return chain.Options{Backup: f.backup, Full: r.Full, Isolated: r.Isolated, Mode: r.Mode, Offering: r.Offering,
		Repository: f.repository.ID, ChainSize: r.ChainSize, Tracking: r.Tracking, Fallback: r.Fallback}
}

func (f facts) now(disks []hypervisor.Disk) chain.Domain {
	d := chain.Domain{InternalSnapshots: f.domain.HasInternalSnapshots() || f.snapshotted, Overlays: f.bear(disks)}
	for _, k := range disks {
		own := f.own(k)
		k.Source, k.Format, k.Backing = own.Source, own.Format, own.Backing
		one := chain.Disk{Target: k.Target, Source: k.Source, Backing: k.Backing, Format: f.format(k), Size: wholeSectors(k.Capacity),
			Bitmap: chain.BitmapMissing, Run: runOf(f.boot, f.domain), Node: k.Index, Overlay: f.stacked[k.Target].top}
		if f.last != nil && f.last.Tip != nil {
			mark, _ := lifecycle.Unseen(f.marks, k.Target, f.last.Tip.Mark)
			one.Unseen = mark.Cause
		}
		if usable, known := f.bitmaps[k.Target]; known {
			one.Bitmap = chain.BitmapInconsistent
			if usable {
				one.Bitmap = chain.BitmapValid
			}
		}
		d.Disks = append(d.Disks, one)
	}
	return d
}

// runOf names the run of QEMU that has the disks open; "" for none. libvirt
// counts from one again when the host or libvirtd was restarted.
func runOf(boot string, d hypervisor.Domain) string {
	if !d.Active {
		return ""
	}
	return fmt.Sprintf("%s/%d", boot, d.ID)
}

func (f facts) source() string {
	if !f.domain.Active {
		return sourceStopped
	}
	return sourceLive
}

// oldQcow2Format is how the rules of chains are told of a qcow2 image that
// cannot carry a bitmap.
const oldQcow2Format = "qcow2 v2"

// transientFormat is how they are told of an image that is thrown away when the
// domain stops, and a bitmap in it.
const transientFormat = "qcow2, transient"

func (f facts) format(k hypervisor.Disk) string {
	now, _ := f.domain.Disk(k.Target)
	switch {
	case k.Format != "qcow2":
	case f.oldQcow2[k.Target]:
		return oldQcow2Format
	case now.Transient:
		return transientFormat
	}
	return k.Format
}

func (f facts) before() *chain.Last {
	if f.last == nil {
		return nil
	}
	h := f.last
	last := &chain.Last{Chain: h.ID, State: h.State, Cause: h.Cause, Offering: h.Offering, Repository: h.Repository, Length: h.Length}
	if h.Checkpoint != nil {
		last.Checkpoint = h.Checkpoint.Name
	}
	if h.Tip == nil {
		return last
	}
	last.Backup, last.BackupState = h.Tip.ID, h.Tip.State
	for _, i := range h.Tip.Images {
		format := f.format(hypervisor.Disk{Target: i.Target, Format: i.Format})
		last.Disks = append(last.Disks, chain.LastDisk{Target: i.Target, Source: i.Source, Backing: i.Backing, Format: format, Size: i.Size,
			CBT: i.Tracking == chain.CBT, Run: i.Run, Node: i.Node, Overlaid: i.Tracking == chain.Snapshot, Overlay: f.made[i.Target]})
	}
	return last
}

// checkState refuses a domain that is busy with something else, or must be mended first.
func checkState(d hypervisor.Domain) error {
	switch {
	case d.State == hypervisor.StateCrashed:
		return failure.Errorf(dbus.ErrUnsupported, "domain %q has crashed: destroy or start it, then back it up", d.Name)
	case d.State == hypervisor.StateShutdown:
		return failure.Errorf(dbus.ErrBusy, "domain %q is being shut down: back it up when it runs again", d.Name)
	case !d.Active:
		return nil
	case d.State == hypervisor.StatePaused && d.StateReason == hypervisor.ReasonIOError:
		return failure.Errorf(dbus.ErrUnsupported, "domain %q is paused by an I/O error: mend its storage and resume it first", d.Name)
	case d.State == hypervisor.StatePaused && slices.Contains([]string{"crashed", "api-error", "postcopy-failed"}, d.StateReason):
		return failure.Errorf(dbus.ErrUnsupported, "domain %q is paused because of a failure (%s): destroy or resume it first", d.Name, d.StateReason)
	case d.State == hypervisor.StatePaused && slices.Contains([]string{"migration", "save", "dump", "shutting-down", "snapshot", "starting-up", "postcopy"}, d.StateReason):
		return failure.Errorf(dbus.ErrBusy, "domain %q is paused by another operation (%s): try again when that is done", d.Name, d.StateReason)
	case d.Job:
		return failure.Errorf(dbus.ErrBusy, "domain %q has an active job that virtbackup did not start: wait for it or end it (virsh domjobinfo, domjobabort) first", d.Name)
	case len(d.BlockJobs) > 0:
		return failure.Errorf(dbus.ErrBusy, "domain %q has an active block job on %s: wait for it or end it (virsh blockjob) first", d.Name, strings.Join(d.BlockJobs, ", "))
	}
	return nil
}

// skipRunning is why a disk is left out that was asked for: libvirt allows no
// block jobs on transient disks, and a backup is one.
const skipRunning = "it is transient, and libvirt backs it up only while the domain is off"

// Skip says why backups with these settings leave a disk of a domain out, which
// runs or not; "" for one that is backed up.
func Skip(k hypervisor.Disk, s catalog.Settings, active bool) string {
	switch {
	case k.Device == "cdrom" || k.Device == "floppy":
		return "it is a " + k.Device
	case k.Device != "disk":
		return "it is a " + k.Device + ", a device of the host"
	case k.Transient && !s.Volatile:
		return "it is transient"
	case k.ReadOnly:
		return "it is read-only"
	case k.Shareable:
		return "it is shared with other domains"
	case k.SourceType == "":
		return "it has no source"
	case slices.Contains(s.Exclude, k.Target):
		return "it is excluded"
	case len(s.Include) > 0 && !slices.Contains(s.Include, k.Target):
		return "it is not among those that are included"
	case k.Transient && active:
		return skipRunning
	}
	return ""
}

// selectDisks returns the disks to back up with these settings, in the order of
// the definition, and those to leave out.
func selectDisks(d hypervisor.Domain, s catalog.Settings) (disks []hypervisor.Disk, skipped []Skipped, err error) {
	for _, k := range d.Disks {
		if why := Skip(k, s, d.Active); why != "" {
			skipped = append(skipped, Skipped{k.Target, why})
			continue
		}
		if err := checkDisk(d.Name, k); err != nil {
			return nil, nil, err
		}
		if k.Encrypted {
			if err := checkContainer(d, k); err != nil {
				return nil, nil, err
			}
			k = container(k)
		}
		disks = append(disks, k)
	}
	if len(disks) == 0 {
		return nil, nil, failure.Errorf(dbus.ErrUnsupported, "domain %q has no disk that can be backed up%s", d.Name, reasons(skipped))
	}
	return disks, skipped, nil
}

func reasons(skipped []Skipped) string {
	if len(skipped) == 0 {
		return ""
	}
	var all []string
	for _, s := range skipped {
		all = append(all, s.Target+": "+s.Why)
	}
	return " (" + strings.Join(all, "; ") + ")"
}

// checkDisk refuses a disk that must not be left out and cannot be saved.
func checkDisk(domain string, k hypervisor.Disk) error {
	switch {
	case k.Format != "qcow2" && k.Format != "raw":
		return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q has format %q: only qcow2 and raw are supported", k.Target, domain, k.Format)
	case !slices.Contains([]string{"file", "block", "volume", "network"}, k.SourceType):
		return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q has a source of type %q, which is not supported", k.Target, domain, k.SourceType)
	case k.Capacity == 0:
		return failure.Errorf(dbus.ErrUnsupported, "disk %s of domain %q has no size that libvirt could tell: is its storage there?", k.Target, domain)
	}
	return nil
}

// checkPlaces refuses a repository among a domain's disks, or disks in a
// repository: what damages one would damage the other.
func checkPlaces(domain string, disks []hypervisor.Disk, r catalog.Repository) error {
	for _, k := range disks {
		if k.Source == "" {
			continue
		}
		if beneath(r.Path, k.Source) {
			return failure.Errorf(dbus.ErrInvalidArgument, "disk %s of domain %q (%s) is in repository %q: use a repository elsewhere", k.Target, domain, k.Source, r.Name)
		}
		directory := filepath.Dir(filepath.Clean(k.Source))
		if k.SourceType != "block" && directory != "/" && beneath(directory, r.Path) {
			return failure.Errorf(dbus.ErrInvalidArgument, "repository %q (%s) is in the directory of disk %s of domain %q: use a repository elsewhere", r.Name, r.Path, k.Target, domain)
		}
	}
	return nil
}

// beneath tells whether path is directory or lies in it, by name.
func beneath(directory, path string) bool {
	directory, path = filepath.Clean(directory), filepath.Clean(path)
	return path == directory || strings.HasPrefix(path, strings.TrimSuffix(directory, "/")+"/")
}

// unchanged says whether the domain's disks, and the run of QEMU that has them
// open, are still those of the plan.
func (p Plan) unchanged(boot string, d hypervisor.Domain) error {
	if runOf(boot, d) != p.Run {
		return failure.Errorf(dbus.ErrBusy, "domain %q was started or stopped while its backup was being prepared: start the backup again", p.DomainName)
	}
	disks, _, err := selectDisks(d, p.Settings)
	if err != nil {
		return err
	}
	same := slices.EqualFunc(p.Disks, disks, func(a Disk, b hypervisor.Disk) bool {
		return a.Target == b.Target && a.Source == b.Source && a.Format == b.Format && a.Size == wholeSectors(b.Capacity) && a.Node == b.Index
	})
	if !same {
		return failure.Errorf(dbus.ErrBusy, "the disks of domain %q were changed while its backup was being prepared: start the backup again", p.DomainName)
	}
	return nil
}
