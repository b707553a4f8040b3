//go:build lab

package labtest

import (
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// faultFS shows a directory at another place, and there lets a test stop
// somebody at one system call, exactly: a process waits in it, as with a share
// that hangs, until the test lets it go on. Not even SIGKILL ends it before.
type faultFS struct {
	t     *testing.T
	point string // where it is mounted
	mu    sync.Mutex
	traps []*trap
}

// trap stops, or lets fail, operations on paths that match.
type trap struct {
	fs      *faultFS
	program string // whose; "" for anybody's
	op      string // as open, create, mkdir, rename (by the new name), unlink, read, write, fsync
	path    *regexp.Regexp
	after   bool          // the operation is done, and its caller is not told before it may go on
	errno   syscall.Errno // what each fails with; 0 stops one
	reached chan struct{} // closed when one is there
	goOn    chan struct{} // closed to let it go on
	once    sync.Once
	release sync.Once
}

// mountFaults shows directory at point until the test ends.
func mountFaults(t *testing.T, directory, point string) *faultFS {
	t.Helper()
	f := &faultFS{t: t, point: point}
	var st syscall.Stat_t
	if err := syscall.Stat(directory, &st); err != nil {
		t.Fatal(err)
	}
	root := &fs.LoopbackRoot{Path: directory, Dev: st.Dev}
	top := &node{LoopbackNode: &fs.LoopbackNode{RootData: root}, fs: f}
	root.RootNode = top
	var notCached time.Duration
	server, err := fs.Mount(point, top, &fs.Options{
		EntryTimeout: &notCached, AttrTimeout: &notCached,
		MountOptions: fuse.MountOptions{AllowOther: true, DirectMountStrict: true, FsName: "faults", Name: "faults"},
	})
	if err != nil {
		t.Fatalf("cannot mount %s: %v", point, err)
	}
	t.Cleanup(func() { eventually(t, point+" is unmounted", server.Unmount) })
	return f
}

// stop stops the next such operation of a program.
func (f *faultFS) stop(program, op, path string) *trap {
	return f.set(&trap{program: program, op: op, path: regexp.MustCompile(path)})
}

// stopAfter stops the caller of the next such operation when it is done.
func (f *faultFS) stopAfter(program, op, path string) *trap {
	return f.set(&trap{program: program, op: op, path: regexp.MustCompile(path), after: true})
}

// fail lets all such operations fail until letGo is called.
func (f *faultFS) fail(op, path string, with syscall.Errno) *trap {
	return f.set(&trap{op: op, path: regexp.MustCompile(path), errno: with})
}

func (f *faultFS) set(p *trap) *trap {
	p.fs, p.reached, p.goOn = f, make(chan struct{}), make(chan struct{})
	f.t.Cleanup(p.letGo) // nothing that hangs can be cleared up
	f.mu.Lock()
	defer f.mu.Unlock()
	f.traps = append(f.traps, p)
	return p
}

// wait waits until somebody is in the trap.
func (p *trap) wait() {
	p.fs.t.Helper()
	select {
	case <-p.reached:
	case <-time.After(limit):
		p.fs.t.Fatalf("%s does not come to %s %s", p.program, p.op, p.path)
	}
}

// letGo takes the trap away, and lets go who is in it.
func (p *trap) letGo() {
	p.release.Do(func() {
		p.fs.mu.Lock()
		defer p.fs.mu.Unlock()
		p.fs.traps = slices.DeleteFunc(slices.Clone(p.fs.traps), func(q *trap) bool { return p == q })
		close(p.goOn)
	})
}

// pass returns when an operation may go on, or what it fails with.
func (f *faultFS) pass(ctx context.Context, op, path string, after bool) syscall.Errno {
	program := programOf(ctx)
	f.mu.Lock()
	var caught *trap
	for i, p := range f.traps {
		if p.op == op && p.after == after && p.path.MatchString(path) && (p.program == "" || p.program == program) {
			if caught = p; p.errno == 0 {
				f.traps = slices.Delete(slices.Clone(f.traps), i, i+1)
			}
			break
		}
	}
	f.mu.Unlock()
	if caught == nil {
		return 0
	}
	caught.once.Do(func() { close(caught.reached) })
	if caught.errno == 0 {
		<-caught.goOn
	}
	return caught.errno
}

// programOf names the program that asks for an operation.
func programOf(ctx context.Context) string {
	caller, ok := fuse.FromContext(ctx)
	if !ok {
		return ""
	}
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", caller.Pid)) // it may be gone already
	return filepath.Base(exe)
}

// at does an operation between its two places for traps.
func (f *faultFS) at(ctx context.Context, op, path string, do func() syscall.Errno) syscall.Errno {
	if errno := f.pass(ctx, op, path, false); errno != 0 {
		return errno
	}
	if errno := do(); errno != 0 {
		return errno
	}
	return f.pass(ctx, op, path, true)
}

// node is a file or directory of a faultFS.
type node struct {
	*fs.LoopbackNode
	fs *faultFS
}

// WrapChild makes what is found below a node one, too.
func (n *node) WrapChild(_ context.Context, child fs.InodeEmbedder) fs.InodeEmbedder {
	return &node{LoopbackNode: child.(*fs.LoopbackNode), fs: n.fs}
}

func (n *node) child(name string) string { return path.Join(n.Path(n.Root()), name) }

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (inode *fs.Inode, errno syscall.Errno) {
	errno = n.fs.at(ctx, "mkdir", n.child(name), func() (e syscall.Errno) {
		inode, e = n.LoopbackNode.Mkdir(ctx, name, mode, out)
		return e
	})
	return inode, errno
}

func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	return n.fs.at(ctx, "unlink", n.child(name), func() syscall.Errno { return n.LoopbackNode.Unlink(ctx, name) })
}

