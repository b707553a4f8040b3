package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/digest"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/daemon/internal/qcow2"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// serving is a worker that serves, in this process or in one of its own.
type serving struct {
	*host
	dir    string // of the job
	sock   string // directory of the sockets
	ended  chan *Result
	cancel context.CancelCauseFunc
}

func (h *host) serveSpec(backup string, targets ...string) *ServeSpec {
	h.Helper()
	sock, err := os.MkdirTemp(h.dir, "s")
	if err != nil {
		h.Fatal(err)
	}
	s := &ServeSpec{Backup: backup}
	for _, t := range targets {
		s.Disks = append(s.Disks, ServeDisk{Target: t, Socket: filepath.Join(sock, t)})
	}
	return s
}

// startServing serves, and returns when it does.
func (h *host) startServing(s *ServeSpec) *serving {
	h.Helper()
	ctx, cancel := context.WithCancelCause(context.Background())
	v := &serving{host: h, dir: h.job(Spec{Operation: OperationServe, Serve: s}), sock: filepath.Dir(s.Disks[0].Socket), ended: make(chan *Result, 1), cancel: cancel}
	go func() { v.ended <- h.runJob(ctx, v.dir) }()
	awaitPhase(h, v.dir, PhaseServing)
	if r, err := ReadResult(v.dir); err == nil {
		h.Fatalf("it does not serve: %+v", r.Error)
	}
	return v
}

func (v *serving) uri(target string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", target, filepath.Join(v.sock, target))
}

// stop ends it, and checks that no socket is left.
func (v *serving) stop() *Result {
	v.Helper()
	if err := WriteStop(v.dir); err != nil {
		v.Fatal(err)
	}
	return v.end()
}

func (v *serving) end() *Result {
	v.Helper()
	select {
	case r := <-v.ended:
		if left, err := os.ReadDir(v.sock); err != nil || len(left) > 0 {
			v.Errorf("left: %v, %v", left, err)
		}
		return r
	case <-time.After(time.Minute):
		v.Fatal("it does not end")
		return nil
	}
}

func (v *serving) dial(target string) *nbd.Client {
	v.Helper()
	c, err := nbd.Dial(v.Context(), filepath.Join(v.sock, target), nbd.Options{Export: target, Contexts: []string{nbd.ContextAllocation}})
	if err != nil {
		v.Fatal(err)
	}
	v.Cleanup(func() { c.Close() })
	return c
}

// await waits until the disk's status says so.
func (v *serving) await(what string, ok func(DiskStatus) bool) {
	v.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if s, err := ReadStatus(v.dir); err == nil && len(s.Disks) > 0 && ok(s.Disks[0]) {
			return
		}
		if time.Now().After(deadline) {
			v.Fatalf("the status does not say: %s", what)
		}
	}
}

// TestServe has QEMU's and libnbd's tools read both backups of a chain, whole
// and by the map of what is zeros.
func TestServe(t *testing.T) {
	for _, compression := range []string{"none", "zstd", "zlib"} {
		h, want, full, increment := chainOfTwo(t, compression)
		v := h.startServing(h.serveSpec(increment, "vda"))
		got := filepath.Join(h.dir, "got")
		h.command("nbdcopy", v.uri("vda"), got)
		h.command("cmp", want, got)
		h.command("qemu-img", "compare", "-f", "raw", "-F", "raw", want, v.uri("vda"))
		if m := h.command("nbdinfo", "--map", "--totals", v.uri("vda")); !strings.Contains(m, "hole,zero") {
			t.Errorf("%s: %s", compression, m)
		}
		other := h.startServing(h.serveSpec(full, "vda")) // beside the first
		h.command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", other.uri("vda"), h.image(full, "vda"))
		for _, v := range []*serving{v, other} {
			r := v.stop()
			if r.Error != nil || len(r.Served) != 1 || r.Served[0].Read == 0 || r.Served[0].Damage != nil || r.Served[0].Unanswered != nil || r.Manifest == nil {
				t.Errorf("%s: %+v, %+v", compression, r.Error, r.Served)
			}
		}
		h.checkClean()
	}
}

