package transfer

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"lukechampine.com/blake3"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

const (
	chainTables = 32 << 20 // bytes of tables held for all images of a disk
	leastTables = 1 << 20  // of one image; its L1 table must fit in
)

// lineage is a backup and all that it stands on, newest first; every manifest
// is authentic and every file has its size.
type lineage []*repository.Manifest

// trace follows a backup to the full one at its bottom. Parents are always
// older, which the manifests are checked for, so this ends.
func trace(r *repository.Repository, domain, backup string) (lineage, error) {
	var l lineage
	for id := backup; id != ""; {
		m, err := r.Whole(domain, id)
		if err != nil {
			return nil, err
		}
		if m.Chain != "" && len(l) > 0 && m.Chain != l[0].Chain {
			return nil, fmt.Errorf("backup %s: %w: it belongs to another chain than %s", id, repository.ErrManifest, backup)
		}
		l = append(l, m)
		id = m.Parent
	}
	return l, nil
}

// storedDisk is a disk of a backup, opened with all images that it stands on.
type storedDisk struct {
	repository.Disk
	chain   *qcow2.Chain
	images  []*qcow2.Image
	digests *digest.Table
	zero    [digest.SumSize]byte // of a whole block of zeros
	files   []*os.File           // the top image first
	reads   *valve               // nil: reading back has no bound
	found   *finder              // nil: the first damage is an error
}

// openDisk opens a disk of the newest backup. What the images' headers say is
// compared with the manifests: no other file is ever opened because of them.
func openDisk(r *repository.Repository, l lineage, target string) (*storedDisk, error) {
	return openDiskWithin(r, l, target, chainTables)
}

// openDiskWithin is openDisk with a bound for the bytes of tables that are held.
func openDiskWithin(r *repository.Repository, l lineage, target string, tables int64) (*storedDisk, error) {
	top, ok := l[0].Disk(target)
	if !ok {
		return nil, fail(ClassManifest, "backup %s has no disk %q", l[0].Backup, target)
	}
	s := &storedDisk{Disk: top, zero: digest.ZeroSum(digest.BlockSize)}
	if err := s.open(r, l, tables); err != nil {
		s.close()
		return nil, inDisk(target, err)
	}
	return s, nil
}

func (s *storedDisk) open(r *repository.Repository, l lineage, tables int64) error {
	l, err := s.openImages(r, l, tables)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(l) {
		if err := s.openDigests(r, m); err != nil {
			return fmt.Errorf("backup %s: %w", m.Backup, err)
		}
	}
	return nil
}

// openImages opens the images of the disk, and returns what they are of.
func (s *storedDisk) openImages(r *repository.Repository, l lineage, tables int64) (lineage, error) {
	// What is held of the tables is shared by the chain, however long it is.
	limits := qcow2.Limits{Size: s.Size, Tables: max(tables/int64(len(l)), leastTables)}
	for n, m := range l {
		d, ok := m.Disk(s.Target)
		if !ok || d.Size != s.Size {
			return nil, fail(ClassManifest, "backup %s, which the disk stands on, has no such disk of %d bytes", m.Backup, s.Size)
		}
		image, err := s.openImage(r, m, d, limits)
		if err != nil {
			return nil, err
		}
		s.images = append(s.images, image)
		if d.Kind == repository.KindFull {
			l = l[:n+1]
			break
		}
	}
	var err error
	s.chain, err = qcow2.NewChain(s.images...)
	return l, classify(ClassVerification, err)
}

// openDigests opens the digests of a backup, which stand on those opened before.
func (s *storedDisk) openDigests(r *repository.Repository, m *repository.Manifest) error {
	f, err := r.OpenImage(m.Domain.UUID, m.Backup, repository.DigestName(s.Target))
	if err != nil {
		return inRepository(err)
	}
	s.files = append(s.files, f)
	d, _ := m.Disk(s.Target) // open has found it
	s.digests, err = openDigests(f, d, s.digests)
	return err
}

// openDigests opens the digests that the manifest vouches for.
func openDigests(f *os.File, d repository.Disk, parent *digest.Table) (*digest.Table, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, classify(ClassRepository, err)
	}
	root, err := hex.DecodeString(d.DigestRoot)
	if err != nil || len(root) != digest.SumSize {
		return nil, fail(ClassManifest, "%.100q is no root of digests", d.DigestRoot)
	}
	t, err := digest.Open(f, info.Size(), d.Size, [digest.SumSize]byte(root), parent)
	return t, classify(ClassVerification, err)
}

func (s *storedDisk) openImage(r *repository.Repository, m *repository.Manifest, d repository.Disk, limits qcow2.Limits) (*qcow2.Image, error) {
	f, err := r.OpenImage(m.Domain.UUID, m.Backup, d.File)
	if err != nil {
		return nil, inRepository(err)
	}
	s.files = append(s.files, f)
	image, err := checkImage(f, d, m.Backing(d), limits)
	if err != nil {
		return nil, fmt.Errorf("backup %s: %w", m.Backup, err)
	}
	return image, nil
}

// checkImage opens an image that must be exactly the one that is expected.
func checkImage(f *os.File, d repository.Disk, backing string, limits qcow2.Limits) (*qcow2.Image, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, classify(ClassRepository, err)
	}
	if uint64(info.Size()) != d.StoredBytes {
		return nil, fail(ClassVerification, "image %s has %d bytes instead of %d", d.File, info.Size(), d.StoredBytes)
	}
	image, err := qcow2.Open(f, info.Size(), limits)
	if err != nil {
		return nil, fail(ClassVerification, "image %s: %w", d.File, err)
	}
	h := image.Header()
	switch {
	case h.Size != d.Size:
		err = fmt.Errorf("it is a disk of %d bytes instead of %d", h.Size, d.Size)
	case h.Backing != backing:
		err = fmt.Errorf("its backing file is %.100q instead of %q", h.Backing, backing)
	case h.ClusterSize != clusterSize:
		err = fmt.Errorf("its clusters have %d bytes instead of %d", h.ClusterSize, clusterSize)
	}
	if err != nil {
		return nil, fail(ClassVerification, "image %s: %w", d.File, err)
	}
	return image, nil
}

func (s *storedDisk) close() {
	for _, f := range s.files {
		f.Close()
	}
}

// sumFile returns the BLAKE3 of what can be read from a file, and its length.
func sumFile(r io.Reader) (sum string, size uint64, err error) {
	h := blake3.New(digest.SumSize, nil)
	n, err := io.CopyBuffer(struct{ io.Writer }{h}, r, make([]byte, 1<<20))
	return fmt.Sprintf("%x", h.Sum(nil)), uint64(n), err
}

// checkFile compares another file of a backup with its manifest.
func checkFile(r io.Reader, f repository.File) error {
	sum, size, err := sumFile(r)
	if err != nil {
		return classify(ClassRepository, err)
	}
	if sum != f.BLAKE3 || size != f.Size {
		return fail(ClassVerification, "%s is not what was written", f.Name)
	}
	return nil
}

var errBlock = errors.New("the data is not what was written")
