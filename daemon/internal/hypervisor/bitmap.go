package hypervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

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

// offlineBitmaps looks for a bitmap in the images of a stopped domain. It must
// be in the top layer alone: overlays that were made while the domain ran carry
// bitmaps of their own under the same name, and only QEMU adds them up.
func offlineBitmaps(ctx context.Context, dom Domain, name string) (map[string]bool, error) {
	m := make(map[string]bool)
	for _, k := range dom.Disks {
		if !k.canCarryBitmap() {
			continue
		}
		layers, err := Layers(ctx, k)
		if errors.Is(err, ErrLayer) {
			continue // nobody can tell, then
		}
		if err != nil {
			return nil, err
		}
		for i, l := range layers {
			if b, ok := l.bitmap(name); ok {
				m[k.Target] = i == 0 && b.consistent()
			}
		}
	}
	return m, nil
}

func (k Disk) canCarryBitmap() bool {
	return k.Format == "qcow2" && k.Device == blockDeviceDisk && filepath.IsAbs(k.Source)
}

// AddBitmap adds the bitmap of a new checkpoint to the image of a stopped
// domain's disk, in the place of one of this name that an attempt before left.
// QEMU's image lock makes it fail when the domain is started meanwhile.
func AddBitmap(ctx context.Context, k Disk, name string) error {
	if err := RemoveBitmap(ctx, k, name); err != nil {
		return err
	}
	return changeBitmap(ctx, k, "--add", name)
}

// RemoveBitmap removes a bitmap from the image of a stopped domain's disk. It is
// fine when there is none.
func RemoveBitmap(ctx context.Context, k Disk, name string) error {
	if !k.canCarryBitmap() {
		return nil
	}
	top, err := imageInfo(ctx, k.Source, k.Format)
	if err != nil {
		return err
	}
	if _, ok := top.bitmap(name); !ok {
		return nil
	}
	return changeBitmap(ctx, k, "--remove", name)
}

// changeBitmap waits for what is begun, also when ctx ends: to write, QEMU marks
// all bitmaps of the image, foreign ones too, as in use until it closes it, and
// killed before that it would leave all of them inconsistent.
func changeBitmap(ctx context.Context, k Disk, what, name string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return qemuImg(context.WithoutCancel(ctx), nil, "bitmap", what, "-f", k.Format, k.Source, name)
}

// OfflineCheckpoint describes a checkpoint whose bitmaps AddBitmap made, as
// Redefine takes it.
func OfflineCheckpoint(dom Domain, name string, made time.Time, carrying []string) (string, error) {
	targets, err := diskTargets(dom.XML)
	if err != nil {
		return "", err
	}
	return newCheckpoint(name, made, targets, carrying)
}

// removeOffline removes a bitmap from the images of a stopped domain.
func removeOffline(ctx context.Context, dom Domain, name string) error {
	for _, k := range dom.Disks {
		if err := RemoveBitmap(ctx, k, name); err != nil {
			return err
		}
	}
	return nil
}

// qemuImg runs qemu-img, and parses its JSON into out unless that is nil.
func qemuImg(ctx context.Context, out any, args ...string) error {
	cmd := exec.CommandContext(ctx, "qemu-img", args...)
	text, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return fmt.Errorf("cannot run qemu-img %s: %w: %s", args[0], err, bytes.TrimSpace(exit.Stderr))
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
