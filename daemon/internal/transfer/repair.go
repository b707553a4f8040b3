package transfer

import (
	"context"
	"fmt"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/damage"
	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// RepairSpec has the damaged images of a backup of Spec.Domain written anew, with
// what other backups, or the domain's disks as they are now, hold of the same.
// A disk of which not all can be had stays as it is. Done again, it changes nothing.
type RepairSpec struct {
	Backup string       `json:"backup"`
	DryRun bool         `json:"dry_run,omitempty"` // only say what could be repaired
	Live   []BackupDisk `json:"live,omitempty"`    // exports of the domain's disks
}

// repair writes images anew as a merge does: beside the old ones, read back and
// compared with the digests, which stay the same, and exchanged all at once.
func (w *worker) repair(ctx context.Context) error {
	s := w.spec.Repair
	if s == nil {
		return fail(ClassInternal, "the specification says nothing about the repair")
	}
	m := &merging{
		backup:    &backup{worker: w, BackupSpec: &BackupSpec{}},
		MergeSpec: &MergeSpec{Into: s.Backup}, mend: s,
	}
	// What must stay free is for backups.
	w.spec.Repository.MinimumFree = 0
	return m.run(ctx, func(now *repository.Manifest) error {
		m.Base = now.Parent
		return nil
	})
}

// look finds what is damaged of a disk's image, and who holds the same. It
// returns false if there is nothing to be done, or nothing can be.
func (m *merging) look(ctx context.Context, d *mergedDisk) (bool, error) {
	d.from.found = &finder{}
	defer func() { d.from.found = nil }()
	problem := d.from.checkStructure(ctx)
	if problem != nil && !isDamage(ctx, problem) {
		return false, problem
	}
	d.count.total.Store(d.from.DataBytes)
	if err := d.from.verifyContent(ctx, d.count); err != nil {
		if ctx.Err() != nil || !isDamage(ctx, err) {
			return false, err
		}
		// Where its data is cannot be told: what is not as in the parent is had from others.
		d.blind, problem, d.from.found.ranges = true, err, nil
		if err := d.from.inherit(0, d.from.Size); err != nil {
			return false, err
		}
	}
	ranges := d.from.found.ranges
	if len(ranges) == 0 && problem == nil {
		return false, nil
	}
	var live *BackupDisk
	if i := slices.IndexFunc(m.mend.Live, func(l BackupDisk) bool { return l.Target == d.spec.Target }); i >= 0 {
		live = &m.mend.Live[i]
	}
	var err error
	if d.mend, err = m.findDonors(ctx, m.repo, d.from, blocksOf(ranges), live); err != nil {
		return false, err
	}
	if len(ranges) == 0 { // only its structure
		m.result.Repaired = append(m.result.Repaired, Flaw{Target: d.spec.Target, Range: damage.Range{Length: d.from.Size}, Whole: true})
		return true, nil
	}
	if !d.mend.whole() {
		m.lost(d)
		return false, nil
	}
	for _, r := range ranges {
		m.result.Repaired = append(m.result.Repaired, Flaw{Target: d.spec.Target, Range: r, Donor: d.mend.donors[int(r.Offset/digest.BlockSize)].name()})
	}
	return true, nil
}

// lost says what nobody else holds.
func (m *merging) lost(d *mergedDisk) {
	var ranges damage.Ranges
	for _, block := range d.mend.blocks {
		if d.mend.donors[block] == nil {
			ranges = ranges.Add(damage.Range{Offset: uint64(block) * digest.BlockSize, Length: uint64(digest.Length(d.from.Size, block))})
		}
	}
	for _, r := range ranges {
		m.result.Lost = append(m.result.Lost, Flaw{Target: d.spec.Target, Range: r})
	}
}

// around emits what is in a range: damaged blocks from who holds the same, and
// by whole what is between them.
func (d *mergedDisk) around(off, end uint64, emit func(*merged) error, whole func(off, end uint64) error) error {
	for off < end {
		next := d.mend.next(off, end)
		if next > off {
			if err := whole(off, next); err != nil {
				return err
			}
		}
		if next < end {
			if err := d.emitMended(next, emit); err != nil {
				return err
			}
			next = min(end, next+digest.BlockSize)
		}
		off = next
	}
	return nil
}

func (d *mergedDisk) emitMended(off uint64, emit func(*merged) error) error {
	block := int(off / digest.BlockSize)
	n := uint64(digest.Length(d.from.Size, block))
	piece := &stored{span: span{off, n, spanData}}
	if err := d.from.expect(piece); err != nil {
		return err
	}
	piece.data = d.writer.GetBuffer()[:n]
	return emit(&merged{stored: piece, donor: d.mend.donors[block]})
}

// readMended has a damaged block from who holds the same, in the form that the
// image has its others in.
func (d *mergedDisk) readMended(ctx context.Context, piece *merged) error {
	block := int(piece.off / digest.BlockSize)
	d.reading.Lock() // the donor's digests are for one at a time
	defer d.reading.Unlock()
	if !piece.donor.read(ctx, block, piece.data, piece.sums[0]) {
		return fail(ClassVerification, "%s does not hold any more what is at %d: repair it again", piece.donor.name(), piece.off)
	}
	d.count.done.Add(piece.length)
	piece.forms = []qcow2.Form{{Plain: d.plainly}}
	return nil
}

// unrepaired is the error of a repair that left something as it is.
func (m *merging) unrepaired() error {
	if len(m.result.Lost) == 0 {
		return nil
	}
	first := m.result.Lost[0]
	text := fmt.Sprintf("disk %s: %d bytes at %d", first.Target, first.Length, first.Offset)
	if n := len(m.result.Lost) - 1; n > 0 {
		text += fmt.Sprintf(" and %d more places", n)
	}
	return fail(ClassVerification, "nobody holds the same as what is damaged: %s", text)
}
