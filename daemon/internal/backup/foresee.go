package backup

import (
	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// Foresee says what the next backup of a domain would be, as far as that is
// known without asking the domain or looking at its disks: bitmaps that should
// be there are taken for good. last is nil if the domain has no chain in the
// repository, and marks are all of the domain. Disks that a backup leaves out
// are not in the verdict.
func Foresee(r Request, d hypervisor.Domain, last *catalog.Head, marks []catalog.Mark) (chain.Verdict, error) {
	boot, err := spool.BootID()
	if err != nil {
		return chain.Verdict{}, err
	}
	f := facts{request: r, backup: ulid.Make().String(), domain: d, repository: catalog.Repository{ID: r.Repository}, last: last, boot: boot, marks: marks}
	var disks []hypervisor.Disk
	for _, k := range d.Disks {
		if Skip(k, r.Settings, d.Active) == "" {
			disks = append(disks, k)
		}
	}
	f.foreseen()
	var tip catalog.Backup
	if last != nil && last.Tip != nil {
		tip = *last.Tip
	}
	f.bitmaps = map[string]bool{}
	for _, i := range tip.Images {
		f.bitmaps[i.Target] = i.Tracking == chain.CBT
	}
	return chain.Decide(f.options(), f.now(disks), f.before()), nil
}
