package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// States of a domain, named as virsh does.
const (
	StateRunning    = "running"
	StatePaused     = "paused"
	StateShutdown   = "shutdown" // being shut down
	StateShutoff    = "shutoff"
	StateCrashed    = "crashed"
	StateSuspended  = "pmsuspended"
	StateUnknown    = "unknown"
	ReasonIOError   = "ioerror" // of StatePaused: a write failed (a full scratch image does this)
	ReasonPausedBy  = "user"    // of StatePaused: somebody asked for it
	checkpointOurs  = "virtbackup-"
	blockDeviceDisk = "disk"
)

// Domain is what libvirt knows of a domain at one moment.
type Domain struct {
	UUID, Name     string
	ID             int // of an active domain: libvirt counts its starts; 0 = off
	Persistent     bool
	Active         bool // it has a QEMU process
	State          string
	StateReason    string
	Disks          []Disk // also CD-ROMs and floppies, see Disk.Device
	Firmware       Firmware
	TPM            TPM
	HasManagedSave bool
	Snapshots      []Snapshot
	Checkpoints    []string // all that libvirt knows now, ours and foreign
	Job            bool     // a domain job is active (backup, migration, save, …)
	BlockJobs      []string // targets of disks with an active block job
	BootFiles      []string // kernel and initrd of direct boot
	XML            string   // the live definition of an active domain, else the stored one; no secrets
}

// Disk is one disk of a domain.
type Disk struct {
	Target           string // "vda"
	Device           string // "disk", "cdrom", "floppy", "lun"
	SourceType       string // "file", "block", "network", "volume", "dir", "nvme", "vhostuser", "vhostvdpa"; "" = none (an empty drive)
	Source           string // path of a file or a block device (of a volume: its path), else ""
	Format           string // "qcow2", "raw", …; from the definition, never probed
	ReadOnly         bool
	Shareable        bool
	Transient        bool
	Encrypted        bool
	Encryption       Encryption // of an encrypted disk, when it is one that virtbackup knows
	Serial           string
	Alias            string   // of an active domain: as events name the device
	Capacity         uint64   // bytes; 0 when libvirt could not tell
	Allocation       uint64   // bytes
	Physical         uint64   // bytes of the file, or of the block device, that it is in
	LogicalBlockSize uint     // bytes; 0 = the default (512)
	Index            int      // of the top image, which libvirt numbers each time QEMU opens one; 0 = unknown, as in a domain that is off
	Backing          []string // paths of the images below the top one, top first; known for active domains only
}

// Encryption is how a disk is encrypted by QEMU.
type Encryption struct {
	Format string // "luks"; "" = none that virtbackup knows
	Secret Secret // with its passphrase
}

// Secret names one of libvirt's secrets: by its UUID, or by what it is for.
type Secret struct{ UUID, Usage string }

// Firmware is what a domain boots with.
type Firmware struct {
	Type        string // "bios" or "efi"
	Loader      string // path; "" when libvirt chooses
	NVRAM       string // path of the variable store; "" = none
	NVRAMFormat string // "raw" or "qcow2"
}

// Snapshot is a snapshot that libvirt knows.
type Snapshot struct {
	Name     string
	Parent   string
	Internal bool // some disk's, or the memory's, state is kept inside of a disk image
}

// HasInternalSnapshots tells whether the domain has one. Such a domain must
// carry no bitmap of ours: QEMU refuses to revert while there is one.
func (d Domain) HasInternalSnapshots() bool {
	for _, s := range d.Snapshots {
		if s.Internal {
			return true
		}
	}
	return false
}

// Disk returns the disk with that target.
func (d Domain) Disk(target string) (Disk, bool) {
	for _, k := range d.Disks {
		if k.Target == target {
			return k, true
		}
	}
	return Disk{}, false
}

var uuidPattern = regexp.MustCompile(`^[0-9a-fA-F]{8}(-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}$`)

// Lookup finds a domain by its UUID, or by its name. A UUID wins: a domain may
// bear another's UUID as its name. The error is ErrNoDomain when there is none.
func (h *Hypervisor) Lookup(ctx context.Context, nameOrUUID string) (Domain, error) {
	return withConnect(ctx, h, fmt.Sprintf("look up domain %q", nameOrUUID), func(c *libvirt.Connect) (Domain, error) {
		d, err := (*libvirt.Domain)(nil), error(libvirt.Error{Code: libvirt.ERR_NO_DOMAIN})
		if uuidPattern.MatchString(nameOrUUID) {
			d, err = c.LookupDomainByUUIDString(nameOrUUID)
		}
		if isCode(err, libvirt.ERR_NO_DOMAIN) {
			d, err = c.LookupDomainByName(nameOrUUID)
		}
		if err != nil {
			return Domain{}, err
		}
		defer freeDomain(d)
		return describe(ctx, c, d)
	})
}

