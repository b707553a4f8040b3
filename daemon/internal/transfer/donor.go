package transfer

import (
	"context"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/damage"
	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// DonorLive is the domain's disk, as it is now.
const DonorLive = "live"

// donor holds blocks that may be the same as damaged ones.
type donor interface {
	name() string
	// read returns false if its block is another one, or cannot be read.
	read(ctx context.Context, block int, p []byte, want [digest.SumSize]byte) bool
	close()
}

// storedDonor is the same disk in another backup: of it, or of what it builds
// on, the damaged image may be part; then what is read is not what is wanted.
type storedDonor struct {
	*storedDisk
	backup string
}

func (d storedDonor) name() string { return d.backup }

func (d storedDonor) read(_ context.Context, block int, p []byte, want [digest.SumSize]byte) bool {
	if sum, err := d.digests.Sum(block); err != nil || sum != want {
		return false
	}
	_, err := d.chain.ReadAt(p, int64(block)*digest.BlockSize)
	return err == nil && digest.Sum(p) == want
}

// liveDonor is an export of the domain's disk.
type liveDonor struct{ client *nbd.Client }

func (liveDonor) name() string { return DonorLive }

func (d liveDonor) read(ctx context.Context, block int, p []byte, want [digest.SumSize]byte) bool {
	at := uint64(block) * digest.BlockSize
	if at+uint64(len(p)) > d.client.Size() {
		return false
	}
	return d.client.ReadAt(ctx, p, at) == nil && digest.Sum(p) == want
}

func (d liveDonor) close() { d.client.Close() }

// mending says for damaged blocks of a disk, in ascending order, who holds the same.
type mending struct {
	blocks []int
	donors map[int]donor
	open   []donor
}

func (m *mending) close() {
	for _, d := range m.open {
		d.close()
	}
}

// whole tells whether there is a donor for each block.
func (m *mending) whole() bool { return len(m.donors) == len(m.blocks) }

// next returns where the first of the blocks begins in a range, or its end.
func (m *mending) next(off, end uint64) uint64 {
	if m == nil {
		return end
	}
	i, _ := slices.BinarySearch(m.blocks, int((off+digest.BlockSize-1)/digest.BlockSize))
	if i == len(m.blocks) {
		return end
	}
	return min(end, uint64(m.blocks[i])*digest.BlockSize)
}

// blocksOf returns the blocks of damaged parts of a disk.
func blocksOf(ranges damage.Ranges) (blocks []int) {
	for _, r := range ranges {
		for block := int(r.Offset / digest.BlockSize); block < digest.Blocks(r.End()); block++ {
			blocks = append(blocks, block)
		}
	}
	return blocks
}

// findDonors looks for the same blocks in all backups of the domain, the newest
// first, and then on the live disk. The caller closes what it returns.
func (w *worker) findDonors(ctx context.Context, r *repository.Repository, s *storedDisk, blocks []int, live *BackupDisk) (*mending, error) {
	m := &mending{blocks: blocks, donors: map[int]donor{}}
	ids, err := r.Backups(w.spec.Domain)
	if err != nil {
		return m, inRepository(err)
	}
	buffer := make([]byte, digest.BlockSize)
	try := func(d donor) error {
		used := false
		for _, block := range blocks {
			if m.donors[block] != nil {
				continue
			}
			if ctx.Err() != nil {
				d.close()
				return context.Cause(ctx)
			}
			if err := w.throttle.reads.wait(ctx, len(buffer)); err != nil {
				d.close()
				return err
			}
			want, err := s.digests.Sum(block)
			if err == nil && d.read(ctx, block, buffer[:digest.Length(s.Size, block)], want) {
				m.donors[block], used = d, true
			}
		}
		if used {
			m.open = append(m.open, d)
		} else {
			d.close()
		}
		return nil
	}
	for _, id := range slices.Backward(ids) {
		if m.whole() {
			return m, nil
		}
		if d, ok := openDonor(r, w.spec.Domain, id, s); ok {
			if err := try(d); err != nil {
				return m, err
			}
		}
	}
	if live == nil || m.whole() {
		return m, nil
	}
	client, err := nbd.Dial(ctx, live.Socket, nbd.Options{Export: live.Export})
	if err != nil {
		// That cannot be helped, and others may hold some of it.
		w.log.Warn("what the domain's disk holds is not used", "error", err)
		return m, ctx.Err()
	}
	return m, try(liveDonor{client})
}

// openDonor opens the same disk in a backup, if it can be read at all.
func openDonor(r *repository.Repository, domain, backup string, s *storedDisk) (donor, bool) {
	l, err := trace(r, domain, backup)
	if err != nil {
		return nil, false
	}
	if d, ok := l[0].Disk(s.Target); !ok || d.Size != s.Size {
		return nil, false
	}
	from, err := openDisk(r, l, s.Target)
	if err != nil {
		return nil, false
	}
	return storedDonor{from, backup}, true
}

// offer says of damaged parts in the result of verify where the same is held.
func (w *worker) offer(ctx context.Context, r *repository.Repository) error {
	for _, b := range w.result.Backups {
		if len(b.Damage) == 0 {
			continue
		}
		for _, d := range b.Manifest.Disks {
			if err := w.offerDisk(ctx, r, b, d.Target); err != nil {
				return inDisk(d.Target, err)
			}
		}
	}
	return nil
}

// mostOffered is how much of a disk may be damaged for verify to look who holds
// the same, in bytes. A repair looks for all.
const mostOffered = 1 << 30

func (w *worker) offerDisk(ctx context.Context, r *repository.Repository, b BackupState, target string) error {
	var flaws []*Flaw
	var ranges damage.Ranges
	for i := range b.Damage {
		if f := &b.Damage[i]; f.Target == target && f.File == "" && !f.Whole {
			flaws, ranges = append(flaws, f), ranges.Add(f.Range)
		}
	}
	if len(flaws) == 0 || ranges.Bytes() > mostOffered {
		return nil
	}
	l, err := trace(r, w.spec.Domain, b.Backup)
	if err != nil {
		return inRepository(err)
	}
	s, err := openDisk(r, l, target)
	if err != nil {
		return err
	}
	defer s.close()
	m, err := w.findDonors(ctx, r, s, blocksOf(ranges), nil)
	defer m.close()
	if err != nil {
		return err
	}
	for _, f := range flaws {
		blocks := blocksOf(damage.Ranges{f.Range})
		if !slices.ContainsFunc(blocks, func(block int) bool { return m.donors[block] == nil }) {
			f.Donor = m.donors[blocks[0]].name()
		}
	}
	return nil
}
