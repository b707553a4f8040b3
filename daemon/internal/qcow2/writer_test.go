package qcow2_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

// sparse leaves the big writes out, which are data: only tables matter here.
type sparse struct{ *os.File }

func (s sparse) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == qcow2.BufferSize {
		return len(p), nil
	}
	return s.File.WriteAt(p, off)
}

// A file of more than 4 GiB has refcount blocks in its middle.
func TestBigFile(t *testing.T) {
	const size = 9 << 29
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w, err := qcow2.NewWriter(sparse{f}, qcow2.WriterOptions{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	ones := bytes.Repeat([]byte{1}, qcow2.BufferSize)
	for off := uint64(0); off < size; off += qcow2.BufferSize {
		b := w.GetBuffer()
		copy(b, ones)
		if err := w.WriteData(off, b); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "check", "-q", path)
	i, err := openFile(t, path, qcow2.Limits{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// full fails like a full disk after so many bytes.
type full struct{ left int }

func (f *full) WriteAt(p []byte, _ int64) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, syscall.ENOSPC
	}
	return len(p), nil
}

func TestFullDisk(t *testing.T) {
	for _, compression := range []qcow2.Compression{"none", "zstd"} {
		w, err := qcow2.NewWriter(&full{left: 5 << 20}, qcow2.WriterOptions{Size: 1 << 30, Compression: compression})
		if err != nil {
			t.Fatal(err)
		}
		for off := uint64(0); off < 1<<30 && err == nil; off += qcow2.BufferSize {
			b := w.GetBuffer()
			noise(b, off>>20)
			err = w.WriteData(off, b)
		}
		if finish := w.Finish(); !errors.Is(err, syscall.ENOSPC) || !errors.Is(finish, syscall.ENOSPC) {
			t.Errorf("%s: errors are %v and %v", compression, err, finish)
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	w, err := qcow2.NewWriter(&full{left: 1 << 30}, qcow2.WriterOptions{Size: 1<<20 + 512})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Abort()
	if err := w.WriteZero(64<<10, 64<<10); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string][2]uint64{
		"before the last":    {0, 64 << 10},
		"not at a cluster":   {128<<10 + 512, 64 << 10},
		"not whole clusters": {128 << 10, 512},
		"behind the end":     {1 << 20, 1024},
	} {
		if w.WriteZero(c[0], c[1]) == nil || w.WriteData(c[0], make([]byte, c[1])) == nil {
			t.Errorf("%s: %v is written", name, c)
		}
	}
	if err := w.WriteData(1<<20, make([]byte, 512)); err != nil {
		t.Errorf("the end of the disk: %v", err)
	}
}