// TestServedReadsAreExact reads at all offsets, from two disks of which one ends
// within a block, by many at once and through a cache that is too small.
func TestServedReadsAreExact(t *testing.T) {
	h := newHost(t)
	a, b := h.disk("vda", "qcow2", 3<<20+1536), h.disk("vdb", "qcow2", 2<<20)
	a.io(h, "write -P 1 0 1M", "write -P 2 3M 1536", "write -P 3 1000k 100k")
	b.io(h, "write -P 4 512 1M")
	parent := h.mustTake("", "", a, b)
	a.io(h, "write -P 5 70k 4k", "write -z 512k 128k")
	increment := h.mustTake(parent, parent, a, b)
	want := map[string][]byte{}
	for _, d := range []disk{a, b} {
		content, err := os.ReadFile(d.raw(h))
		if err != nil {
			t.Fatal(err)
		}
		want[d.target] = content
	}
	v := h.startServing(h.serveSpec(increment, "vda", "vdb"))
	clients := map[string]*nbd.Client{"vda": v.dial("vda"), "vdb": v.dial("vdb")}
	rapid.Check(t, func(rt *rapid.T) {
		var all sync.WaitGroup
		for range rapid.IntRange(1, 60).Draw(rt, "requests") {
			target := rapid.SampledFrom([]string{"vda", "vdb"}).Draw(rt, "target")
			size := len(want[target])
			off := rapid.OneOf(rapid.IntRange(0, size-1), rapid.Map(rapid.IntRange(0, size>>16-1), func(n int) int { return n << 16 })).Draw(rt, "offset")
			n := rapid.OneOf(rapid.IntRange(1, min(8192, size-off)), rapid.IntRange(1, size-off)).Draw(rt, "length")
			all.Go(func() {
				p := make([]byte, n)
				if err := clients[target].ReadAt(t.Context(), p, uint64(off)); err != nil || !bytes.Equal(p, want[target][off:off+n]) {
					rt.Errorf("%d bytes at %d of %s: %v", n, off, target, err)
				}
			})
		}
		all.Wait()
	})
	if r := v.stop(); r.Error != nil || len(r.Served) != 2 {
		t.Errorf("%+v", r)
	}
}

// TestServedDamage flips bytes: whoever reads the block gets EIO and everything
// else, and the damage is named with the backup whose image has it.
func TestServedDamage(t *testing.T) {
	for _, compression := range []string{"none", "zstd"} {
		h, want, full, increment := chainOfTwo(t, compression)
		content, err := os.ReadFile(want)
		if err != nil {
			t.Fatal(err)
		}
		flip(h, full, 640<<10) // both see it
		flip(h, increment, 3<<20)
		flip(h, full, 1<<20) // the increment has another there
		v := h.startServing(h.serveSpec(increment, "vda"))
		c := v.dial("vda")
		var bad []uint64
		for off := uint64(0); off < chainSize; off += digest.BlockSize {
			p := make([]byte, digest.BlockSize)
			err := c.ReadAt(t.Context(), p, off)
			if errors.Is(err, unix.EIO) {
				bad = append(bad, off)
			} else if err != nil || !bytes.Equal(p, content[off:off+digest.BlockSize]) {
				t.Errorf("%s: block at %d: %v", compression, off, err)
			}
		}
		if d := cmp.Diff([]uint64{640 << 10, 3 << 20}, bad); d != "" {
			t.Errorf("%s: refused: %s", compression, d)
		}
		if out, err := exec.Command("nbdcopy", v.uri("vda"), filepath.Join(h.dir, "got")).CombinedOutput(); err == nil {
			t.Errorf("nbdcopy copied it: %s", out)
		}
		small := make([]byte, 512) // by the cache, which keeps no failure
		for range 2 {
			if err := c.ReadAt(t.Context(), small, 640<<10+512); !errors.Is(err, unix.EIO) {
				t.Errorf("a part of a bad block: %v", err)
			}
		}
		v.await("damage", func(d DiskStatus) bool { return d.Damaged == 2*digest.BlockSize && d.Refused == 0 })
		r := v.stop()
		if r.Error == nil || r.Error.Class != ClassVerification || !strings.Contains(r.Error.Message, full) {
			t.Errorf("%s: %+v", compression, r.Error)
		}
		found := r.Served[0].Damage
		for i := range found {
			found[i].Detail = ""
		}
		if d := cmp.Diff([]Damage{{640 << 10, digest.BlockSize, full, ""}, {3 << 20, digest.BlockSize, increment, ""}}, found); d != "" {
			t.Errorf("%s: damage: %s", compression, d)
		}
	}
}

