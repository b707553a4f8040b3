package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

// bitmapPrefix begins the names of virtbackup's bitmaps, which are those of its
// checkpoints.
const bitmapPrefix = "virtbackup-"

// makeRevertible removes virtbackup's bitmaps from the images that hold internal
// snapshots. QEMU reverts to none of them while there is a bitmap ("Device has
// active dirty bitmaps") and libvirt leaves the domain off then. The daemon
// removes the bitmaps when it sees a snapshot; an admin who reverts before it
// could must not notice. A revert starts QEMU anew, and nobody has the images
// open at that moment but us.
//
// Nothing is begun after ctx has ended, as libvirt may have started QEMU by
// then. What is begun is not interrupted: qemu-img, killed while it writes, would
// leave the bitmaps of others in use.
func makeRevertible(ctx context.Context, definition []byte) error {
	sources, err := fingerprint.Sources(definition)
	if err != nil {
		return err
	}
	var failed []error
	for _, s := range sources {
		// To qemu-img all else might name a protocol.
		if s.Format != "qcow2" || !filepath.IsAbs(s.Path) {
			continue
		}
		if any, err := hasSnapshots(s.Path); err != nil || !any {
			continue // what cannot be read is for QEMU to complain of
		}
		failed = append(failed, removeBitmaps(ctx, s.Path))
	}
	return errors.Join(failed...)
}

// hasSnapshots reads the number of internal snapshots in a qcow2 header (QEMU
// docs/interop/qcow2.txt, "Header": nb_snapshots).
func hasSnapshots(path string) (bool, error) {
	// Not to wait for another end, should it be a FIFO.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() && info.Mode().Type() != fs.ModeDevice {
		return false, err
	}
	var h [64]byte
	if _, err := io.ReadFull(f, h[:]); err != nil {
		return false, err
	}
	return string(h[:4]) == "QFI\xfb" && binary.BigEndian.Uint32(h[60:]) > 0, nil
}

func removeBitmaps(ctx context.Context, path string) error {
	text, err := exec.CommandContext(ctx, "qemu-img", "info", "-f", "qcow2", "--output=json", path).Output()
	if err != nil {
		return fmt.Errorf("cannot look for bitmaps in %s: %w", path, err)
	}
	var info struct {
		Specific struct {
			Data struct {
				Bitmaps []struct {
					Name string `json:"name"`
				} `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(text, &info); err != nil {
		return fmt.Errorf("cannot look for bitmaps in %s: %w", path, err)
	}
	var failed []error
	for _, b := range info.Specific.Data.Bitmaps {
		if !strings.HasPrefix(b.Name, bitmapPrefix) {
			continue
		}
		if ctx.Err() != nil {
			return errors.Join(append(failed, fmt.Errorf("cannot remove bitmap %s from %s in time: %w", b.Name, path, context.Cause(ctx)))...)
		}
		out, err := exec.CommandContext(context.WithoutCancel(ctx), "qemu-img", "bitmap", "--remove", "-f", "qcow2", path, b.Name).CombinedOutput()
		if err != nil {
			failed = append(failed, fmt.Errorf("cannot remove bitmap %s from %s: %w: %s", b.Name, path, err, strings.TrimSpace(string(out))))
		}
	}
	return errors.Join(failed...)
}