func (n *node) Rename(ctx context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	target := path.Join(to.EmbeddedInode().Path(n.Root()), newName)
	return n.fs.at(ctx, "rename", target, func() syscall.Errno { return n.LoopbackNode.Rename(ctx, name, to, newName, flags) })
}

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (inode *fs.Inode, h fs.FileHandle, _ uint32, errno syscall.Errno) {
	errno = n.fs.at(ctx, "create", n.child(name), func() (e syscall.Errno) {
		inode, h, _, e = n.LoopbackNode.Create(ctx, name, flags, mode, out)
		return e
	})
	return inode, n.handle(h, errno, n.child(name)), fuse.FOPEN_DIRECT_IO, errno
}

func (n *node) Open(ctx context.Context, flags uint32) (h fs.FileHandle, _ uint32, errno syscall.Errno) {
	errno = n.fs.at(ctx, "open", n.child(""), func() (e syscall.Errno) {
		h, _, e = n.LoopbackNode.Open(ctx, flags)
		return e
	})
	return n.handle(h, errno, n.child("")), fuse.FOPEN_DIRECT_IO, errno
}

func (n *node) handle(h fs.FileHandle, errno syscall.Errno, path string) fs.FileHandle {
	if errno != 0 {
		return nil
	}
	return &handle{operations: h.(operations), fs: n.fs, path: path}
}

// operations are those of a loopback file, but for giving the file to the
// kernel, which would then no longer ask us.
type operations interface {
	fs.FileReader
	fs.FileWriter
	fs.FileFsyncer
	fs.FileFlusher
	fs.FileReleaser
	fs.FileGetattrer
	fs.FileSetattrer
	fs.FileLseeker
	fs.FileAllocater
}

// handle is an open file. Its path is the one by which it was opened.
type handle struct {
	operations
	fs   *faultFS
	path string
}

func (h *handle) Read(ctx context.Context, p []byte, off int64) (r fuse.ReadResult, errno syscall.Errno) {
	errno = h.fs.at(ctx, "read", h.path, func() (e syscall.Errno) {
		r, e = h.operations.Read(ctx, p, off)
		return e
	})
	return r, errno
}

func (h *handle) Write(ctx context.Context, p []byte, off int64) (n uint32, errno syscall.Errno) {
	errno = h.fs.at(ctx, "write", h.path, func() (e syscall.Errno) {
		n, e = h.operations.Write(ctx, p, off)
		return e
	})
	return n, errno
}

func (h *handle) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	return h.fs.at(ctx, "fsync", h.path, func() syscall.Errno { return h.operations.Fsync(ctx, flags) })
}
