package fingerprint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxLayers is how long a backing chain may be; libvirt takes 200 layers,
	// and nobody has more than some.
	maxLayers = 64
	// granule is longer than a kernel's clock for stamps stands still: one tick,
	// which is 10 ms at most.
	granule = 20 * time.Millisecond
	// coarseGranule is the same for stamps of whole seconds.
	coarseGranule = time.Second + granule
)

// Take looks at a disk as it is now. It returns when ctx ends at the latest,
// also when storage does not answer: what was not seen by then is unreadable.
// A goroutine may be left behind, which ends when the storage answers.
//
// It returns no earlier than a later change gets a stamp of its own.
func Take(ctx context.Context, s Source) Disk {
	w := &walk{ctx: ctx, at: s.Path + s.Network}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.source(s)
		w.finish()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
	return Disk{Target: s.Target, Format: s.Format, Layers: w.end()}
}

// TakeAll looks at several disks at once, in their order.
func TakeAll(ctx context.Context, all []Source) []Disk {
	disks := make([]Disk, len(all))
	var taken sync.WaitGroup
	for i, s := range all {
		taken.Go(func() { disks[i] = Take(ctx, s) })
	}
	taken.Wait()
	return disks
}

// walk goes down a backing chain.
type walk struct {
	ctx    context.Context
	mu     sync.Mutex
	layers []Layer
	at     string // what is being looked at
	// finished tells that all was seen in time; ended, that it does not matter
	// any more.
	finished, ended bool
}

// end returns what was seen. What was seen too late is not trusted: it may be
// newer than who asks for it believes.
func (w *walk) end() []Layer {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ended = true
	if !w.finished {
		w.layers = append(w.layers, unreadable(w.at, context.Cause(w.ctx)))
	}
	return w.layers
}

func (w *walk) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finished = !w.ended && w.ctx.Err() == nil
}

func (w *walk) begin(path string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at = path
}

// add adds a layer that was looked at, and tells whether to go on.
func (w *walk) add(l Layer) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended || w.ctx.Err() != nil {
		return false
	}
	w.layers = append(w.layers, l)
	return l.Kind == KindFile || l.Kind == KindBlock
}

func (w *walk) source(s Source) {
	if s.Network != "" {
		w.add(Layer{Path: s.Network, Kind: KindNetwork, Identity: s.Network})
		return
	}
	w.chain(s.Path, s.Format)
	for _, b := range s.Backing {
		w.begin(b.Path + b.Network)
		l := Layer{Path: b.Network, Kind: KindNetwork, Identity: b.Network}
		if b.Network == "" {
			l, _, _ = look(b.Path, "raw")
		}
		if !w.has(l) && !w.add(l) {
			return
		}
	}
	w.settle()
}

// has tells whether a layer was seen already, maybe by another path.
func (w *walk) has(l Layer) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.layers, func(seen Layer) bool {
		return seen.Kind == l.Kind && seen.Device == l.Device && seen.Inode == l.Inode && seen.Identity == l.Identity &&
			(seen.Path == l.Path || l.Kind == KindFile || l.Kind == KindBlock)
	})
}

// chain looks at a file and at all that lies below it.
func (w *walk) chain(path, format string) {
	for n := 0; path != ""; n++ {
		w.begin(path)
		if n == maxLayers {
			w.add(unreadable(path, fmt.Errorf("the backing chain has more than %d files", maxLayers)))
			return
		}
		layer, below, err := look(path, format)
		if !w.add(layer) {
			return
		}
		if err != nil {
			w.add(unreadable(path, err))
			return
		}
		if below.data != "" {
			data := beside(path, below.data)
			w.begin(data)
			l := opaque(data)
			if l.Kind == "" {
				l, _, _ = look(data, "raw")
			}
			if !w.add(l) {
				return
			}
		}
		if below.backing == "" {
			return
		}
		path, format = beside(path, below.backing), below.format
		if l := opaque(path); l.Kind != "" {
			w.begin(path)
			w.add(l)
			return
		}
	}
}

