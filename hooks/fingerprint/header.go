package fingerprint

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// below is what a qcow2 header says that lies below or beside the image.
type below struct {
	backing string // name of the backing file; "" for none
	format  string // its format; "" when the header does not say
	data    string // name of the external data file; "" for none
}

// Of the qcow2 specification (docs/interop/qcow2.txt in QEMU's sources).
const (
	headerSize         = 104
	extensionEnd       = 0
	extensionFormat    = 0xE2792ACA
	extensionData      = 0x44415441
	featureData        = 1 << 2 // incompatible
	maxName            = 1023
	maxHeaderExtension = 64 << 10
)

// readHeader reads the header of a qcow2 image. The guest cannot have written
// it: who calls knows from the domain's definition, or from an image above
// that is qcow2 by it, that QEMU takes the file for qcow2.
func readHeader(r io.ReaderAt) (below, error) {
	h := make([]byte, headerSize)
	n, err := r.ReadAt(h, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return below{}, fmt.Errorf("cannot read its header: %w", err)
	}
	if n < 72 || string(h[:4]) != "QFI\xfb" {
		return below{}, errors.New("it is no qcow2 image")
	}
	version, features, length := binary.BigEndian.Uint32(h[4:]), uint64(0), int64(72)
	switch {
	case version == 2:
	case version == 3 && n == headerSize:
		features = binary.BigEndian.Uint64(h[72:])
		length = int64(binary.BigEndian.Uint32(h[100:]))
	default:
		return below{}, fmt.Errorf("it is a qcow2 image of version %d, which is not known", version)
	}
	var b below
	if offset, size := binary.BigEndian.Uint64(h[8:]), binary.BigEndian.Uint32(h[16:]); offset != 0 {
		if size == 0 || size > maxName || offset > maxHeaderExtension<<5 {
			return below{}, errors.New("the name of its backing file is not where one can be")
		}
		name := make([]byte, size)
		if _, err := r.ReadAt(name, int64(offset)); err != nil {
			return below{}, fmt.Errorf("cannot read the name of its backing file: %w", err)
		}
		b.backing = string(name)
	}
	if b.backing == "" && features&featureData == 0 {
		return b, nil
	}
	if err := b.extensions(r, length); err != nil {
		return below{}, err
	}
	if features&featureData != 0 && b.data == "" {
		return below{}, errors.New("the name of its data file is missing")
	}
	if bytes.IndexByte([]byte(b.backing+b.data), 0) >= 0 {
		return below{}, errors.New("the name of its backing file holds a zero byte")
	}
	return b, nil
}

// extensions reads the header extensions, which begin at offset.
func (b *below) extensions(r io.ReaderAt, offset int64) error {
	for end := offset + maxHeaderExtension; offset < end; {
		var head [8]byte
		if _, err := r.ReadAt(head[:], offset); err != nil {
			return fmt.Errorf("cannot read its header extensions: %w", err)
		}
		kind, size := binary.BigEndian.Uint32(head[:]), int64(binary.BigEndian.Uint32(head[4:]))
		offset += int64(len(head))
		switch kind {
		case extensionEnd:
			return nil
		case extensionFormat, extensionData:
			if size > maxName {
				return errors.New("a name in its header extensions is too long")
			}
			text := make([]byte, size)
			if _, err := r.ReadAt(text, offset); err != nil {
				return fmt.Errorf("cannot read its header extensions: %w", err)
			}
			if kind == extensionFormat {
				b.format = string(text)
			} else {
				b.data = string(text)
			}
		}
		offset += (size + 7) &^ 7
	}
	return errors.New("its header extensions have no end")
}
