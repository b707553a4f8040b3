package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// ErrBlockJob says that a block job that somebody else started is active on a disk.
var ErrBlockJob = errors.New("another block job is active on the disk")

// Stacked is one image of the backing chain of a disk, and where it is in QEMU.
type Stacked struct {
	Path   string // "" unless it is a file or a block device of this host
	Type   string // of the source: "file", "block"; "network" for all else
	Format string // "qcow2", "raw", …; as declared, never probed
	Node   int    // libvirt's index of it in this run of QEMU; 0 while the domain is off
}

// Stacks returns the backing chains of all disks that are a file, by their
// targets, the top layer first. Of a domain that is off the images' own headers
// tell, see Layers.
func Stacks(ctx context.Context, d Domain) (map[string][]Stacked, error) {
	var def libvirtxml.Domain
	if err := def.Unmarshal(d.XML); err != nil {
		return nil, fmt.Errorf("cannot parse the domain's definition: %w", err)
	}
	all := map[string][]Stacked{}
	if def.Devices == nil {
		return all, nil
	}
	for i := range def.Devices.Disks {
		x := &def.Devices.Disks[i]
		if x.Source == nil || x.Target == nil {
			continue
		}
		k, known := d.Disk(x.Target.Dev)
		if !known || k.SourceType != "file" || k.Device != blockDeviceDisk {
			continue
		}
		if d.Active {
			top := Stacked{Path: k.Source, Type: k.SourceType, Format: k.Format, Node: int(x.Source.Index)}
			all[k.Target] = append([]Stacked{top}, layersBelow(x.BackingStore)...)
			continue
		}
		chain, err := Layers(ctx, k)
		if err != nil {
			return nil, fmt.Errorf("cannot find the layers of disk %s of domain %q: %w", k.Target, d.Name, err)
		}
		for _, l := range chain {
			all[k.Target] = append(all[k.Target], Stacked{Path: l.Path, Type: "file", Format: l.Format})
		}
	}
	return all, nil
}

func layersBelow(x *libvirtxml.DomainDiskBackingStore) []Stacked {
	var all []Stacked
	for ; x != nil && x.Source != nil; x = x.BackingStore {
		l := Stacked{Type: "network", Node: int(x.Index)} // or whatever else is no path
		if x.Format != nil {
			l.Format = x.Format.Type
		}
		switch s := x.Source; {
		case s.File != nil && s.File.File != "":
			l.Type, l.Path = "file", s.File.File
		case s.Block != nil && s.Block.Dev != "":
			l.Type, l.Path = "block", s.Block.Dev
		case s.File == nil && s.Block == nil && s.Network == nil && s.NVME == nil && s.Volume == nil && s.VHostUser == nil && s.VHostVDPA == nil:
			return all // the end of a chain is an empty element
		}
		all = append(all, l)
	}
	return all
}

// PutOverlays puts a new overlay on some disks of a domain, by target, all at
// one point in time or none: a disk-only snapshot that libvirt keeps no
// metadata of. The files must not be there. The error is libvirt's when one
// cannot be made, as for lack of space; the domain is as before then.
func (h *Hypervisor) PutOverlays(ctx context.Context, uuid string, paths map[string]string) error {
	return h.onDomain(ctx, uuid, "put overlays on the disks of", func(d *libvirt.Domain) error {
		doc, err := d.GetXMLDesc(0)
		if err != nil {
			return err
		}
		targets, err := diskTargets(doc)
		if err != nil {
			return err
		}
		x := libvirtxml.DomainSnapshot{Name: "virtbackup", Disks: &libvirtxml.DomainSnapshotDisks{}}
		for _, target := range targets {
			k := libvirtxml.DomainSnapshotDisk{Name: target, Snapshot: "no"}
			if path, any := paths[target]; any {
				k.Snapshot, k.Driver = "external", &libvirtxml.DomainDiskDriver{Type: "qcow2"}
				k.Source = &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}}
			}
			x.Disks.Disks = append(x.Disks.Disks, k)
		}
		if doc, err = x.Marshal(); err != nil {
			return fmt.Errorf("cannot describe the snapshot: %w", err)
		}
		s, err := d.CreateSnapshotXML(doc, libvirt.DOMAIN_SNAPSHOT_CREATE_DISK_ONLY|
			libvirt.DOMAIN_SNAPSHOT_CREATE_NO_METADATA|libvirt.DOMAIN_SNAPSHOT_CREATE_ATOMIC)
		if err != nil {
			return err
		}
		return s.Free()
	})
}

