package backup

import (
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/dbus"
)

// expected is how much the images will take in the repository, as far as that
// can be told. It is too little rather than too much: a backup that would have
// fitted must not be refused.
func (p Plan) expected() (bytes uint64) {
	for _, k := range p.Disks {
		bytes += k.Expected
	}
	return bytes
}

// expect returns how much one image will take: as much as the last one of its
// kind, or what is allocated if all of it is stored as it is.
func expect(kind chain.Kind, compression string, of hypervisor.Disk, last *catalog.Backup) uint64 {
	all := of.Capacity
	if of.Allocation > 0 {
		all = min(all, of.Allocation)
	}
	if last != nil {
		for _, i := range last.Images {
			if i.Target == of.Target && i.Kind == kind {
				stored := i.StoredBytes
				if compression == string(dbus.CompressionNone) {
					stored = max(stored, i.DataBytes) // it was compressed meanwhile
				}
				return min(stored, all)
			}
		}
	}
	if kind == chain.Full && compression == string(dbus.CompressionNone) && of.Allocation > 0 {
		return all
	}
	return 0
}