// flip changes a byte of what the image of a backup itself holds at an offset of
// the disk.
func flip(h *host, backup string, off uint64) {
	h.Helper()
	key, err := (&worker{spec: &Spec{Repository: RepositorySpec{KeyFile: h.key}}}).key()
	if err != nil {
		h.Fatal(err)
	}
	r, err := repository.Open(h.repo, key)
	if err != nil {
		h.Fatal(err)
	}
	defer r.Close()
	l, err := trace(r, testDomain, backup)
	if err != nil {
		h.Fatal(err)
	}
	d, err := openDisk(r, l, "vda")
	if err != nil {
		h.Fatal(err)
	}
	defer d.close()
	at := int64(-1)
	if err := d.chain.Held(1, off, digest.BlockSize, func(r qcow2.Run) error {
		at = r.Host
		return nil
	}); err != nil || at < 0 {
		h.Fatalf("backup %s holds nothing at %d: %v", backup, off, err)
	}
	f, err := os.OpenFile(h.image(backup, "vda"), os.O_RDWR, 0)
	if err != nil {
		h.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		h.Fatal(err)
	}
	b[0] ^= 0x55
	if _, err := f.WriteAt(b, at); err != nil {
		h.Fatal(err)
	}
}

// TestServedAnyBitFlip flips bits all over the files: what is read is what was
// backed up, or refused. Nothing is blamed on the storage.
func TestServedAnyBitFlip(t *testing.T) {
	h, want, full, increment := chainOfTwo(t, "zstd")
	content, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	refusals := 0
	for _, name := range []string{full + "/vda.qcow2", full + "/vda.digests", increment + "/vda.qcow2", increment + "/vda.digests"} {
		p := filepath.Join(h.repo, testDomain, name)
		good, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 8 {
			bad := bytes.Clone(good)
			bad[usedByte(good, len(good)*i/8)] ^= 0x10
			h.write(p, string(bad))
			dir := h.job(Spec{Operation: OperationServe, Serve: h.serveSpec(increment, "vda")})
			spec, err := ReadSpec(dir)
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan *Result, 1)
			go func() { ended <- h.runJob(context.Background(), dir) }()
			awaitPhase(h, dir, PhaseServing)
			refused := readAll(h, spec.Serve.Disks[0].Socket, content)
			if err := WriteStop(dir); err != nil {
				t.Fatal(err)
			}
			r := <-ended
			if refused > 0 {
				refusals++
			}
			if (refused > 0) != (len(r.Served) > 0 && len(r.Served[0].Damage) > 0) || r.Error != nil && r.Error.Class != ClassVerification && r.Error.Class != ClassManifest {
				t.Errorf("%s, part %d: %d blocks were refused: %+v, %+v", name, i, refused, r.Error, r.Served)
			}
		}
		h.write(p, string(good))
	}
	if refusals == 0 {
		t.Error("no flip was met")
	}
}

// readAll reads a disk block by block, compares it, and counts what is refused;
// nothing if nobody serves it.
func readAll(h *host, socket string, want []byte) (refused int) {
	h.Helper()
	c, err := nbd.Dial(h.Context(), socket, nbd.Options{Export: "vda"})
	if err != nil {
		return 0
	}
	defer c.Close()
	p := make([]byte, digest.BlockSize)
	for off := 0; off < len(want); off += len(p) {
		err := c.ReadAt(h.Context(), p, uint64(off))
		if err != nil {
			refused++
		} else if !bytes.Equal(p, want[off:off+len(p)]) {
			h.Errorf("the block at %d is another", off)
		}
	}
	return refused
}

