package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"golang.org/x/sync/errgroup"
)

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// serve runs a server on a socket that is listening already (systemd's socket
// activation), so that nobody has to wait for it.
func serve(t testing.TB, name string, args ...string) (socket string, p *os.Process) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, name}, args...)...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	// Only the server's end may be left: its death must be seen.
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	return socket, cmd.Process
}

func qemuNBD(t testing.TB, args ...string) (socket string) {
	t.Helper()
	socket, _ = serve(t, "qemu-nbd", append([]string{"-t", "-e", "8"}, args...)...)
	return socket
}

func nbdkit(t testing.TB, args ...string) (socket string, p *os.Process) {
	t.Helper()
	return serve(t, "nbdkit", append([]string{"-f"}, args...)...)
}

func dial(t *testing.T, socket string, o nbd.Options) *nbd.Client {
	t.Helper()
	c, err := nbd.Dial(t.Context(), socket, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func extents(t *testing.T, c *nbd.Client, context string, off, length uint64) []nbd.Extent {
	t.Helper()
	var got []nbd.Extent
	err := c.Extents(t.Context(), context, off, length, func(e nbd.Extent) error {
		got = append(got, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// The disk ends within a cluster, and has data, zeroes, holes and dirty parts.
func TestQEMUWithDirtyBitmap(t *testing.T) {
	const size = 10<<20 + 512
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", image, strconv.Itoa(size))
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "-c", "write -z 2M 1M", image)
	run(t, "qemu-img", "bitmap", "--add", image, "b0")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 64k 128k", "-c", "write -P 3 10M 512", image)
	const dirty = "qemu:dirty-bitmap:b0"
	socket := qemuNBD(t, "-r", "-A", "-B", "b0", "-x", "vda", "-f", "qcow2", image)
	c := dial(t, socket, nbd.Options{Export: "vda", Contexts: []string{nbd.ContextAllocation, dirty}})

	if c.Size() != size {
		t.Errorf("size is %d, want %d", c.Size(), size)
	}
	want := []nbd.Extent{{0, 64 << 10, 0}, {64 << 10, 128 << 10, 1}, {192 << 10, 10<<20 - 192<<10, 0}, {10 << 20, 512, 1}}
	if d := cmp.Diff(want, extents(t, c, dirty, 0, size)); d != "" {
		t.Errorf("dirty extents: %s", d)
	}
	var data uint64
	for _, e := range extents(t, c, nbd.ContextAllocation, 0, size) {
		if e.Flags&nbd.StateZero == 0 {
			data += e.Length
		}
	}
	if data != 1<<20+512 {
		t.Errorf("%d bytes of data, want 1 MiB and a sector", data)
	}
	// A range that starts and ends within extents is cut, not widened.
	want = []nbd.Extent{{100 << 10, 92 << 10, 1}, {192 << 10, 1000, 0}}
	if d := cmp.Diff(want, extents(t, c, dirty, 100<<10, 92<<10+1000)); d != "" {
		t.Errorf("dirty extents of a part: %s", d)
	}
	got := make([]byte, size)
	if err := c.ReadAt(t.Context(), got, 0); err != nil {
		t.Fatal(err)
	}
	model := make([]byte, size)
	copy(model, bytes.Repeat([]byte{1}, 1<<20))
	copy(model[64<<10:], bytes.Repeat([]byte{2}, 128<<10))
	copy(model[10<<20:], bytes.Repeat([]byte{3}, 512))
	if !bytes.Equal(got, model) {
		t.Error("data differs from what was written")
	}
	if err := c.ReadAt(t.Context(), got[:513], size-512); err == nil {
		t.Error("a read behind the disk's end succeeded")
	}
	if err := c.ReadAt(t.Context(), got[:512], size-512); err != nil || got[0] != 3 {
		t.Errorf("the last sector reads %d, %v", got[0], err)
	}
}

func TestDialRefuses(t *testing.T) {
	image := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(image, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	qemu := qemuNBD(t, "-r", "-x", "vda", "-f", "raw", image)
	simple, _ := nbdkit(t, "--no-sr", "null", "4096")
	for _, test := range []struct {
		name, socket, want string
		o                  nbd.Options
	}{
		{"no such export", qemu, "export", nbd.Options{Export: "vdb"}},
		{"no such bitmap", qemu, `does not offer metadata context "qemu:dirty-bitmap:x"`, nbd.Options{Export: "vda", Contexts: []string{"qemu:dirty-bitmap:x"}}},
		{"no structured replies", simple, "structured replies: not supported", nbd.Options{}},
		{"no server", filepath.Join(t.TempDir(), "none"), "no such file", nbd.Options{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, err := nbd.Dial(t.Context(), test.socket, test.o)
			if err == nil {
				_ = c.Close()
				t.Fatal("succeeded")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %q, want something about %q", err, test.want)
			}
		})
	}
}

// Many goroutines, any offset and size, on servers with and without limits.
func TestParallelReads(t *testing.T) {
	const size = 64<<20 + 1000
	for name, args := range map[string][]string{
		"plain":             {"pattern", strconv.Itoa(size)},
		"small maximum":     {"--filter=blocksize-policy", "pattern", strconv.Itoa(size), "blocksize-minimum=1", "blocksize-preferred=4096", "blocksize-maximum=65536", "blocksize-error-policy=error"},
		"4 KiB sectors":     {"--filter=blocksize-policy", "pattern", strconv.Itoa(64 << 20), "blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error"},
		"answers in pieces": {"--filter=delay", "pattern", strconv.Itoa(size), "rdelay=1ms"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket, _ := nbdkit(t, args...)
			c := dial(t, socket, nbd.Options{})
			g, ctx := errgroup.WithContext(t.Context())
			for i := range 16 {
				g.Go(func() error {
					random := rand.New(rand.NewPCG(1, uint64(i)))
					for range 20 {
						p := make([]byte, 1+random.IntN(1<<20))
						off := random.Uint64N(c.Size() - uint64(len(p)) + 1)
						if err := c.ReadAt(ctx, p, off); err != nil {
							return err
						}
						checkPattern(t, p, off)
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// checkPattern knows nbdkit's pattern: every 8 bytes hold their own offset.
func checkPattern(t *testing.T, p []byte, off uint64) {
	start := off &^ 7
	want := make([]byte, 0, len(p)+16)
	for at := start; at < off+uint64(len(p)); at += 8 {
		want = binary.BigEndian.AppendUint64(want, at)
	}
	if !bytes.Equal(p, want[off-start:][:len(p)]) {
		t.Errorf("wrong data in %d bytes at %d", len(p), off)
	}
}

func TestServerError(t *testing.T) {
	socket, _ := nbdkit(t, "--filter=error", "null", "1M", "error-pread=ENOSPC", "error-pread-rate=100%")
	c := dial(t, socket, nbd.Options{Contexts: []string{nbd.ContextAllocation}})
	err := c.ReadAt(t.Context(), make([]byte, 512), 1024)
	var server *nbd.ServerError
	if !errors.Is(err, syscall.ENOSPC) || !errors.As(err, &server) || !strings.Contains(err.Error(), "512 bytes at 1024") {
		t.Errorf("error is %v", err)
	}
	// The connection goes on.
	if got := extents(t, c, nbd.ContextAllocation, 0, 1<<20); len(got) != 1 || got[0].Length != 1<<20 {
		t.Errorf("extents afterwards: %v", got)
	}
}

func TestCancelEndsTheCallOnly(t *testing.T) {
	socket, _ := nbdkit(t, "--filter=delay", "null", "1M", "rdelay=3600")
	c := dial(t, socket, nbd.Options{Contexts: []string{nbd.ContextAllocation}})
	cause := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error)
	go func() { result <- c.ReadAt(ctx, make([]byte, 512), 0) }()
	cancel(cause)
	if err := <-result; !errors.Is(err, cause) {
		t.Errorf("error is %v", err)
	}
	if got := extents(t, c, nbd.ContextAllocation, 0, 1<<20); len(got) != 1 {
		t.Errorf("extents afterwards: %v", got)
	}
}

func TestDeathOfTheServerEndsAllCalls(t *testing.T) {
	socket, server := nbdkit(t, "--filter=delay", "null", "1M", "rdelay=3600")
	c := dial(t, socket, nbd.Options{})
	var wg sync.WaitGroup
	for range 100 { // more than are allowed on the wire
		wg.Go(func() {
			if err := c.ReadAt(t.Context(), make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), "connection lost") {
				t.Errorf("error is %v", err)
			}
		})
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
}

func TestCloseEndsAllCalls(t *testing.T) {
	socket, _ := nbdkit(t, "--filter=delay", "null", "1M", "rdelay=3600")
	c := dial(t, socket, nbd.Options{})
	result := make(chan error)
	go func() { result <- c.ReadAt(t.Context(), make([]byte, 512), 0) }()
	_ = c.Close()
	if err := <-result; !errors.Is(err, net.ErrClosed) {
		t.Errorf("error is %v", err)
	}
}

// A server that accepts and says nothing must not hold Dial up for ever.
func TestDialIsBoundedByItsContext(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := nbd.Dial(ctx, socket, nbd.Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
}

func BenchmarkReadAt(b *testing.B) {
	socket, _ := nbdkit(b, "memory", "1G")
	c, err := nbd.Dial(b.Context(), socket, nbd.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	const piece = 1 << 20
	b.SetBytes(piece)
	b.SetParallelism(4)
	b.RunParallel(func(pb *testing.PB) {
		p := make([]byte, piece)
		for off := uint64(0); pb.Next(); off += piece {
			if err := c.ReadAt(b.Context(), p, off%(1<<30)); err != nil {
				b.Error(err)
			}
		}
	})
}
