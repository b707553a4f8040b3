package qcow2

import (
	"fmt"
	"io"
)

// Form is how a cluster is stored in an image. The zero Form is none that another
// image can have as it is.
type Form struct {
	Plain  bool
	Packed []byte // compressed
}

// ReadForms reads as ReadAt does, from a cluster's beginning on, and returns for
// each cluster the form that it has in its image, so that WriteForms can put it
// into another image whose compression is this one.
func (c *Chain) ReadForms(p []byte, off uint64, compression Compression) ([]Form, error) {
	if off%clusterSize != 0 || off > c.size || uint64(len(p)) > c.size-off {
		return nil, fmt.Errorf("cannot read %d bytes at %d, of a disk of %d, as they are stored", len(p), off, c.size)
	}
	forms := make([]Form, (len(p)+clusterSize-1)/clusterSize)
	err := c.walk(off, uint64(len(p)), func(at uint64, m mapping, image *Image) error {
		target, first := p[at-off:][:m.length], (at-off)/clusterSize
		same := image != nil && image.raw.clusterSize == clusterSize
		switch m.state {
		case zero:
			clear(target)
			return nil
		case plain:
			for i := uint64(0); same && i*clusterSize < m.length; i++ {
				forms[first+i].Plain = true
			}
		case compressed:
			packed, err := image.readPacked(target, m)
			if same && image.Header().Compression == compression {
				forms[first].Packed = packed
			}
			return wrapRead(m, at, err)
		}
		return wrapRead(m, at, image.read(target, m))
	})
	return forms, err
}

func wrapRead(m mapping, at uint64, err error) error {
	if err != nil {
		return fmt.Errorf("cannot read %d bytes at %d from the image: %w", m.length, at, err)
	}
	return nil
}

// readPacked is read for a compressed cluster. It also returns what it is packed
// in, without what follows in the file; nil if its end cannot be told.
func (i *Image) readPacked(p []byte, m mapping) ([]byte, error) {
	packed := make([]byte, m.packed)
	if err := readFull(i.r, packed, m.host); err != nil {
		return nil, err
	}
	whole := p
	if int64(len(p)) != i.raw.clusterSize {
		whole = make([]byte, i.raw.clusterSize)
	}
	n, err := i.unpack.decompress(whole, packed)
	if err != nil {
		return nil, fmt.Errorf("cannot decompress the cluster at host offset %d: %w", m.host, noEOF(err))
	}
	copy(p, whole[m.inside:])
	if n <= 0 || n >= clusterSize-sectorSize {
		return nil, nil
	}
	return packed[:n], nil
}

// atEnd tells whether a stream ends where it was read to.
func atEnd(r io.Reader) bool {
	n, err := r.Read(make([]byte, 1))
	return n == 0 && err == io.EOF
}

// WriteForms is WriteData, but clusters that have a form are stored in it: they
// are not compressed anew. p is what they hold.
func (w *Writer) WriteForms(off uint64, p []byte, forms []Form) error {
	return w.write(off, p, forms)
}
