package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
)

const (
	mapUnit  = 64 << 10
	buffered = 10 << 20
)

// ram is a disk in memory, of which the block that contains bad cannot be read.
type ram struct {
	content  []byte
	bad      uint64
	takes    time.Duration
	held     atomic.Int64 // bytes of the buffers that are being filled
	mostHeld atomic.Int64
}

func newRAM(size int) *ram {
	d := &ram{content: make([]byte, size), bad: ^uint64(0)}
	r := rand.New(rand.NewPCG(1, 2))
	for at := 0; at < size; at += mapUnit {
		if r.IntN(3) == 0 {
			continue // a hole
		}
		unit := d.content[at:min(at+mapUnit, size)]
		for i := 0; i+8 <= len(unit); i += 8 {
			binary.LittleEndian.PutUint64(unit[i:], r.Uint64())
		}
	}
	return d
}

func (d *ram) Size() uint64 { return uint64(len(d.content)) }

func (d *ram) ReadAt(_ context.Context, p []byte, off uint64) error {
	held := d.held.Add(int64(len(p)))
	defer d.held.Add(-int64(len(p)))
	for most := d.mostHeld.Load(); held > most && !d.mostHeld.CompareAndSwap(most, held); most = d.mostHeld.Load() {
	}
	time.Sleep(d.takes)
	if off <= d.bad && d.bad < off+uint64(len(p)) {
		return fmt.Errorf("bad block: %w", syscall.EIO)
	}
	copy(p, d.content[off:off+uint64(len(p))])
	return nil
}

func (d *ram) Extents(_ context.Context, off, length uint64, fn func(nbd.Extent) error) error {
	for end := off + length; off < end; {
		n := min(mapUnit-off%mapUnit, end-off)
		e := nbd.Extent{Offset: off, Length: n}
		if bytes.Count(d.content[off:off+n], []byte{0}) == int(n) {
			e.Flags = nbd.StateHole | nbd.StateZero
		}
		if err := fn(e); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// serveHere serves an export in this process, and sees it end.
func serveHere(t testing.TB, e nbd.Export) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		nbd.NewServer("vda", e, buffered).Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case <-ended:
		case <-time.After(time.Minute):
			t.Error("the server does not end")
		}
		os.RemoveAll(dir)
	})
	return socket
}

// TestServerWithTools has other programs read what we serve.
func TestServerWithTools(t *testing.T) {
	const size = 10<<20 + 512
	d := newRAM(size)
	socket := serveHere(t, d)
	uri := "nbd+unix:///vda?socket=" + socket
	want, got := filepath.Join(t.TempDir(), "want"), filepath.Join(t.TempDir(), "got")
	if err := os.WriteFile(want, d.content, 0o600); err != nil {
		t.Fatal(err)
	}
	var info struct {
		Exports []struct {
			Name     string `json:"export-name"`
			Size     int    `json:"export-size"`
			ReadOnly bool   `json:"is_read_only"`
			Multi    bool   `json:"can_multi_conn"`
			Minimum  int    `json:"block_size_minimum"`
			Contexts []string
		}
	}
	for _, args := range [][]string{{"--json", uri}, {"--json", "--list", "nbd+unix:///?socket=" + socket}} {
		if err := json.Unmarshal([]byte(run(t, "nbdinfo", args...)), &info); err != nil {
			t.Fatal(err)
		}
		if e := info.Exports; len(e) != 1 || e[0].Size != size || !e[0].ReadOnly || !e[0].Multi || e[0].Minimum != 1 || len(e[0].Contexts) != 1 {
			t.Errorf("nbdinfo %v: %+v", args, e)
		}
	}
	if totals := run(t, "nbdinfo", "--map", "--totals", uri); !strings.Contains(totals, "hole,zero") {
		t.Errorf("map has no holes:\n%s", totals)
	}
	for _, c := range [][]string{
		{"nbdcopy", uri, got}, {"nbdcopy", "--connections=4", "--requests=64", "--request-size=1048576", uri, got},
		{"qemu-img", "convert", "-f", "raw", "-O", "raw", uri, got}, {"qemu-img", "convert", "-W", "-m16", "-f", "raw", "-O", "raw", uri, got},
	} {
		run(t, c[0], c[1:]...)
		run(t, "cmp", want, got)
		os.Remove(got)
	}
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, uri)
	if out := run(t, "qemu-io", "-r", "-f", "raw", "-c", "read 0 512", "-c", "read 65000 1000", "-c", "read 10485760 512", uri); strings.Count(out, "ops;") != 3 {
		t.Errorf("qemu-io: %s", out)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri).CombinedOutput(); err == nil {
		t.Errorf("written: %s", out)
	}
	if out, err := exec.Command("nbdinfo", "nbd+unix:///vdb?socket="+socket).CombinedOutput(); err == nil {
		t.Errorf("an export of another name was opened: %s", out)
	}
}

