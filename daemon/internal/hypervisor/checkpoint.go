package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

// OursCheckpoint tells whether a checkpoint's name is one of ours.
func OursCheckpoint(name string) bool { return strings.HasPrefix(name, checkpointOurs) }

// newCheckpoint describes a checkpoint with a bitmap on some of the disks. made
// is zero for one that libvirt is to make.
func newCheckpoint(name string, made time.Time, targets, carrying []string) (string, error) {
	if len(carrying) == 0 {
		return "", fmt.Errorf("checkpoint %s would be on no disk", name)
	}
	x := libvirtxml.DomainCheckpoint{Name: name, Disks: &libvirtxml.DomainCheckpointDisks{}}
	if !made.IsZero() {
		x.CreationTime = strconv.FormatInt(made.Unix(), 10)
	}
	for _, t := range targets {
		k := libvirtxml.DomainCheckpointDisk{Name: t, Checkpoint: "no"}
		if slices.Contains(carrying, t) {
			k.Checkpoint = "bitmap"
		}
		x.Disks.Disks = append(x.Disks.Disks, k)
	}
	for _, t := range carrying {
		if !slices.Contains(targets, t) {
			return "", fmt.Errorf("checkpoint %s: the domain has no disk %s", name, t)
		}
	}
	doc, err := x.Marshal()
	if err != nil {
		return "", fmt.Errorf("cannot describe checkpoint %s: %w", name, err)
	}
	return doc, nil
}

// withCheckpoint calls fn with one checkpoint that libvirt knows.
func withCheckpoint[T any](ctx context.Context, h *Hypervisor, uuid, name, op string, fn func(*libvirt.Domain, *libvirt.DomainCheckpoint) (T, error)) (T, error) {
	return withDomain(ctx, h, uuid, op+" "+name+" of", func(d *libvirt.Domain) (T, error) {
		c, err := d.CheckpointLookupByName(name, 0)
		if err != nil {
			var zero T
			return zero, err
		}
		defer func() { _ = c.Free() }()
		return fn(d, c)
	})
}