// settle waits until a later change cannot have the stamp of one that was
// seen. Where stamps are too coarse to wait for, the layer counts as not seen.
func (w *walk) settle() {
	w.mu.Lock()
	var wait time.Duration
	now := time.Now()
	for i, l := range w.layers {
		age := now.Sub(time.Unix(0, l.Changed))
		switch {
		case l.Kind != KindFile:
		case coarse(l) && age < coarseGranule:
			w.layers[i] = unreadable(l.Path, errors.New("it was changed just now, and its stamps are of whole seconds"))
		case age < granule:
			// A clock of another host may be ahead of ours.
			wait = max(wait, min(granule, granule-age))
		}
	}
	w.mu.Unlock()
	select {
	case <-time.After(wait):
	case <-w.ctx.Done():
	}
}

func unreadable(path string, why error) Layer {
	if errors.Is(why, context.DeadlineExceeded) {
		why = errors.New("its storage did not answer in time")
	}
	return Layer{Path: path, Kind: KindUnreadable, Identity: why.Error()}
}

// opaque returns the layer that a name stands for which is no path; one
// without a kind for a path.
func opaque(name string) Layer {
	colon := strings.IndexByte(name, ':')
	if colon < 0 || strings.Contains(name[:colon], "/") {
		return Layer{}
	}
	return Layer{Path: name, Kind: KindNetwork, Identity: name}
}

// beside resolves the name of a backing file as QEMU does: beside the file
// that names it, whatever its path leads through.
func beside(path, name string) string {
	if file, ok := strings.CutPrefix(name, "file:"); ok {
		name = file
	}
	if filepath.IsAbs(name) || opaque(name).Kind != "" {
		return name
	}
	return path[:strings.LastIndexByte(path, '/')+1] + name
}

// look looks at one file or block device, and reads in its header what lies
// below if its format is one that has something below. An error is for that;
// where the file itself cannot be looked at, the layer says so.
func look(path, format string) (Layer, below, error) {
	if !filepath.IsAbs(path) {
		return unreadable(path, errors.New("it is no absolute path")), below{}, nil
	}
	// Of a share, what its server says now, and not what was kept of what it said
	// up to a minute ago: another host may have changed the file since.
	var st unix.Statx_t
	switch err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS, &st); {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return Layer{Path: path, Kind: KindMissing}, below{}, nil
	case err != nil:
		return unreadable(path, err), below{}, nil
	}
	layer := of(path, &st)
	if format != "qcow2" || layer.Kind != KindFile && layer.Kind != KindBlock {
		return layer, below{}, nil
	}
	// Not to wait for anything: not for who holds a lease, and not for another
	// end, should the file be a FIFO by now.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return layer, below{}, err
	}
	defer f.Close()
	var opened unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &opened); err != nil {
		return layer, below{}, err
	}
	if opened.Dev != unix.Mkdev(st.Dev_major, st.Dev_minor) || opened.Ino != st.Ino {
		return layer, below{}, errors.New("it was replaced while it was looked at")
	}
	b, err := readHeader(f)
	return layer, b, err
}

func of(path string, st *unix.Statx_t) Layer {
	nano := func(t unix.StatxTimestamp) int64 { return t.Sec*int64(time.Second) + int64(t.Nsec) }
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return Layer{
			Path: path, Kind: KindFile, Device: unix.Mkdev(st.Dev_major, st.Dev_minor), Inode: st.Ino, Size: int64(st.Size),
			Modified: nano(st.Mtime), Changed: nano(st.Ctime),
		}
	case unix.S_IFBLK:
		return block(path, unix.Mkdev(st.Rdev_major, st.Rdev_minor))
	}
	return unreadable(path, errors.New("it is neither a file nor a block device"))
}

// block returns the layer of a block device. Its number may be another one's
// after a boot, so what the device itself is known by is better, where there is
// such a thing (Documentation/ABI in the kernel's sources: sysfs-block, sysfs-block-dm).
func block(path string, rdev uint64) Layer {
	number := fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
	attribute := func(name string) string {
		text, _ := os.ReadFile("/sys/dev/block/" + number + "/" + name) // not all have all
		return strings.TrimSpace(string(text))
	}
	l := Layer{Path: path, Kind: KindBlock, Identity: "number " + number}
	for _, name := range []string{"dm/uuid", "wwid", "device/wwid", "loop/backing_file"} {
		if value := attribute(name); value != "" {
			l.Identity = name + " " + value
			break
		}
	}
	if sectors, err := strconv.ParseInt(attribute("size"), 10, 64); err == nil {
		l.Size = sectors * 512
	}
	return l
}
