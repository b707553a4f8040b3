package errand

import (
	"encoding/json"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// Rewritten is what the catalog is to know of a backup whose images a worker
// wrote anew, by its manifest.
func Rewritten(m *repository.Manifest) (catalog.Compressed, error) {
	raw, err := json.Marshal(m)
	if err != nil {
		return catalog.Compressed{}, err
	}
	done := catalog.Compressed{Backup: m.Backup, Manifest: raw}
	for _, d := range m.Disks {
		done.Images = append(done.Images, catalog.MergedImage{
			Target: d.Target, Kind: chain.Kind(d.Kind), Changes: chain.Tracking(d.Changes), StoredBytes: d.StoredBytes, DataBytes: d.DataBytes,
		})
	}
	return done, nil
}
