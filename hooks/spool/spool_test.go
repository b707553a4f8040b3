package spool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

func record(name string) Record {
	return Record{
		Version: Version, Time: 1, Boot: "b", Libvirt: "1@2", Domain: "d", Name: name, DomainID: 3,
		Operation: "release", SubOperation: "end", Extra: "-", XML: "<domain>ü\n</domain>",
		Disks: []fingerprint.Disk{{Target: "vda", Format: "raw", Layers: []fingerprint.Layer{
			{Path: "/a", Kind: fingerprint.KindFile, Device: 1, Inode: 1 << 63, Size: 4, Modified: 1 << 62, Changed: -1},
		}}},
	}
}

func write(t *testing.T, directory, name string) uint64 {
	t.Helper()
	n, err := Write(directory, record(name))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// written are the names of all records; "!" for one that cannot be read.
func written(t *testing.T, directory string) string {
	t.Helper()
	entries, err := Read(directory)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		name := e.Record.Name
		if e.Err != nil {
			name = "!"
		}
		all = append(all, name)
	}
	return strings.Join(all, ", ")
}

func TestRecordsComeBackInOrder(t *testing.T) {
	directory := t.TempDir() + "/var/hooks"
	if got := written(t, directory); got != "" {
		t.Errorf("a directory that is not there has %s", got)
	}
	a := write(t, directory, "a")
	if b := write(t, directory, "b"); b <= a {
		t.Errorf("numbers are %d, then %d", a, b)
	}
	write(t, directory, "c")
	if got := written(t, directory); got != "a, b, c" {
		t.Error(got)
	}
	entries, err := Read(directory)
	if diff := cmp.Diff(record("a"), entries[0].Record); diff != "" || err != nil {
		t.Error(diff, err)
	}
	info, err := os.Stat(directory)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Error(info.Mode(), err)
	}
	info, err = os.Stat(file(directory, a))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info.Mode(), err)
	}
	names, err := os.ReadDir(directory)
	if len(names) != 3 || err != nil {
		t.Error("something is left beside the records:", names, err)
	}
}

func TestNumbersAreNotUsedTwice(t *testing.T) {
	directory := t.TempDir()
	used := map[uint64]bool{}
	for range 100 {
		n := write(t, directory, "a")
		if used[n] {
			t.Errorf("%d is used again", n)
		}
		used[n] = true
		for range 2 { // the second time there is nothing to remove
			if err := Remove(directory, n); err != nil {
				t.Error(err)
			}
		}
	}
	if names, err := os.ReadDir(directory); len(names) != 0 || err != nil {
		t.Error("something is left:", names, err)
	}
	if err := Remove(directory+"/nothing", 1); err != nil {
		t.Error(err)
	}
}

// A clock that was set back does not change the order.
func TestRecordsOfTheFutureComeFirst(t *testing.T) {
	directory := t.TempDir()
	future := uint64(time.Now().Add(time.Hour).UnixMicro())
	if err := os.Rename(file(directory, write(t, directory, "a")), file(directory, future)); err != nil {
		t.Fatal(err)
	}
	if n := write(t, directory, "b"); n != future+1 {
		t.Errorf("the next number is %d after %d", n, future)
	}
	if got := written(t, directory); got != "a, b" {
		t.Error(got)
	}
}

