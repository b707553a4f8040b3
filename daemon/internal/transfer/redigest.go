package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// redigest makes the digests of a disk anew, if they are damaged, from what its
// images hold. That this is what was written the root tells, which the manifest
// knows. It returns false if they are well.
func (m *merging) redigest(ctx context.Context, entry *repository.Disk) (damaged bool, err error) {
	name := repository.DigestName(entry.Target)
	i := slices.IndexFunc(m.Manifest.Files, func(f repository.File) bool { return f.Name == name })
	if i < 0 {
		return false, fail(ClassManifest, "the manifest does not know the digests of disk %s", entry.Target)
	}
	if err := m.verifyFile(m.repo, &m.Manifest, m.Manifest.Files[i]); err == nil || !isDamage(ctx, err) {
		return false, err
	}
	flaw := Flaw{Target: entry.Target, File: name, Whole: true}
	flaw.Length = entry.Size
	to, file := io.Writer(io.Discard), (*os.File)(nil)
	if !m.mend.DryRun {
		if file, err = m.rewrite.Create(name); err != nil {
			return true, inRepository(err)
		}
		defer file.Close()
		to = file
	}
	root, err := m.rootOf(ctx, entry, to)
	if err != nil && !isDamage(ctx, err) {
		return true, err
	}
	if err != nil || root != entry.DigestRoot {
		m.result.Lost = append(m.result.Lost, flaw)
		return true, inRepository(m.rewrite.Remove(name))
	}
	m.result.Repaired = append(m.result.Repaired, flaw)
	if m.mend.DryRun {
		return true, nil
	}
	m.renewed++
	f := &m.Manifest.Files[i]
	f.BLAKE3, f.Size, err = sumFile(io.NewSectionReader(file, 0, 1<<62))
	return true, classify(ClassRepository, errors.Join(err, file.Sync()))
}

// rootOf writes the digests of a disk as its images hold it.
func (m *merging) rootOf(ctx context.Context, entry *repository.Disk, to io.Writer) (string, error) {
	s := &storedDisk{Disk: *entry}
	defer s.close()
	if _, err := s.openImages(m.repo, m.lineage, chainTables); err != nil {
		return "", err
	}
	var before *digest.Table
	if entry.Kind == repository.KindIncremental {
		parent, err := openDisk(m.repo, m.base, entry.Target)
		if err != nil {
			return "", err
		}
		defer parent.close()
		before = parent.digests
	}
	table, err := digest.NewWriter(to, entry.Size, before)
	if err != nil {
		return "", classify(ClassRepository, err)
	}
	if err := m.redigestAll(ctx, s, table, before != nil); err != nil {
		return "", err
	}
	root, err := table.Close()
	return fmt.Sprintf("%x", root), classify(ClassRepository, err)
}

func (m *merging) redigestAll(ctx context.Context, s *storedDisk, table *digest.Writer, hasParent bool) error {
	buffer := make([]byte, qcow2.BufferSize)
	at := uint64(0)
	gap := func(to uint64) error {
		blocks := digest.Blocks(to) - digest.Blocks(at)
		at = to
		if hasParent {
			return table.AppendParent(blocks)
		}
		return table.AppendZero(blocks)
	}
	for off := uint64(0); off < s.Size; off += windowSize {
		err := s.images[0].Own(off, min(windowSize, s.Size-off), func(off, length uint64, kind qcow2.Kind) error {
			if err := gap(off); err != nil {
				return err
			}
			if kind == qcow2.Zero {
				at = off + length
				return table.AppendZero(digest.Blocks(off+length) - digest.Blocks(off))
			}
			for ; at < off+length; at += uint64(len(buffer)) {
				p := buffer[:min(uint64(len(buffer)), off+length-at)]
				if err := m.throttle.reads.wait(ctx, len(p)); err != nil {
					return err
				}
				if _, err := s.chain.ReadAt(p, int64(at)); err != nil {
					return err
				}
				for _, sum := range sums(p) {
					if err := table.Append(sum); err != nil {
						return err
					}
				}
			}
			at = off + length
			return ctx.Err()
		})
		if err != nil {
			return classify(ClassVerification, err)
		}
	}
	return classify(ClassVerification, gap(s.Size))
}
