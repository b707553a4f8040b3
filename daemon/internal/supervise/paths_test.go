package supervise

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// A worker sees what its job needs, and nothing else.
func TestPaths(t *testing.T) {
	repository := transfer.RepositorySpec{Path: "/srv/backup/", KeyFile: "/var/lib/virtbackup/manifest.key"}
	for name, test := range map[string]struct {
		spec                         transfer.Spec
		readOnly, readWrite, devices []string
	}{
		"init": {
			spec:      transfer.Spec{Operation: transfer.OperationInit, Repository: transfer.RepositorySpec{Path: "/srv/backup"}},
			readWrite: []string{"/srv/backup"},
		},
		"backup": {
			spec: transfer.Spec{Operation: transfer.OperationBackup, Repository: repository, Backup: &transfer.BackupSpec{
				Disks: []transfer.BackupDisk{{Socket: "/run/virtbackup/nbd/a.sock"}, {Socket: "/run/virtbackup/nbd/b.sock"}},
				Files: []transfer.FileSpec{{Name: "domain.xml", Content: []byte("x")}, {Name: "nvram", Path: "/var/lib/libvirt/qemu/nvram/a.fd"}},
			}},
			readOnly:  []string{"/run/virtbackup/nbd", "/var/lib/libvirt/qemu/nvram", "/var/lib/virtbackup/manifest.key"},
			readWrite: []string{"/srv/backup"},
		},
		"repair": {
			spec: transfer.Spec{Operation: transfer.OperationRepair, Repository: repository, Repair: &transfer.RepairSpec{
				Live: []transfer.BackupDisk{{Socket: "/run/virtbackup/exports/job/nbd.sock"}},
			}},
			readOnly:  []string{"/run/virtbackup/exports/job", "/var/lib/virtbackup/manifest.key"},
			readWrite: []string{"/srv/backup"},
		},
		"restore": {
			spec: transfer.Spec{Operation: transfer.OperationRestore, Repository: repository, Restore: &transfer.RestoreSpec{
				Disks: []transfer.RestoreDisk{{Directory: "/images", Destination: "a.qcow2"}, {Directory: "/images", Destination: "b.qcow2"},
					{Device: true, Destination: "/dev/vg/lv"}},
				Files: []transfer.RestoreFile{{Directory: "/nvram", Destination: "a.fd"}},
			}},
			readOnly:  []string{"/srv/backup", "/var/lib/virtbackup/manifest.key"},
			readWrite: []string{"/images", "/nvram"},
			devices:   []string{"/dev/vg/lv"},
		},
		"serve": {
			spec: transfer.Spec{Operation: transfer.OperationServe, Repository: repository, Serve: &transfer.ServeSpec{
				Disks: []transfer.ServeDisk{{Socket: "/run/virtbackup/serve/vda"}, {Socket: "/run/virtbackup/serve/vdb"}},
				Files: []transfer.RestoreFile{{Directory: "/scratch/job", Destination: "nvram"}},
			}},
			readOnly:  []string{"/srv/backup", "/var/lib/virtbackup/manifest.key"},
			readWrite: []string{"/run/virtbackup/serve", "/scratch/job"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			readOnly, readWrite, devices := paths(test.spec)
			if d := cmp.Diff([][]string{test.readOnly, test.readWrite, test.devices}, [][]string{readOnly, readWrite, devices}); d != "" {
				t.Error(d)
			}
		})
	}
}