// Writers and a daemon that takes what is there: each record is taken once,
// those of one writer in order.
func TestNothingIsLostOrOvertaken(t *testing.T) {
	directory := t.TempDir()
	const writers, each = 8, 25
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := range each {
				r := record(fmt.Sprint(w))
				r.DomainID = i
				if _, err := Write(directory, r); err != nil {
					t.Error(err)
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() { all.Wait(); close(ended) }()
	next, used, taken := map[string]int{}, map[uint64]bool{}, 0
	for over := false; ; {
		select {
		case <-ended:
			over = true
		default:
		}
		entries, err := Read(directory)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			r := e.Record
			if e.Err != nil || used[e.Number] || r.DomainID != next[r.Name] {
				t.Errorf("record %d: %d of writer %s, not %d; %v", e.Number, r.DomainID, r.Name, next[r.Name], e.Err)
			}
			used[e.Number], next[r.Name] = true, r.DomainID+1
			taken++
			if err := Remove(directory, e.Number); err != nil {
				t.Error(err)
			}
		}
		if over && len(entries) == 0 {
			break
		}
	}
	if taken != writers*each {
		t.Errorf("%d records of %d were taken", taken, writers*each)
	}
}

func TestWhatIsNoRecordIsReported(t *testing.T) {
	directory := t.TempDir()
	first := write(t, directory, "a")
	whole, err := os.ReadFile(file(directory, first))
	if err != nil {
		t.Fatal(err)
	}
	put := func(name string, text []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(directory, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("00000000000000000002.json", nil)
	put("00000000000000000003.json", whole[:len(whole)/2])
	put("00000000000000000004.json", bytes.Replace(whole, []byte(`"version":1`), []byte(`"version":2`), 1))
	if err := unix.Mkfifo(directory+"/00000000000000000005.json", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Base(file("", first)), directory+"/00000000000000000006.json"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(directory+"/00000000000000000007.json", 0o700); err != nil {
		t.Fatal(err)
	}
	// Not ours.
	put("8.json", whole)
	put("+0000000000000000009.json", whole)
	put("README", nil)
	if got := written(t, directory); got != "!, !, !, !, !, !, a" {
		t.Error(got)
	}
	for _, n := range []uint64{first, 2, 3, 4, 5, 6, 7} {
		if err := Remove(directory, n); err != nil {
			t.Error(err)
		}
	}
	if got := written(t, directory); got != "" {
		t.Error(got)
	}
}

func TestWhatDeadHooksLeftIsSwept(t *testing.T) {
	directory := t.TempDir()
	old, young := directory+"/"+temporaryPrefix+"1", directory+"/"+temporaryPrefix+"2"
	for _, path := range []string{old, young} {
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	then := time.Now().Add(-2 * temporaryAge)
	if err := os.Chtimes(old, then, then); err != nil {
		t.Fatal(err)
	}
	write(t, directory, "a")
	if got := written(t, directory); got != "a" {
		t.Error(got)
	}
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Error("the old one is there:", err)
	}
	if _, err := os.Stat(young); err != nil {
		t.Error("the young one, which may be being written, is gone:", err)
	}
}

func TestAFullDiskIsAnErrorAndLeavesNothing(t *testing.T) {
	directory := t.TempDir()
	if err := unix.Mount("spool", directory, "tmpfs", 0, "size=64k"); errors.Is(err, syscall.EPERM) {
		t.Skip("only root can make a small disk")
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(directory, 0); err != nil {
			t.Error(err)
		}
	})
	write(t, directory, "a")
	r := record("b")
	r.XML = strings.Repeat("x", 100_000)
	if n, err := Write(directory, r); !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), `domain "b"`) {
		t.Error(n, err)
	}
	names, err := os.ReadDir(directory)
	if len(names) != 1 || err != nil {
		t.Error(names, err)
	}
	write(t, directory, "c") // fits
	if got := written(t, directory); got != "a, c" {
		t.Error(got)
	}
}

func TestTheLargestRecordCanBeRead(t *testing.T) {
	directory := t.TempDir()
	r := record("a")
	r.XML = strings.Repeat("\x01", 16<<20) // six bytes each
	if _, err := Write(directory, r); err != nil {
		t.Fatal(err)
	}
	entries, err := Read(directory)
	if err != nil || entries[0].Err != nil || entries[0].Record.XML != r.XML {
		t.Error(err, entries[0].Err)
	}
}

// Whatever lies there as a record: it is read or reported, never left out, and
// it can be removed.
func FuzzRead(f *testing.F) {
	directory := f.TempDir()
	number, err := Write(directory, record("a"))
	if err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(file(directory, number))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Add(whole[:100])
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := os.WriteFile(file(directory, number), text, 0o600); err != nil {
			t.Fatal(err)
		}
		entries, err := Read(directory)
		if err != nil || len(entries) != 1 {
			t.Fatal(entries, err)
		}
		if e := entries[0]; (e.Err == nil) != (e.Record.Version == Version) {
			t.Errorf("%+v", e)
		}
		if err := Remove(directory, number); err != nil {
			t.Error(err)
		}
	})
}
