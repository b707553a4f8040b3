package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
)

const cluster = 64 << 10

// run is for both testing.T and rapid.T.
func run(t interface {
	Helper()
	Fatalf(string, ...any)
}, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sequential refuses writes that do not follow one another, but for the header.
type sequential struct {
	*os.File
	next   int64
	header bool
}

func (s *sequential) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case s.header:
		return 0, errors.New("write behind the header's")
	case off == 0:
		s.header = true
	case off != s.next && s.next != 0:
		return 0, fmt.Errorf("write at %d where %d is next", off, s.next)
	}
	s.next = off + int64(len(p))
	return s.File.WriteAt(p, off)
}

// text fills p with what compresses to less than a half, and differs by seed.
func text(p []byte, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 1))
	for i := range p {
		p[i] = "etaoin s"[random.IntN(8)]
	}
}

func noise(p []byte, seed uint64) {
	c := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = c.Read(p)
}

// change makes a random image out of a model of the disk, and changes the
// model with it.
type change struct {
	t     *rapid.T
	model []byte
}

// step writes or skips some clusters from off on, and returns where it ended.
func (c *change) step(w *qcow2.Writer, off uint64) uint64 {
	size := uint64(len(c.model))
	end := min(size, off+cluster*uint64(rapid.IntRange(1, 20).Draw(c.t, "clusters")))
	part := c.model[off:end]
	seed := uint64(rapid.IntRange(0, 1<<16-1).Draw(c.t, "seed"))
	switch rapid.SampledFrom([]string{"skip", "zero", "text", "noise", "mixed"}).Draw(c.t, "what") {
	case "skip":
		return end
	case "zero":
		clear(part)
		if err := w.WriteZero(off, end-off); err != nil {
			c.t.Fatal(err)
		}
		return end
	case "text":
		text(part, seed)
	case "noise":
		noise(part, seed)
	case "mixed":
		noise(part, seed)
		for at := 0; at < len(part); at += cluster {
			p := part[at:min(at+cluster, len(part))]
			switch (seed + uint64(at/cluster)) % 3 {
			case 0:
				clear(p)
			case 1:
				text(p, seed)
			}
		}
	}
	for len(part) > 0 {
		b := w.GetBuffer()
		n := copy(b, part)
		if err := w.WriteData(off, b[:n]); err != nil {
			c.t.Fatal(err)
		}
		part, off = part[n:], off+uint64(n)
	}
	return end
}

// write writes an image with random changes.
func (c *change) write(path, backing string, compression qcow2.Compression) {
	f, err := os.Create(path)
	if err != nil {
		c.t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w, err := qcow2.NewWriter(&sequential{File: f}, qcow2.WriterOptions{
		Size: uint64(len(c.model)), Backing: backing, Compression: compression, Threads: 3,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	defer w.Abort()
	for off := uint64(0); off < uint64(len(c.model)); {
		off = c.step(w, off)
	}
	if err := w.Finish(); err != nil {
		c.t.Fatal(err)
	}
}

// A chain of our images is what the model says, to our reader and to QEMU; and
// QEMU finds no fault with it.
func TestChainsEqualTheModel(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.SampledFrom([]int{512, cluster, cluster + 512, 3<<20 + 512, 10 << 20, 10<<20 - 1}).Draw(t, "size")
		c := change{t: t, model: make([]byte, size)}
		var images []*qcow2.Image
		var backing, path string
		for n := range rapid.IntRange(1, 4).Draw(t, "images") {
			compression := rapid.SampledFrom([]qcow2.Compression{"none", "zlib", "zstd"}).Draw(t, "compression")
			name := fmt.Sprintf("%d.qcow2", n)
			path = filepath.Join(dir, name)
			c.write(path, backing, compression)
			run(t, "qemu-img", "check", "-q", path)
			i := open(t, path)
			if err := i.Check(t.Context()); err != nil {
				t.Error(err)
			}
			if h := i.Header(); h.Backing != backing || h.Size != uint64(size) || backing != "" && h.BackingFormat != "qcow2" {
				t.Errorf("header is %+v", h)
			}
			images = append([]*qcow2.Image{i}, images...)
			backing = name
		}
		raw := filepath.Join(dir, "model")
		if err := os.WriteFile(raw, c.model, 0o600); err != nil {
			t.Fatal(err)
		}
		if size%512 == 0 { // QEMU rounds a raw file up to sectors
			run(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, path)
		}
		chain, err := qcow2.NewChain(images...)
		if err != nil {
			t.Fatal(err)
		}
		checkChain(t, chain, c.model)
	})
}

func open(t *rapid.T, path string) *qcow2.Image {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	i, err := qcow2.Open(f, info.Size(), qcow2.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func checkChain(t *rapid.T, chain *qcow2.Chain, model []byte) {
	size := len(model)
	got := make([]byte, size+10)
	if n, err := chain.ReadAt(got, 0); n != size || !errors.Is(err, io.EOF) || !bytes.Equal(got[:n], model) {
		t.Errorf("all at once: %d bytes, %v, or they differ", n, err)
	}
	at := uint64(0)
	err := chain.Extents(0, uint64(size), func(off, length uint64, kind qcow2.Kind) error {
		if off != at || length == 0 {
			t.Errorf("extent at %d of %d bytes follows %d", off, length, at)
		}
		at = off + length
		if kind == qcow2.Zero && len(bytes.Trim(model[off:at], "\x00")) != 0 {
			t.Errorf("%d bytes at %d are not zeros", length, off)
		}
		return nil
	})
	if err != nil || at != uint64(size) {
		t.Errorf("extents end at %d of %d: %v", at, size, err)
	}
	var wg sync.WaitGroup
	for g := range 2 {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(uint64(g), 0))
			for range 20 {
				off := random.IntN(size)
				p := make([]byte, 1+random.IntN(size-off))
				if n, err := chain.ReadAt(p, int64(off)); n != len(p) || err != nil || !bytes.Equal(p, model[off:off+n]) {
					t.Errorf("%d bytes at %d: %v, or they differ", len(p), off, err)
				}
			}
		})
	}
	wg.Wait()
}