// ByUUID finds a domain by its UUID alone: another domain may bear it as its
// name. The error is ErrNoDomain when there is none.
func (h *Hypervisor) ByUUID(ctx context.Context, uuid string) (Domain, error) {
	return withConnect(ctx, h, "look up domain "+uuid, func(c *libvirt.Connect) (Domain, error) {
		d, err := c.LookupDomainByUUIDString(uuid)
		if err != nil {
			return Domain{}, err
		}
		defer freeDomain(d)
		return describe(ctx, c, d)
	})
}

// askLimit bounds how long Domains waits for one QEMU.
const askLimit = 5 * time.Second

// Domains returns all domains, active or not. One that vanishes meanwhile is
// left out. What only QEMU knows (sizes, jobs) is zero when it hangs: one guest
// must not keep all others from being seen.
func (h *Hypervisor) Domains(ctx context.Context) ([]Domain, error) {
	return withConnect(ctx, h, "list the domains", func(c *libvirt.Connect) ([]Domain, error) {
		all, err := c.ListAllDomains(0)
		if err != nil {
			return nil, err
		}
		var list []Domain
		for i := range all {
			known, err := definedAs(c, &all[i])
			if err == nil {
				list = append(list, askAtMost(ctx, askLimit, &all[i], known))
				continue
			}
			freeDomain(&all[i])
			if !isCode(err, libvirt.ERR_NO_DOMAIN) && !errors.Is(err, ErrNoDomain) {
				return nil, err
			}
		}
		return list, nil
	})
}

// describe asks libvirt everything that Domain holds.
func describe(ctx context.Context, c *libvirt.Connect, d *libvirt.Domain) (Domain, error) {
	out, err := definedAs(c, d)
	if err == nil {
		ask(ctx, d, &out)
	}
	return out, err
}

// askAtMost is ask that gives up, with what is known, when QEMU does not answer
// in time. It frees d.
func askAtMost(ctx context.Context, limit time.Duration, d *libvirt.Domain, known Domain) Domain {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	asked := make(chan Domain, 1)
	go func(out Domain) {
		defer freeDomain(d)
		out.Disks = slices.Clone(out.Disks)
		ask(ctx, d, &out)
		asked <- out
	}(known)
	select {
	case out := <-asked:
		return out
	case <-ctx.Done():
		return known
	}
}

// ask fills in what libvirt has to ask QEMU for. It does not go on to ask when
// ctx has ended: libvirtd does only a few calls of one connection at a time.
func ask(ctx context.Context, d *libvirt.Domain, out *Domain) {
	for i, k := range out.Disks {
		if k.SourceType == "" || ctx.Err() != nil {
			continue
		}
		if info, err := d.GetBlockInfo(k.Target, 0); err == nil {
			out.Disks[i].Capacity, out.Disks[i].Allocation, out.Disks[i].Physical = info.Capacity, info.Allocation, info.Physical
		}
	}
	if !out.Active || ctx.Err() != nil {
		return
	}
	if info, err := d.GetJobInfo(); err == nil {
		out.Job = info.Type != libvirt.DOMAIN_JOB_NONE
	}
	for _, k := range out.Disks {
		if k.SourceType == "" || ctx.Err() != nil {
			continue
		}
		// An error means "no such job" or "cannot have one" here.
		if info, err := d.GetBlockJobInfo(k.Target, 0); err == nil && info.Type != libvirt.DOMAIN_BLOCK_JOB_TYPE_UNKNOWN {
			out.BlockJobs = append(out.BlockJobs, k.Target)
		}
	}
}

