package hypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"libvirt.org/go/libvirt"
)

// Image is what the header of an image tells.
type Image struct {
	Size              uint64 // bytes, as the guest sees it
	InternalSnapshots bool
}

// ReadImage reads an image's header. A QEMU may have it open.
func ReadImage(ctx context.Context, path, format string) (Image, error) {
	i, err := imageInfo(ctx, path, format)
	return Image{Size: i.Size, InternalSnapshots: len(i.Snapshots) > 0}, err
}

// CommitImage commits an image that no QEMU has open, and all between, into a
// base below it; the image stays as it is. It is waited for also when ctx ends:
// a base of qcow2 that is not closed has clusters that nothing uses.
func CommitImage(ctx context.Context, base, top Stacked) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return qemuImg(context.WithoutCancel(ctx), nil, "commit", "-q", "-d", "-f", top.Format, "-b", base.Path, top.Path)
}

// SetBacking has an image that no QEMU has open name another one below. What
// it shows must be the same with both.
func SetBacking(ctx context.Context, image, below Stacked) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return qemuImg(context.WithoutCancel(ctx), nil, "rebase", "-u", "-q", "-f", image.Format, "-F", below.Format, "-b", below.Path, image.Path)
}

// SetSource gives a disk of a domain that is off another file. It is an error
// when the domain runs. What the definition tells of the layers below is left out.
func (h *Hypervisor) SetSource(ctx context.Context, uuid, target string, to Stacked) error {
	return h.onDomain(ctx, uuid, "change disk "+target+" of", func(d *libvirt.Domain) error {
		doc, err := d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE | libvirt.DOMAIN_XML_SECURE)
		if err != nil {
			return err
		}
		disk, err := diskWithSource(doc, target, to)
		if err != nil {
			return err
		}
		// "current": libvirt refuses it of a domain that was started meanwhile.
		return d.UpdateDeviceFlags(disk, libvirt.DOMAIN_DEVICE_MODIFY_CURRENT)
	})
}

// diskWithSource returns the element of a disk in a definition, with another file.
func diskWithSource(doc, target string, to Stacked) (string, error) {
	root, err := parseTree([]byte(doc))
	if err != nil {
		return "", err
	}
	devices := root.child("devices")
	if devices == nil {
		return "", errors.New("the definition has no devices")
	}
	for _, e := range devices.children {
		if e.name != "disk" || e.child("target") == nil || e.child("target").attr("dev") != target {
			continue
		}
		source, driver := e.child("source"), e.child("driver")
		if source == nil || e.attr("type") != "file" {
			return "", fmt.Errorf("disk %s is no file", target)
		}
		if driver == nil {
			driver = &element{name: "driver"}
			driver.set("name", "qemu")
			e.children = append([]*element{driver}, e.children...)
		}
		source.set("file", to.Path)
		source.unset("index")
		driver.set("type", to.Format)
		e.remove("backingStore")
		return e.marshal()
	}
	return "", fmt.Errorf("the definition has no disk %s", target)
}

// WithoutOverlays returns a domain's definition with other files in the place
// of overlays, as it would be without them.
func WithoutOverlays(doc string, disks map[string]Stacked) (string, error) {
	for target, to := range disks {
		disk, err := diskSpan(doc, target)
		if err != nil {
			return "", err
		}
		changed, err := diskWithSource("<domain><devices>"+doc[disk.from:disk.to]+"</devices></domain>", target, to)
		if err != nil {
			return "", err
		}
		doc = doc[:disk.from] + changed + doc[disk.to:]
	}
	return doc, nil
}

type span struct{ from, to int }

// diskSpan finds the element of a disk in a document that libvirt wrote: that
// indents elements and quotes attributes with apostrophes.
func diskSpan(doc, target string) (span, error) {
	const begin, end = "<disk ", "</disk>"
	for from := 0; ; {
		i := strings.Index(doc[from:], begin)
		if i < 0 {
			return span{}, fmt.Errorf("the definition has no disk %s", target)
		}
		from += i
		j := strings.Index(doc[from:], end)
		if j < 0 {
			return span{}, errors.New("the definition is cut off")
		}
		s := span{from, from + j + len(end)}
		if strings.Contains(doc[s.from:s.to], "<target dev='"+target+"'") {
			return s, nil
		}
		from = s.to
	}
}

// EmptyImage tells whether a qcow2 image holds nothing itself.
func EmptyImage(ctx context.Context, path string) (bool, error) {
	// Without a layer below, what is not in it is neither data nor zeroes.
	spec := `json:{"driver":"qcow2","backing":null,"file":{"driver":"file","locking":"off","filename":` + quoted(path) + `}}`
	var extents []struct {
		Present bool `json:"present"`
	}
	if err := qemuImg(ctx, &extents, "map", "-U", "--output=json", spec); err != nil {
		return false, err
	}
	for _, e := range extents {
		if e.Present {
			return false, nil
		}
	}
	return true, nil
}

func quoted(s string) string {
	b, _ := json.Marshal(s) // a string can always be marshalled
	return string(b)
}

// Definition returns the stored definition of a domain: what it has at its next start.
func (h *Hypervisor) Definition(ctx context.Context, uuid string) (string, error) {
	return withDomain(ctx, h, uuid, "read the stored definition of", func(d *libvirt.Domain) (string, error) {
		return d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE)
	})
}