// TestServedFiles writes the other files before it serves, and gives files and
// sockets to their owner.
func TestServedFiles(t *testing.T) {
	h, _, _, increment := chainOfTwo(t, "none")
	uid, gid := os.Getuid(), os.Getgid()
	s := h.serveSpec(increment, "vda")
	s.Owner = Owner{UID: &uid, GID: &gid}
	s.Files = []RestoreFile{{Name: "domain.xml", Directory: h.dir, Destination: "new.xml"}}
	v := h.startServing(s)
	if b, err := os.ReadFile(filepath.Join(h.dir, "new.xml")); err != nil || string(b) != "<domain/>" {
		t.Errorf("definition is %q, %v", b, err)
	}
	if info, err := os.Stat(s.Disks[0].Socket); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	v.cancel(ErrCancelled) // as SIGTERM does
	if r := v.end(); r.Error != nil || len(r.Served) != 1 {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(filepath.Join(h.dir, "new.xml")); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
}

// TestServeRefuses what cannot be served, and leaves nothing.
func TestServeRefuses(t *testing.T) {
	h, _, _, increment := chainOfTwo(t, "none")
	precious := filepath.Join(h.dir, "precious")
	h.write(precious, "precious")
	change := func(f func(*ServeSpec)) *ServeSpec {
		s := h.serveSpec(increment, "vda")
		s.Files = []RestoreFile{{Name: "domain.xml", Directory: h.dir, Destination: "left.xml"}}
		f(s)
		return s
	}
	for name, test := range map[string]struct {
		spec  *ServeSpec
		class Class
	}{
		"no spec":         {nil, ClassInternal},
		"no disks":        {change(func(s *ServeSpec) { s.Disks = nil }), ClassInternal},
		"unknown disk":    {change(func(s *ServeSpec) { s.Disks[0].Target = "vdz" }), ClassManifest},
		"unknown backup":  {change(func(s *ServeSpec) { s.Backup = h.id() }), ClassMissing},
		"unknown file":    {change(func(s *ServeSpec) { s.Files[0].Name = "nvram" }), ClassManifest},
		"file in the way": {change(func(s *ServeSpec) { s.Files[0].Destination = "precious" }), ClassDestination},
		"no socket":       {&ServeSpec{Backup: increment, Disks: []ServeDisk{{"vda", precious}}}, ClassDestination},
		"long path":       {&ServeSpec{Backup: increment, Disks: []ServeDisk{{"vda", h.dir + "/" + strings.Repeat("x", 120)}}}, ClassDestination},
		"no directory":    {&ServeSpec{Backup: increment, Disks: []ServeDisk{{"vda", h.dir + "/none/vda"}}}, ClassDestination},
	} {
		r := h.run(Spec{Operation: OperationServe, Serve: test.spec})
		if r.Error == nil || r.Error.Class != test.class {
			t.Errorf("%s: %+v", name, r.Error)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "left.xml")); err == nil {
			t.Errorf("%s: the file is left", name)
		}
	}
	if b, err := os.ReadFile(precious); err != nil || string(b) != "precious" {
		t.Errorf("overwritten: %q, %v", b, err)
	}
}