// definedAs tells what libvirt knows by itself, without asking QEMU.
func definedAs(c *libvirt.Connect, d *libvirt.Domain) (Domain, error) {
	doc, err := d.GetXMLDesc(0)
	if err != nil {
		return Domain{}, err
	}
	var def libvirtxml.Domain
	if err := def.Unmarshal(doc); err != nil {
		return Domain{}, fmt.Errorf("cannot parse the domain's definition: %w", err)
	}
	if def.Metadata != nil && validationOf(def.Name, def.Metadata.XML) != "" {
		return Domain{}, fmt.Errorf("%w: it is a temporary one of a validation", ErrNoDomain)
	}
	out := Domain{XML: doc, Name: def.Name, UUID: def.UUID, Firmware: firmware(&def), TPM: tpm(&def)}
	if def.OS != nil {
		for _, file := range []string{def.OS.Kernel, def.OS.Initrd} {
			if file != "" {
				out.BootFiles = append(out.BootFiles, file)
			}
		}
	}
	// Not by a call of its own: the domain may have been started since.
	if out.Active = def.ID != nil; out.Active {
		out.ID = *def.ID
	}
	if out.State, out.StateReason, err = state(d); err != nil {
		return Domain{}, err
	}
	if out.Persistent, err = d.IsPersistent(); err != nil {
		return Domain{}, err
	}
	if def.Devices != nil {
		for i := range def.Devices.Disks {
			out.Disks = append(out.Disks, describeDisk(c, &def.Devices.Disks[i]))
		}
	}
	return out, describeMoments(d, &out)
}

// describeMoments fills in snapshots, checkpoints and saved state. The
// test driver, and old ones, do not know all of these: that reads as "none".
func describeMoments(d *libvirt.Domain, out *Domain) error {
	var err error
	if out.Snapshots, err = snapshots(d); err != nil {
		return err
	}
	if out.Checkpoints, err = checkpointNames(d); err != nil {
		return err
	}
	if out.HasManagedSave, err = d.HasManagedSaveImage(0); err != nil && !isCode(err, libvirt.ERR_NO_SUPPORT) {
		return err
	}
	return nil
}

func firmware(def *libvirtxml.Domain) Firmware {
	f := Firmware{Type: "bios"}
	if def.OS == nil {
		return f
	}
	if l := def.OS.Loader; l != nil {
		f.Loader = strings.TrimSpace(l.Path)
		if l.Type == "pflash" {
			f.Type = "efi"
		}
	}
	if def.OS.Firmware == "efi" {
		f.Type = "efi"
	}
	if n := def.OS.NVRam; n != nil {
		f.NVRAM, f.NVRAMFormat = strings.TrimSpace(n.NVRam), n.Format
		if n.Source != nil && n.Source.File != nil {
			f.NVRAM = n.Source.File.File
		}
		if f.NVRAMFormat == "" {
			f.NVRAMFormat = "raw"
		}
	}
	return f
}

func describeDisk(c *libvirt.Connect, x *libvirtxml.DomainDisk) Disk {
	k := Disk{
		Device: x.Device, Format: "raw", Serial: x.Serial,
		ReadOnly: x.ReadOnly != nil, Shareable: x.Shareable != nil, Transient: x.Transient != nil,
		Encrypted: x.Encryption != nil, Encryption: encryption(x.Encryption),
	}
	if k.Device == "" {
		k.Device = blockDeviceDisk
	}
	if x.Target != nil {
		k.Target = x.Target.Dev
	}
	if x.Driver != nil && x.Driver.Type != "" {
		k.Format = x.Driver.Type
	}
	if x.Alias != nil {
		k.Alias = x.Alias.Name
	}
	if x.BlockIO != nil {
		k.LogicalBlockSize = x.BlockIO.LogicalBlockSize
	}
	if x.Source != nil {
		if x.Source.Encryption != nil {
			k.Encrypted, k.Encryption = true, encryption(x.Source.Encryption)
		}
		k.SourceType, k.Source = source(c, x.Source)
		k.Index = int(x.Source.Index)
	}
	if k.SourceType == "" {
		return k
	}
	for b := x.BackingStore; b != nil && b.Source != nil; b = b.BackingStore {
		if kind, path := source(c, b.Source); kind != "" { // the end of a chain is an empty element
			k.Backing = append(k.Backing, path)
		}
	}
	return k
}

func encryption(x *libvirtxml.DomainDiskEncryption) Encryption {
	if x == nil || x.Format != "luks" || x.Engine != "" && x.Engine != "qemu" || len(x.Secrets) != 1 || x.Secrets[0].Type != "passphrase" {
		return Encryption{}
	}
	return Encryption{Format: x.Format, Secret: Secret{UUID: x.Secrets[0].UUID, Usage: x.Secrets[0].Usage}}
}