// blockJobPoll is how often a block job is looked at. Events could be lost with
// the connection, and with libvirtd.
const blockJobPoll = 50 * time.Millisecond

// LayerCommit is what CommitLayer does to a disk.
type LayerCommit struct {
	Target string
	Top    string // path of the layer that is committed, with all between
	Base   string // path of the one below into which they go
	Active bool   // Top is the active layer, and Base is that afterwards
}

// CommitLayer has QEMU commit layers of a running domain's disk and waits for
// that; what was committed is deleted then. The error is ErrBlockJob when a job
// is at work on the disk already. When ctx ends first the job is aborted: the
// chain is as before then, or that of the commit.
func (h *Hypervisor) CommitLayer(ctx context.Context, uuid string, c LayerCommit) error {
	return h.onDomain(ctx, uuid, "commit a layer of disk "+c.Target+" of", func(d *libvirt.Domain) error {
		job, err := blockJobOf(d, c.Target)
		if err != nil {
			return err
		}
		if job.active {
			return ErrBlockJob
		}
		flags := libvirt.DOMAIN_BLOCK_COMMIT_DELETE
		if c.Active { // libvirt refuses it when Top is not the active one any more
			flags |= libvirt.DOMAIN_BLOCK_COMMIT_ACTIVE
		}
		if err := d.BlockCommit(c.Target, c.Base, c.Top, 0, flags); err != nil {
			return err
		}
		return finishCommit(ctx, d, c.Target)
	})
}

// JoinCommit goes on with a commit that CommitLayer began and did not see end.
// It is fine when there is none; the error is ErrBlockJob for any other job.
func (h *Hypervisor) JoinCommit(ctx context.Context, uuid, target string) error {
	return h.onDomain(ctx, uuid, "commit a layer of disk "+target+" of", func(d *libvirt.Domain) error {
		job, err := blockJobOf(d, target)
		if err != nil {
			return err
		}
		if job.active && !job.commit {
			return ErrBlockJob
		}
		return finishCommit(ctx, d, target)
	})
}

// finishCommit waits until no block job is active, and makes the base of a job
// that is ready the active layer.
func finishCommit(ctx context.Context, d *libvirt.Domain, target string) error {
	for {
		job, err := blockJobOf(d, target)
		switch {
		case err != nil:
			return err
		case !job.active:
			return nil
		case job.ready:
			// The guest may be about to write so much that QEMU is not ready again.
			if err := d.BlockJobAbort(target, libvirt.DOMAIN_BLOCK_JOB_ABORT_PIVOT); err != nil && !isCode(err, libvirt.ERR_BLOCK_COPY_ACTIVE) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), d.BlockJobAbort(target, 0))
		case <-time.After(blockJobPoll):
		}
	}
}

type diskJob struct {
	active bool
	commit bool
	ready  bool // to make its base the active layer
}

// blockJobOf asks for a disk's block job.
func blockJobOf(d *libvirt.Domain, target string) (job diskJob, err error) {
	info, err := d.GetBlockJobInfo(target, 0)
	if err != nil {
		return job, err
	}
	switch info.Type {
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_UNKNOWN:
		return job, nil
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_COMMIT, libvirt.DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT:
		job.commit = true
	}
	job.active = true
	doc, err := d.GetXMLDesc(0)
	if err != nil {
		return job, err
	}
	var def libvirtxml.Domain
	if err := def.Unmarshal(doc); err != nil || def.Devices == nil {
		return job, err
	}
	for _, k := range def.Devices.Disks {
		if k.Target != nil && k.Target.Dev == target && k.Mirror != nil {
			job.ready = job.commit && k.Mirror.Ready == "yes"
		}
	}
	return job, nil
}