// TestServingWorkerIsKilled kills the program while QEMU's tools read, and has
// another one take its place at the same socket.
func TestServingWorkerIsKilled(t *testing.T) {
	program := buildWorker(t)
	h, want, _, increment := chainOfTwo(t, "zstd")
	s := h.serveSpec(increment, "vda")
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGTERM} {
		dir := h.job(Spec{Operation: OperationServe, Serve: s})
		c := exec.Command(program, dir)
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		awaitPhase(h, dir, PhaseServing)
		v := &serving{host: h, dir: dir, sock: filepath.Dir(s.Disks[0].Socket)}
		h.command("qemu-img", "compare", "-f", "raw", "-F", "raw", want, v.uri("vda"))
		client := v.dial("vda")
		if err := c.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		err := c.Wait()
		if err := client.ReadAt(t.Context(), make([]byte, 512), 0); err == nil {
			t.Errorf("%v: a dead worker answers", sig)
		}
		r, resultErr := ReadResult(dir)
		_, socketErr := os.Lstat(s.Disks[0].Socket)
		if sig == unix.SIGKILL {
			if err == nil || resultErr == nil || socketErr != nil {
				t.Errorf("after SIGKILL: %v, %v; socket: %v", err, resultErr, socketErr)
			}
			continue
		}
		if err != nil || resultErr != nil || r.Error != nil || r.Served[0].Read == 0 || socketErr == nil {
			t.Errorf("after SIGTERM: %v, %+v, %v; socket: %v", err, r, resultErr, socketErr)
		}
	}
}

// TestServedStorageFails has the storage fail, and hang: the client gets EIO,
// the backup no blame, and when it is there again all goes on.
func TestServedStorageFails(t *testing.T) {
	h, want, _, increment := chainOfTwo(t, "none")
	content, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	f := mountFaulty(h)
	s := h.serveSpec(increment, "vda")
	s.Patience = (300 * time.Millisecond).Microseconds()
	v := h.startServing(s)
	c := v.dial("vda")
	p := make([]byte, digest.BlockSize)
	f.fail(syscall.EIO)
	if err := c.ReadAt(t.Context(), p, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("storage that fails: %v", err)
	}
	f.hang()
	asked := make(chan error, 1)
	go func() { asked <- c.ReadAt(t.Context(), make([]byte, 512), 64<<10) }()
	f.awaitHung(h)
	if err := <-asked; !errors.Is(err, unix.EIO) {
		t.Errorf("storage that hangs: %v", err)
	}
	v.await("two requests were refused", func(d DiskStatus) bool { return d.Refused == 2 && d.Damaged == 0 && d.Pending == 0 })
	f.heal()
	if refused := readAll(h, s.Disks[0].Socket, content); refused > 0 {
		t.Errorf("%d blocks are refused by storage that is well again", refused)
	}
	r := v.stop()
	if r.Error == nil || r.Error.Class != ClassRepository || r.Served[0].Unanswered == nil || len(r.Served[0].Damage) > 0 {
		t.Errorf("%+v, %+v", r.Error, r.Served)
	}
	if f.failed.Load() == 0 || f.hung.Load() == 0 {
		t.Error("the faults did not fire")
	}
}

// TestServedStorageIsWaitedFor has requests wait until the storage answers; the
// status tells meanwhile. A stop does not wait for it.
func TestServedStorageIsWaitedFor(t *testing.T) {
	h, want, _, increment := chainOfTwo(t, "none")
	content, err := os.ReadFile(want)
	if err != nil {
		t.Fatal(err)
	}
	f := mountFaulty(h)
	s := h.serveSpec(increment, "vda")
	s.Wait, s.Patience = true, 1
	v := h.startServing(s)
	c := v.dial("vda")
	for _, fault := range []func(){func() { f.fail(syscall.EIO) }, f.hang} {
		fault()
		p, asked := make([]byte, digest.BlockSize), make(chan error, 1)
		go func() { asked <- c.ReadAt(t.Context(), p, 0) }()
		v.await("a request waits", func(d DiskStatus) bool { return d.Pending > (700 * time.Millisecond).Microseconds() })
		f.heal()
		if err := <-asked; err != nil || !bytes.Equal(p, content[:len(p)]) {
			t.Errorf("after it was well again: %v", err)
		}
	}
	if r := v.stop(); r.Error != nil || r.Served[0].Unanswered != nil {
		t.Errorf("%+v", r)
	}
}