// source tells the type of a disk's source, and its path if it has one on this host.
func source(c *libvirt.Connect, s *libvirtxml.DomainDiskSource) (kind, path string) {
	switch {
	case s.File != nil && s.File.File != "":
		return "file", s.File.File
	case s.Block != nil && s.Block.Dev != "":
		return "block", s.Block.Dev
	case s.Network != nil:
		return "network", ""
	case s.Dir != nil:
		return "dir", ""
	case s.NVME != nil:
		return "nvme", ""
	case s.VHostUser != nil:
		return "vhostuser", ""
	case s.VHostVDPA != nil:
		return "vhostvdpa", ""
	case s.Volume != nil && s.Volume.Volume != "":
		return "volume", volumePath(c, s.Volume.Pool, s.Volume.Volume)
	default:
		return "", ""
	}
}

// volumePath returns "" when the pool is away.
func volumePath(c *libvirt.Connect, pool, volume string) string {
	p, err := c.LookupStoragePoolByName(pool)
	if err != nil {
		return ""
	}
	defer func() { _ = p.Free() }()
	v, err := p.LookupStorageVolByName(volume)
	if err != nil {
		return ""
	}
	defer func() { _ = v.Free() }()
	path, _ := v.GetPath()
	return path
}

func snapshots(d *libvirt.Domain) ([]Snapshot, error) {
	all, err := d.ListAllSnapshots(0)
	if err != nil {
		if isCode(err, libvirt.ERR_NO_SUPPORT) {
			return nil, nil
		}
		return nil, err
	}
	var list []Snapshot
	for i := range all {
		doc, err := all[i].GetXMLDesc(0)
		_ = all[i].Free()
		if err != nil {
			return nil, err
		}
		s, err := parseSnapshot(doc)
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	return list, nil
}

func parseSnapshot(doc string) (Snapshot, error) {
	var x libvirtxml.DomainSnapshot
	if err := x.Unmarshal(doc); err != nil {
		return Snapshot{}, fmt.Errorf("cannot parse a snapshot: %w", err)
	}
	s := Snapshot{Name: x.Name, Internal: x.Memory != nil && x.Memory.Snapshot == "internal"}
	if x.Parent != nil {
		s.Parent = x.Parent.Name
	}
	if x.Disks != nil {
		for _, k := range x.Disks.Disks {
			s.Internal = s.Internal || k.Snapshot == "internal"
		}
	}
	return s, nil
}

// State returns the domain's state and the reason for it.
func (h *Hypervisor) State(ctx context.Context, uuid string) (name, reason string, err error) {
	type pair struct{ name, reason string }
	p, err := withDomain(ctx, h, uuid, "ask for the state of", func(d *libvirt.Domain) (pair, error) {
		name, reason, err := state(d)
		return pair{name, reason}, err
	})
	return p.name, p.reason, err
}

func state(d *libvirt.Domain) (name, reason string, err error) {
	s, r, err := d.GetState()
	if err != nil {
		return "", "", err
	}
	pick := func(names ...string) string {
		if r >= 0 && r < len(names) {
			return names[r]
		}
		return StateUnknown
	}
	// The reasons in the order of libvirt's enumerations virDomainRunningReason, …
	switch s {
	case libvirt.DOMAIN_RUNNING, libvirt.DOMAIN_BLOCKED:
		return StateRunning, pick("unknown", "booted", "migrated", "restored", "from-snapshot", "unpaused", "migration-canceled", "save-canceled", "wakeup", "crashed", "postcopy", "postcopy-failed"), nil
	case libvirt.DOMAIN_PAUSED:
		return StatePaused, pick("unknown", ReasonPausedBy, "migration", "save", "dump", ReasonIOError, "watchdog", "from-snapshot", "shutting-down", "snapshot", "crashed", "starting-up", "postcopy", "postcopy-failed", "api-error"), nil
	case libvirt.DOMAIN_SHUTDOWN:
		return StateShutdown, pick("unknown", "user"), nil
	case libvirt.DOMAIN_SHUTOFF:
		return StateShutoff, pick("unknown", "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "daemon"), nil
	case libvirt.DOMAIN_CRASHED:
		return StateCrashed, pick("unknown", "panicked"), nil
	case libvirt.DOMAIN_PMSUSPENDED:
		return StateSuspended, "", nil
	default:
		return StateUnknown, "", nil
	}
}
