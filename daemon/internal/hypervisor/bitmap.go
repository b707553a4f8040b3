package hypervisor

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os/exec"
	"slices"

	"libvirt.org/go/libvirt"
)

func unmarshal(doc string, v any) error { return xml.Unmarshal([]byte(doc), v) }

// missingBitmap tells whether deleting failed because there is no bitmap to
// delete. libvirt 9.0 has no code of its own for that ("internal error: bitmap
// … not found in backing chain"), and its text may be translated.
func missingBitmap(err error) bool {
	return isCode(err, libvirt.ERR_INTERNAL_ERROR) || isCode(err, libvirt.ERR_NO_DOMAIN_CHECKPOINT)
}

// imageBitmap is a bitmap as qemu-img info lists it.
type imageBitmap struct {
	Name  string   `json:"name"`
	Flags []string `json:"flags"`
}

// consistent tells whether the bitmap was written back properly and records.
func (b imageBitmap) consistent() bool {
	return slices.Contains(b.Flags, "auto") && !slices.Contains(b.Flags, "in-use")
}

// offlineBitmaps looks for a bitmap in the images of a stopped domain.
func offlineBitmaps(ctx context.Context, dom Domain, name string) (map[string]bool, error) {
	m := make(map[string]bool)
	err := eachImageWith(ctx, dom, name, func(k Disk, b imageBitmap) error {
		m[k.Target] = b.consistent()
		return nil
	})
	return m, err
}

// removeOffline removes a bitmap from the images of a stopped domain. QEMU's
// image lock makes it fail when the domain is started meanwhile. What is begun
// is waited for, also when ctx ends: to write, QEMU marks all bitmaps of the
// image, foreign ones too, as in use until it closes it, and killed before
// that it would leave all of them inconsistent.
func removeOffline(ctx context.Context, dom Domain, name string) error {
	return eachImageWith(ctx, dom, name, func(k Disk, _ imageBitmap) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return qemuImg(context.WithoutCancel(ctx), nil, "bitmap", "--remove", "-f", k.Format, k.Source, name)
	})
}

func eachImageWith(ctx context.Context, dom Domain, name string, fn func(Disk, imageBitmap) error) error {
	for _, k := range dom.Disks {
		if k.Format != "qcow2" || k.Device != blockDeviceDisk || k.Source == "" {
			continue
		}
		list, err := imageBitmaps(ctx, k)
		if err != nil {
			return err
		}
		for _, b := range list {
			if b.Name != name {
				continue
			}
			if err := fn(k, b); err != nil {
				return err
			}
		}
	}
	return nil
}

// imageBitmaps lists the bitmaps of an image that no QEMU has open. The format
// is always given: a guest may have written a header onto a raw disk.
func imageBitmaps(ctx context.Context, k Disk) ([]imageBitmap, error) {
	var info struct {
		Specific struct {
			Data struct {
				Bitmaps []imageBitmap `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := qemuImg(ctx, &info, "info", "-f", k.Format, "--output=json", k.Source); err != nil {
		return nil, err
	}
	return info.Specific.Data.Bitmaps, nil
}

// qemuImg runs qemu-img, and parses its JSON into out unless that is nil.
func qemuImg(ctx context.Context, out any, args ...string) error {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	text, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return fmt.Errorf("cannot run qemu-img %s: %w: %s", args[0], err, exit.Stderr)
		}
		return fmt.Errorf("cannot run qemu-img %s: %w", args[0], err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("cannot parse what qemu-img %s says: %w", args[0], err)
	}
	return nil
}
