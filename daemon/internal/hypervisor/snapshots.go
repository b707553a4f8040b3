package hypervisor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// snapshotDirectory is where libvirt's system instance keeps what it knows of
// snapshots: a directory for each domain, by name, with a file for each.
const snapshotDirectory = "/var/lib/libvirt/qemu/snapshot"

// watchSnapshots publishes an EventSnapshot whenever libvirt writes down a
// snapshot, until ctx ends. libvirt has no event for that, and QEMU reverts to
// no internal snapshot while the image has a bitmap.
func (h *Hypervisor) watchSnapshots(ctx context.Context, directory string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("cannot watch for snapshots: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify") // reads of it end when it is closed
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	w := snapshotWatch{fd: fd, domains: map[int32]string{}}
	if w.root, err = w.add(directory); err != nil {
		return fmt.Errorf("cannot watch %s: %w", directory, err)
	}
	known, err := os.ReadDir(directory)
	if err != nil {
		return fmt.Errorf("cannot watch %s: %w", directory, err)
	}
	for _, d := range known {
		w.addDomain(directory, d.Name())
	}
	for buffer := make([]byte, 64<<10); ; {
		n, err := f.Read(buffer)
		if ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot watch %s: %w", directory, err)
		}
		for _, domain := range w.changed(buffer[:n], directory) {
			h.subs.publish(Event{Kind: EventSnapshot, Name: domain})
		}
	}
}

// snapshotWatch knows which watch is on which directory.
type snapshotWatch struct {
	fd      int
	root    int32
	domains map[int32]string // names, by watch
}

func (w *snapshotWatch) add(path string) (int32, error) {
	wd, err := unix.InotifyAddWatch(w.fd, path, unix.IN_CREATE|unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_ONLYDIR)
	return int32(wd), err
}

// addDomain does nothing for what is no directory, or gone again.
func (w *snapshotWatch) addDomain(directory, name string) bool {
	wd, err := w.add(filepath.Join(directory, name))
	if err == nil {
		w.domains[wd] = name
	}
	return err == nil
}

// changed returns the names of the domains that events (inotify(7)) are about.
func (w *snapshotWatch) changed(events []byte, directory string) (names []string) {
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		length := binary.NativeEndian.Uint32(events[12:])
		file := strings.TrimRight(string(events[unix.SizeofInotifyEvent:][:length]), "\x00")
		events = events[unix.SizeofInotifyEvent+length:]
		domain, known := w.domains[wd]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			names = append(names, "") // of any domain
		case mask&unix.IN_IGNORED != 0:
			delete(w.domains, wd)
		case wd == w.root && w.addDomain(directory, file):
			names = append(names, file) // something may be in it already
		case known && mask&(unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO) != 0:
			names = append(names, domain)
		}
	}
	return names
}