// TestServerIsExact asks in every way by many at once.
func TestServerIsExact(t *testing.T) {
	d := newRAM(3<<20 + 777)
	c := dial(t, serveHere(t, d), nbd.Options{Export: "vda", Contexts: []string{nbd.ContextAllocation}})
	rapid.Check(t, func(rt *rapid.T) {
		var all errgroup.Group
		for range rapid.IntRange(1, 30).Draw(rt, "requests") {
			off := rapid.IntRange(0, len(d.content)-1).Draw(rt, "offset")
			n := rapid.OneOf(rapid.IntRange(1, min(70000, len(d.content)-off)), rapid.IntRange(1, len(d.content)-off)).Draw(rt, "length")
			all.Go(func() error {
				p := make([]byte, n)
				if err := c.ReadAt(t.Context(), p, uint64(off)); err != nil {
					return err
				}
				if !bytes.Equal(p, d.content[off:off+n]) {
					return fmt.Errorf("%d bytes at %d are others", n, off)
				}
				return nil
			})
			all.Go(func() error {
				return c.Extents(t.Context(), nbd.ContextAllocation, uint64(off), uint64(n), func(e nbd.Extent) error {
					if e.Flags != 0 && bytes.Count(d.content[e.Offset:e.Offset+e.Length], []byte{0}) != int(e.Length) {
						return fmt.Errorf("%+v is no hole", e)
					}
					return nil
				})
			})
		}
		if err := all.Wait(); err != nil {
			rt.Fatal(err)
		}
	})
}

// TestServerTellsBadBlocks gives EIO for a bad block, and goes on.
func TestServerTellsBadBlocks(t *testing.T) {
	d := newRAM(1 << 20)
	d.bad = 300000
	socket := serveHere(t, d)
	c := dial(t, socket, nbd.Options{Export: "vda"})
	p := make([]byte, 4096)
	for range 3 {
		var told *nbd.ServerError
		if err := c.ReadAt(t.Context(), p, 300000&^4095); !errors.As(err, &told) || told.Errno != syscall.EIO {
			t.Errorf("bad block: %v", err)
		}
		if err := c.ReadAt(t.Context(), p, 0); err != nil || !bytes.Equal(p, d.content[:4096]) {
			t.Errorf("good block: %v", err)
		}
	}
	out, err := exec.Command("qemu-io", "-r", "-f", "raw", "-c", "read 299008 4096", "nbd+unix:///vda?socket="+socket).CombinedOutput()
	if !strings.Contains(string(out), "Input/output error") {
		t.Errorf("qemu-io: %s, %v", out, err)
	}
}

// TestServerIsBounded asks for more than may be held at once.
func TestServerIsBounded(t *testing.T) {
	d := newRAM(16 << 20)
	d.takes = 5 * time.Millisecond // so that more would be held at once if that could be
	socket := serveHere(t, d)
	var all sync.WaitGroup
	for range 4 {
		c := dial(t, socket, nbd.Options{Export: "vda"})
		for range 8 {
			all.Go(func() {
				p := make([]byte, 8<<20)
				if err := c.ReadAt(t.Context(), p, 1<<20); err != nil || !bytes.Equal(p, d.content[1<<20:9<<20]) {
					t.Errorf("read: %v", err)
				}
			})
		}
	}
	all.Wait()
	if most := d.mostHeld.Load(); most > buffered || most < 8<<20 {
		t.Errorf("%d bytes were held at once", most)
	}
}

// silent never answers, but for the end of its context.
type silent struct{ asked chan struct{} }

func (silent) Size() uint64 { return 1 << 20 }

func (s silent) ReadAt(ctx context.Context, _ []byte, _ uint64) error {
	s.asked <- struct{}{}
	<-ctx.Done()
	return context.Cause(ctx)
}

// TestServerEnds ends while requests wait: serveHere's clean-up sees to it.
func TestServerEnds(t *testing.T) {
	s := silent{make(chan struct{}, 100)}
	socket := serveHere(t, s)
	gone := dial(t, socket, nbd.Options{Export: "vda"})
	stays := dial(t, socket, nbd.Options{Export: ""})
	for _, c := range []*nbd.Client{gone, stays} {
		for range 10 {
			go func() { _ = c.ReadAt(context.Background(), make([]byte, 512), 0) }()
		}
	}
	for range 20 {
		<-s.asked
	}
	_ = gone.Close() // one leaves first
}
