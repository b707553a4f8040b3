package transfer

import (
	"errors"
	"fmt"
	"io"
	"os"

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
		m, err := r.Manifest(domain, id)
		if err != nil {
			return nil, err
		}
		if m.Chain != "" && len(l) > 0 && m.Chain != l[0].Chain {
			return nil, fmt.Errorf("backup %s: %w: it belongs to another chain than %s", id, repository.ErrManifest, backup)
		}
		if err := r.Check(m); err != nil {
			return nil, err
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
	digests *digest.Reader
	zero    [digest.SumSize]byte // of a whole block of zeros
	// The parent's digests, if the disk is an increment and they are asked for.
	before     *digest.Reader
	beforeRoot string
	files      []*os.File
}

// openDisk opens a disk of the newest backup. What the images' headers say is
// compared with the manifests: no other file is ever opened because of them.
func openDisk(r *repository.Repository, l lineage, target string) (*storedDisk, error) {
	top, ok := l[0].Disk(target)
	if !ok {
		return nil, fail(ClassManifest, "backup %s has no disk %q", l[0].Backup, target)
	}
	s := &storedDisk{Disk: top, zero: digest.ZeroSum(digest.BlockSize)}
	if err := s.open(r, l); err != nil {
		s.close()
		return nil, inDisk(target, err)
	}
	return s, nil
}

func (s *storedDisk) open(r *repository.Repository, l lineage) error {
	// What is held of the tables is shared by the chain, however long it is.
	limits := qcow2.Limits{Size: s.Size, Tables: max(chainTables/int64(len(l)), leastTables)}
	for _, m := range l {
		d, ok := m.Disk(s.Target)
		if !ok || d.Size != s.Size {
			return fail(ClassManifest, "backup %s, which the disk stands on, has no such disk of %d bytes", m.Backup, s.Size)
		}
		image, err := s.openImage(r, m, d, limits)
		if err != nil {
			return err
		}
		s.images = append(s.images, image)
		if d.Kind == repository.KindFull {
			break
		}
	}
	var err error
	if s.chain, err = qcow2.NewChain(s.images...); err != nil {
		return classify(ClassVerification, err)
	}
	s.digests, err = s.openDigests(r, l[0])
	return err
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

func (s *storedDisk) openDigests(r *repository.Repository, m *repository.Manifest) (*digest.Reader, error) {
	f, err := r.OpenImage(m.Domain.UUID, m.Backup, repository.DigestName(s.Target))
	if err != nil {
		return nil, inRepository(err)
	}
	s.files = append(s.files, f)
	d, err := digest.NewReader(f, s.Size)
	return d, classify(ClassVerification, err)
}

// endDigests checks that the digests that were compared with are those that the
// manifest vouches for.
func endDigests(d *digest.Reader, want string) error {
	root, err := d.Close()
	if err != nil {
		return classify(ClassVerification, err)
	}
	if fmt.Sprintf("%x", root) != want {
		return fail(ClassVerification, "the digests of its blocks are not those that were written")
	}
	return nil
}

// openBefore opens the parent's digests, for walkOwn.
func (s *storedDisk) openBefore(r *repository.Repository, l lineage) error {
	if s.Kind != repository.KindIncremental {
		return nil
	}
	parent, _ := l[1].Disk(s.Target) // open has found it
	s.beforeRoot = parent.DigestRoot
	var err error
	s.before, err = s.openDigests(r, l[1])
	return asParent(err)
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