// TestStopDoesNotWaitForStorage stops a worker while it hangs: its result is
// there at once, and its process ends with the storage's next answer.
func TestStopDoesNotWaitForStorage(t *testing.T) {
	program := buildWorker(t)
	h, _, _, increment := chainOfTwo(t, "none")
	f := mountFaulty(h)
	s := h.serveSpec(increment, "vda")
	s.Wait = true
	dir := h.job(Spec{Operation: OperationServe, Serve: s})
	c := exec.Command(program, dir)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	awaitPhase(h, dir, PhaseServing)
	v := &serving{host: h, dir: dir, sock: filepath.Dir(s.Disks[0].Socket)}
	client := v.dial("vda")
	f.hang()
	go func() { _ = client.ReadAt(context.Background(), make([]byte, digest.BlockSize), 1<<20) }()
	f.awaitHung(h)
	if err := WriteStop(dir); err != nil {
		t.Fatal(err)
	}
	var r *Result
	for deadline := time.Now().Add(time.Minute); r == nil; time.Sleep(20 * time.Millisecond) {
		r, _ = ReadResult(dir)
		if time.Now().After(deadline) {
			t.Fatal("no result while the storage hangs")
		}
	}
	if r.Error != nil || len(r.Served) != 1 || r.Served[0].Unanswered != nil {
		t.Errorf("%+v", r)
	}
	f.heal()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestAddDamage adds blocks in any order: they come out ascending, joined with
// their neighbours of the same backup.
func TestAddDamage(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		blocks := rapid.SliceOfNDistinct(rapid.Uint64Range(0, 40), 0, 40, rapid.ID[uint64]).Draw(t, "blocks")
		backups := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b"}), 41, 41).Draw(t, "backups")
		var list []Damage
		for _, b := range blocks {
			list = addDamage(list, Damage{Offset: b * 10, Length: 10, Backup: backups[b]})
		}
		var got []uint64
		for i, d := range list {
			if i > 0 && (list[i-1].Offset+list[i-1].Length > d.Offset || list[i-1].Offset+list[i-1].Length == d.Offset && list[i-1].Backup == d.Backup) {
				t.Fatalf("not joined: %+v", list)
			}
			for at := d.Offset; at < d.Offset+d.Length; at += 10 {
				if backups[at/10] != d.Backup {
					t.Fatalf("%d is of %s: %+v", at, backups[at/10], list)
				}
				got = append(got, at/10)
			}
		}
		if d := cmp.Diff(slices.Sorted(slices.Values(blocks)), got); d != "" {
			t.Fatal(d)
		}
	})
}

// TestBlockCache loads a block once for all who ask at once, keeps the newest,
// and no failure.
func TestBlockCache(t *testing.T) {
	c := newBlockCache(2)
	loads := 0
	get := func(off uint64, err error) ([]byte, error) {
		return c.get(blockKey{nil, off}, func() ([]byte, error) {
			loads++
			return []byte{byte(off)}, err
		})
	}
	for i, step := range []struct {
		off   uint64
		err   error
		loads int
	}{{1, nil, 1}, {2, nil, 2}, {1, nil, 2}, {3, nil, 3}, {1, nil, 3}, {2, nil, 4}, {5, errBlock, 5}, {5, nil, 6}, {5, nil, 6}} {
		p, err := get(step.off, step.err)
		if !errors.Is(err, step.err) || err == nil && p[0] != byte(step.off) || loads != step.loads {
			t.Errorf("step %d: %v, %v, %d loads", i, p, err, loads)
		}
	}
	var all sync.WaitGroup
	entered, letGo := make(chan struct{}, 10), make(chan struct{})
	for range 10 {
		all.Go(func() {
			_, _ = c.get(blockKey{nil, 9}, func() ([]byte, error) {
				entered <- struct{}{}
				<-letGo
				return []byte{9}, nil
			})
		})
	}
	<-entered
	time.Sleep(10 * time.Millisecond)
	close(letGo)
	all.Wait()
	if len(entered) != 0 {
		t.Errorf("loaded %d times more", len(entered))
	}
}
