package transfer

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// faulty is a file system that shows a repository, whose reads fail or hang when
// a test says so.
type faulty struct {
	mu    sync.Mutex
	errno syscall.Errno
	gate  chan struct{} // closed to let go on what hangs; nil while nothing is to

	failed, hung atomic.Int64
}

// mountFaulty has the host's repository be behind one, until the test ends.
func mountFaulty(h *host) *faulty {
	h.Helper()
	if os.Geteuid() != 0 {
		h.Skip("mounting needs root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		h.Skip("no FUSE here")
	}
	f, point := &faulty{}, filepath.Join(h.dir, "mounted")
	if err := os.Mkdir(point, 0o700); err != nil {
		h.Fatal(err)
	}
	root := &fs.LoopbackRoot{Path: h.repo}
	root.RootNode = &faultyNode{&fs.LoopbackNode{RootData: root}, f}
	server, err := fs.Mount(point, root.RootNode, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "faulty", Name: "faulty"}})
	if err != nil {
		h.Fatal(err)
	}
	h.Cleanup(func() {
		f.heal()
		if err := server.Unmount(); err != nil { // it has tried for some seconds
			_ = syscall.Unmount(point, syscall.MNT_DETACH)
			h.Error(err)
		}
	})
	h.repo = point
	return f
}

func (f *faulty) set(errno syscall.Errno, gate chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.gate != nil {
		close(f.gate)
	}
	f.errno, f.gate = errno, gate
}

func (f *faulty) fail(errno syscall.Errno) { f.set(errno, nil) }
func (f *faulty) hang()                    { f.set(0, make(chan struct{})) }
func (f *faulty) heal()                    { f.set(0, nil) }

// awaitHung waits until somebody hangs.
func (f *faulty) awaitHung(h *host) {
	h.Helper()
	for before, deadline := f.hung.Load(), time.Now().Add(time.Minute); f.hung.Load() == before; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.Fatal("nobody asks the storage that hangs")
		}
	}
}

func (f *faulty) pass() syscall.Errno {
	f.mu.Lock()
	errno, gate := f.errno, f.gate
	f.mu.Unlock()
	if errno != 0 {
		f.failed.Add(1)
	}
	if gate != nil {
		f.hung.Add(1)
		<-gate
	}
	return errno
}

type faultyNode struct {
	*fs.LoopbackNode
	f *faulty
}

func (n *faultyNode) WrapChild(_ context.Context, child fs.InodeEmbedder) fs.InodeEmbedder {
	return &faultyNode{child.(*fs.LoopbackNode), n.f}
}

func (n *faultyNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	h, _, errno := n.LoopbackNode.Open(ctx, flags)
	if errno != 0 {
		return nil, 0, errno
	}
	// Past the kernel's cache, so that every read is asked of us.
	return &faultyFile{h.(openFile), n.f}, fuse.FOPEN_DIRECT_IO, 0
}

// openFile is what a loopback file can, but for giving itself to the kernel.
type openFile interface {
	fs.FileReader
	fs.FileWriter
	fs.FileFsyncer
	fs.FileFlusher
	fs.FileReleaser
	fs.FileGetattrer
}

type faultyFile struct {
	openFile
	f *faulty
}

func (h *faultyFile) Read(ctx context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if errno := h.f.pass(); errno != 0 {
		return nil, errno
	}
	return h.openFile.Read(ctx, p, off)
}
