package transfer

import (
	"context"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// compress writes those images of a backup anew in which data lies plain, as a
// merge does: beside the old ones, read back and compared with the digests of
// what the disks hold, and exchanged all at once. If that makes the backup no
// smaller, it stays as it is.
func (w *worker) compress(ctx context.Context) error {
	s := w.spec.Compress
	if s == nil || qcow2.Compression(s.Compression) != qcow2.CompressionZlib && qcow2.Compression(s.Compression) != qcow2.CompressionZstd {
		return fail(ClassInternal, "the specification does not say how to compress")
	}
	m := &merging{
		backup:    &backup{worker: w, BackupSpec: &BackupSpec{Compression: s.Compression, Level: s.Level, Threads: s.Threads}},
		MergeSpec: &MergeSpec{Into: s.Backup}, pack: true,
	}
	return m.run(ctx, func(now *repository.Manifest) error {
		if now.Rewriter == w.spec.Job {
			return errDone
		}
		m.Base = now.Parent
		return m.compressible(s.Free)
	})
}

// compressible fails if what must be free to compress the backup is not there.
func (m *merging) compressible(need uint64) error {
	free, _, err := m.repo.Space()
	if err != nil {
		return inRepository(err)
	}
	r := m.spec.Repository
	if free < r.MinimumFree+r.Promised+need {
		return fail(ClassFull, "the repository %q has %d MiB free: to compress the backup %d MiB must be (compression.minimum_free), backups that are being made take %d MiB more, and %d MiB must stay free",
			r.Name, free>>20, need>>20, r.Promised>>20, r.MinimumFree>>20)
	}
	return nil
}

// plain is how much data lies uncompressed in the disk's own image, in bytes.
func (d *mergedDisk) plain() (bytes uint64, err error) {
	for off := uint64(0); off < d.before.Size && err == nil; off += windowSize {
		err = d.from.chain.Held(1, off, min(windowSize, d.before.Size-off), func(r qcow2.Run) error {
			if r.Plain {
				bytes += r.Length
			}
			return nil
		})
	}
	return bytes, classify(ClassVerification, err)
}

// smaller tells whether the new images take less than the old ones, and has the
// manifest say how they are compressed.
func (m *merging) smaller() bool {
	var before, now uint64
	for _, d := range m.disks {
		before += d.before.StoredBytes
		now += d.entry.StoredBytes
	}
	m.Manifest.Offering.Compression, m.Manifest.Offering.Level = m.Compression, m.Level
	return now < before
}
