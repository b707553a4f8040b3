package supervise

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/share"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// TestWorkersShare has the rates divided among the workers that their
// directories tell of, and space promised.
func TestWorkersShare(t *testing.T) {
	rates := share.Rates{Repository: 10, Host: 15}
	s := New(nil, Options{Directory: t.TempDir(), Rates: func() share.Rates { return rates }})
	job := func(id, repository string, o transfer.Operation, expected uint64) *Worker {
		w, err := s.worker(id)
		if err != nil {
			t.Fatal(err)
		}
		spec := transfer.Spec{Job: id, Operation: o, Repository: transfer.RepositorySpec{Path: repository}}
		if o == transfer.OperationBackup {
			spec.Backup = &transfer.BackupSpec{Expected: expected}
		}
		if _, err := w.prepare(spec); err != nil {
			t.Fatal(err)
		}
		return w
	}
	expect := func(what string, want map[*Worker]uint64) {
		t.Helper()
		for w, bytes := range want {
			if got, err := transfer.ReadRate(w.directory); err != nil || got.Bytes != bytes {
				t.Errorf("%s: worker %s may move %d per second, want %d (%v)", what, w.id, got.Bytes, bytes, err)
			}
		}
	}
	a := job("01J00000000000000000000001", "/srv/nas", transfer.OperationBackup, 100)
	expect("one", map[*Worker]uint64{a: 10})
	status := []byte(`{"phase":"copying","disks":[{"target":"vda","written":30},{"target":"vdb","written":20}]}`)
	if err := os.WriteFile(filepath.Join(a.directory, transfer.StatusFile), status, 0o600); err != nil {
		t.Fatal(err)
	}
	b := job("01J00000000000000000000002", "/srv/nas", transfer.OperationBackup, 7)
	c := job("01J00000000000000000000003", "/srv/tape", transfer.OperationMerge, 0)
	d := job("01J00000000000000000000004", "/srv/tape", transfer.OperationRestore, 0)
	expect("three, and one that has no bounds", map[*Worker]uint64{a: 5, b: 5, c: 5, d: 0})
	if spec, err := transfer.ReadSpec(b.directory); err != nil || spec.Repository.Promised != 50 {
		t.Errorf("%d bytes were promised before, want 50 (%v)", spec.Repository.Promised, err)
	}
	if err := os.WriteFile(filepath.Join(a.directory, transfer.ResultFile), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	rates.Host = 12
	if err := s.Share(); err != nil {
		t.Fatal(err)
	}
	expect("one has ended, the host may do less", map[*Worker]uint64{b: 6, c: 6})
	rates = share.Rates{}
	if err := s.Share(); err != nil {
		t.Fatal(err)
	}
	expect("no bounds any more", map[*Worker]uint64{b: 0, c: 0})
}
