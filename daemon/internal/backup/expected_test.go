package backup

import (
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

func TestExpect(t *testing.T) {
	disk := hypervisor.Disk{Target: "vda", Capacity: 1000, Allocation: 400}
	full := &catalog.Backup{Images: []catalog.Image{{Target: "vdb", Kind: chain.Full, StoredBytes: 9}, {Target: "vda", Kind: chain.Full, StoredBytes: 300}}}
	increment := &catalog.Backup{Images: []catalog.Image{{Target: "vda", Kind: chain.Incremental, StoredBytes: 20}}}
	huge := &catalog.Backup{Images: []catalog.Image{{Target: "vda", Kind: chain.Full, StoredBytes: 5000}}}
	for name, test := range map[string]struct {
		kind        chain.Kind
		compression string
		disk        hypervisor.Disk
		last        *catalog.Backup
		want        uint64
	}{
		"first":                        {chain.Full, "none", disk, nil, 400},
		"first, compressed":            {chain.Full, "zstd", disk, nil, 0},
		"first, allocation not known":  {chain.Full, "none", hypervisor.Disk{Target: "vda", Capacity: 1000}, nil, 0},
		"as the last full one":         {chain.Full, "zstd", disk, full, 300},
		"never more than is allocated": {chain.Full, "zstd", disk, huge, 400},
		"full after increments":        {chain.Full, "none", disk, increment, 400},
		"increment after a full one":   {chain.Incremental, "none", disk, full, 0},
		"as the last increment":        {chain.Incremental, "none", disk, increment, 20},
	} {
		if got := expect(test.kind, test.compression, test.disk, test.last); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}