// CheckpointDefinition returns the XML to keep for Redefine. The checkpoint
// must be known to libvirt: call it right after BeginBackup.
func (h *Hypervisor) CheckpointDefinition(ctx context.Context, uuid, name string) (string, error) {
	return withCheckpoint(ctx, h, uuid, name, "read checkpoint", func(_ *libvirt.Domain, c *libvirt.DomainCheckpoint) (string, error) {
		return c.GetXMLDesc(libvirt.DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
	})
}

// Redefine tells libvirt of a checkpoint again that it had forgotten. Whether
// its bitmaps are still there is not checked: ask CheckpointUsable.
func (h *Hypervisor) Redefine(ctx context.Context, uuid, definition string) error {
	return h.onDomain(ctx, uuid, "redefine a checkpoint of", func(d *libvirt.Domain) error {
		doc, err := orphan(definition, nil)
		if err != nil {
			return err
		}
		return redefine(d, doc)
	})
}

func redefine(d *libvirt.Domain, doc string) error {
	c, err := d.CreateCheckpointXML(doc, libvirt.DOMAIN_CHECKPOINT_CREATE_REDEFINE)
	if err != nil {
		return err
	}
	return c.Free()
}

// orphan returns a checkpoint's definition without its parent, which libvirt
// need not know any more (each of our bitmaps records on its own), and without
// the domain's definition, which may have changed since. When only is not nil,
// the bitmaps of all other disks are left out.
func orphan(definition string, only []string) (string, error) {
	var x libvirtxml.DomainCheckpoint
	if err := x.Unmarshal(definition); err != nil {
		return "", fmt.Errorf("cannot parse the checkpoint's definition: %w", err)
	}
	x.Parent, x.Domain = nil, nil
	if x.Disks != nil && only != nil {
		for i, k := range x.Disks.Disks {
			if !slices.Contains(only, k.Name) {
				x.Disks.Disks[i] = libvirtxml.DomainCheckpointDisk{Name: k.Name, Checkpoint: "no"}
			}
		}
	}
	return x.Marshal()
}

// ListOurs returns the names of our checkpoints that libvirt knows, sorted,
// oldest first (they carry ULIDs).
func (h *Hypervisor) ListOurs(ctx context.Context, uuid string) ([]string, error) {
	return withDomain(ctx, h, uuid, "list the checkpoints of", func(d *libvirt.Domain) ([]string, error) {
		names, err := checkpointNames(d)
		names = slices.DeleteFunc(names, func(n string) bool { return !OursCheckpoint(n) })
		slices.Sort(names)
		return names, err
	})
}

func checkpointNames(d *libvirt.Domain) ([]string, error) {
	all, err := d.ListAllCheckpoints(0)
	if err != nil {
		if isCode(err, libvirt.ERR_NO_SUPPORT) {
			return nil, nil
		}
		return nil, err
	}
	var names []string
	for i := range all {
		name, err := all[i].GetName()
		_ = all[i].Free()
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// Forget removes what libvirt knows of a checkpoint, and leaves its bitmaps in
// the images. It is fine when libvirt knows none.
func (h *Hypervisor) Forget(ctx context.Context, uuid, name string) error {
	err := h.onDomain(ctx, uuid, "forget checkpoint "+name+" of", func(d *libvirt.Domain) error { return forget(d, name) })
	if errors.Is(err, ErrNoCheckpoint) {
		return nil
	}
	return err
}

func forget(d *libvirt.Domain, name string) error {
	return deleteCheckpoint(d, name, libvirt.DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
}

func deleteCheckpoint(d *libvirt.Domain, name string, flags libvirt.DomainCheckpointDeleteFlags) error {
	c, err := d.CheckpointLookupByName(name, 0)
	if err != nil {
		return err
	}
	defer func() { _ = c.Free() }()
	return c.Delete(flags)
}

// CheckpointUsable tells for each disk whether an increment from the
// checkpoint would be right. Disks that the checkpoint was never on are not in
// the map.
//
// In a running domain libvirt must know the checkpoint (Redefine), and the
// error is ErrNoCheckpoint otherwise. In a stopped one the images themselves
// are read, and a disk whose image lacks the bitmap is not in the map.
func (h *Hypervisor) CheckpointUsable(ctx context.Context, uuid, name string) (map[string]bool, error) {
	dom, err := h.ByUUID(ctx, uuid)
	if err != nil {
		return nil, err
	}
	if !dom.Active {
		return offlineBitmaps(ctx, dom, name)
	}
	return withCheckpoint(ctx, h, uuid, name, "check checkpoint", func(_ *libvirt.Domain, c *libvirt.DomainCheckpoint) (map[string]bool, error) {
		doc, err := c.GetXMLDesc(libvirt.DOMAIN_CHECKPOINT_XML_SIZE)
		if err != nil {
			return nil, err
		}
		return usable(doc)
	})
}

// usable reads the answer of a running domain: a bitmap that is missing or
// inconsistent has no size attribute.
func usable(doc string) (map[string]bool, error) {
	var x struct {
		Disks []struct {
			Name       string  `xml:"name,attr"`
			Checkpoint string  `xml:"checkpoint,attr"`
			Size       *uint64 `xml:"size,attr"`
		} `xml:"disks>disk"`
	}
	if err := unmarshal(doc, &x); err != nil {
		return nil, fmt.Errorf("cannot parse the checkpoint: %w", err)
	}
	m := make(map[string]bool)
	for _, k := range x.Disks {
		if k.Checkpoint == "bitmap" {
			m[k.Name] = k.Size != nil
		}
	}
	return m, nil
}

// Delete removes a checkpoint and its bitmaps from all images. definition is
// what CheckpointDefinition gave, for when libvirt has forgotten it; "" if
// there is none. It is fine when there is nothing to remove.
//
// libvirt deletes no bitmap at all when one of them is missing, so each disk
// is tried by itself then: the checkpoint is redefined for that disk alone.
func (h *Hypervisor) Delete(ctx context.Context, uuid, name, definition string) error {
	dom, err := h.ByUUID(ctx, uuid)
	if err != nil {
		return err
	}
	if !dom.Active {
		if err := removeOffline(ctx, dom, name); err != nil {
			return err
		}
		return h.Forget(ctx, uuid, name)
	}
	return h.onDomain(ctx, uuid, "delete checkpoint "+name+" of", func(d *libvirt.Domain) error {
		known, err := checkpointXML(d, name)
		switch {
		case errors.Is(err, ErrNoCheckpoint) && definition == "":
			return nil
		case errors.Is(err, ErrNoCheckpoint):
			if known, err = orphan(definition, nil); err == nil {
				err = redefine(d, known)
			}
		}
		if err != nil {
			return err
		}
		if err := deleteCheckpoint(d, name, 0); err == nil {
			return nil
		}
		return deleteDiskByDisk(d, name, known)
	})
}

func checkpointXML(d *libvirt.Domain, name string) (string, error) {
	c, err := d.CheckpointLookupByName(name, 0)
	if err != nil {
		return "", classify(err)
	}
	defer func() { _ = c.Free() }()
	return c.GetXMLDesc(libvirt.DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
}

// deleteDiskByDisk deletes the bitmaps one by one. The errors are those that
// do not mean that there is no bitmap to delete.
func deleteDiskByDisk(d *libvirt.Domain, name, definition string) error {
	var x libvirtxml.DomainCheckpoint
	if err := x.Unmarshal(definition); err != nil {
		return fmt.Errorf("cannot parse the checkpoint's definition: %w", err)
	}
	var failed []error
	for _, k := range x.Disks.Disks {
		if k.Checkpoint != "bitmap" {
			continue
		}
		if err := forget(d, name); err != nil && !isCode(err, libvirt.ERR_NO_DOMAIN_CHECKPOINT) {
			return err
		}
		doc, err := orphan(definition, []string{k.Name})
		if err != nil {
			return err
		}
		if err := redefine(d, doc); err != nil {
			failed = append(failed, fmt.Errorf("disk %s: %w", k.Name, classify(err)))
			continue
		}
		if err := deleteCheckpoint(d, name, 0); err != nil && !missingBitmap(err) {
			failed = append(failed, fmt.Errorf("disk %s: %w", k.Name, classify(err)))
		}
	}
	if err := forget(d, name); err != nil && !isCode(err, libvirt.ERR_NO_DOMAIN_CHECKPOINT) {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
