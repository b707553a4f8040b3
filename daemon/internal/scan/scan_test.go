package scan

import (
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// TestSameContent holds manifests against one that was imported.
func TestSameContent(t *testing.T) {
	manifest := func(change func(*repository.Manifest)) *repository.Manifest {
		m := &repository.Manifest{Chain: "c", Parent: "p", Created: 1, Domain: repository.Domain{UUID: "u"},
			Disks: []repository.Disk{{Target: "vda", Size: 10, DigestRoot: "d", StoredBytes: 9}, {Target: "vdb", Size: 20, DigestRoot: "e"}}}
		change(m)
		return m
	}
	before := manifest(func(*repository.Manifest) {})
	for name, c := range map[string]struct {
		change func(*repository.Manifest)
		same   bool
	}{
		"compressed": {func(m *repository.Manifest) {
			m.Disks[0].StoredBytes, m.Generation, m.Offering.Compression = 3, 1, "zstd"
		}, true},
		"in another order": {func(m *repository.Manifest) { m.Disks[0], m.Disks[1] = m.Disks[1], m.Disks[0] }, true},
		"other data":       {func(m *repository.Manifest) { m.Disks[1].DigestRoot = "x" }, false},
		"resized":          {func(m *repository.Manifest) { m.Disks[0].Size++ }, false},
		"one disk less":    {func(m *repository.Manifest) { m.Disks = m.Disks[:1] }, false},
		"merged":           {func(m *repository.Manifest) { m.Parent = "" }, false},
		"another time":     {func(m *repository.Manifest) { m.Created++ }, false},
		"another domain":   {func(m *repository.Manifest) { m.Domain.UUID = "v" }, false},
		"encrypted":        {func(m *repository.Manifest) { m.Disks[0].Container = "qcow2" }, false},
	} {
		if got := sameContent(before, manifest(c.change)); got != c.same {
			t.Errorf("%s: %v", name, got)
		}
	}
}
