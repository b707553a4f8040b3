package validation

import (
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

func TestSlow(t *testing.T) {
	for name, c := range map[string]struct {
		waited, elapsed time.Duration
		slow            bool
	}{
		"nothing was read":      {0, 4 * time.Minute, false},
		"a little":              {time.Minute, 4 * time.Minute, false},
		"most of the time":      {3 * time.Minute, 4 * time.Minute, true},
		"all of a short time":   {2 * time.Second, 2 * time.Second, false},
		"all of a longer one":   {6 * time.Second, 6 * time.Second, true},
		"as in a busy database": {2 * time.Minute, 4 * time.Minute, false},
	} {
		s := transfer.Status{Disks: []transfer.DiskStatus{{Target: "vda"}, {Target: "vdb", Waited: c.waited.Microseconds()}}}
		if err := slow(s, c.elapsed); (err != nil) != c.slow {
			t.Errorf("%s: %v", name, err)
		}
	}
}
