package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
)

// Layer is one image of the backing chain of a stopped domain's disk.
type Layer struct {
	Path    string
	Format  string
	bitmaps []imageBitmap
}

func (l Layer) bitmap(name string) (imageBitmap, bool) {
	i := slices.IndexFunc(l.bitmaps, func(b imageBitmap) bool { return b.Name == name })
	if i < 0 {
		return imageBitmap{}, false
	}
	return l.bitmaps[i], true
}

// ErrLayer says that a layer of a disk cannot be opened without QEMU's help, or
// not safely.
var ErrLayer = errors.New("unsupported backing chain")

// maxLayers is more than libvirt takes (200).
const maxLayers = 256

// protocol is how QEMU tells a name with a protocol from a path
// (path_has_protocol of block.c).
var protocol = regexp.MustCompile("^[^/]*:")

// Layers follows the backing chain of a stopped domain's disk by the headers of
// its images, the top first. No format is ever guessed: that of the top one is
// the definition's, those below are what the header above says. ErrLayer: it does
// not say, or the layer is no file or block device of this host, or its data is
// in another file: libvirt gives QEMU no right to read that, and we, who may read
// any, must not do for whoever made the image what QEMU could not.
func Layers(ctx context.Context, k Disk) ([]Layer, error) {
	if !filepath.IsAbs(k.Source) { // to QEMU's tools all else might name a protocol
		return nil, fmt.Errorf("disk %s is on no path of this host: %w", k.Target, ErrLayer)
	}
	path, format := k.Source, k.Format
	var all []Layer
	for len(all) < maxLayers {
		if format != "qcow2" {
			return append(all, Layer{Path: path, Format: format}), nil
		}
		l, err := imageInfo(ctx, path, format)
		if err != nil {
			return nil, err
		}
		all = append(all, Layer{Path: path, Format: format, bitmaps: l.Specific.Data.Bitmaps})
		switch {
		case l.Specific.Data.DataFile != "":
			return nil, fmt.Errorf("the data of %s is in another file, %q: %w", path, l.Specific.Data.DataFile, ErrLayer)
		case l.Backing == "":
			return all, nil
		case protocol.MatchString(l.Backing) || protocol.MatchString(l.FullBacking):
			return nil, fmt.Errorf("%s is based on %q, which is no path: %w", path, l.Backing, ErrLayer)
		case l.BackingFormat != "qcow2" && l.BackingFormat != "raw":
			return nil, fmt.Errorf("%s is based on %s without saying that it is qcow2 or raw (see qemu-img rebase -u -F): %w", path, l.FullBacking, ErrLayer)
		}
		path, format = l.FullBacking, l.BackingFormat
	}
	return nil, fmt.Errorf("disk %s has more than %d layers: %w", k.Target, maxLayers, ErrLayer)
}

// image is what qemu-img info says of one image.
type image struct {
	Size          uint64 `json:"virtual-size"`
	Snapshots     []any  `json:"snapshots"`
	Backing       string `json:"backing-filename"`
	FullBacking   string `json:"full-backing-filename"`
	BackingFormat string `json:"backing-filename-format"`
	Specific      struct {
		Data struct {
			Bitmaps  []imageBitmap `json:"bitmaps"`
			DataFile string        `json:"data-file"`
		} `json:"data"`
	} `json:"format-specific"`
}

func (i image) bitmap(name string) (imageBitmap, bool) {
	return Layer{bitmaps: i.Specific.Data.Bitmaps}.bitmap(name)
}

// imageInfo reads the header of an image. The format is always given: a guest
// may have written a header onto a raw disk. It takes no lock (-U), or a domain
// that is started at this moment would not start.
func imageInfo(ctx context.Context, path, format string) (i image, err error) {
	return i, qemuImg(ctx, &i, "info", "-U", "-f", format, "--output=json", path)
}
