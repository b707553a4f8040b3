package quiesce

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// Marker is the content of a marker file: somebody may be holding this guest.
type Marker struct {
	UUID     string    `json:"uuid"`
	Mode     Mode      `json:"mode"`
	Deadline time.Time `json:"deadline"` // when the watchdog stops waiting for the daemon
	Held     bool      `json:"held"`     // the call that holds the guest has returned: it cannot take effect later
}

// heldMarker is an open marker file. Its lock is held by whoever is
// responsible for the guest.
type heldMarker struct {
	Marker
	path string
	file *os.File
}

var uuidName = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// errBusy says that there is a marker for the domain already.
var errBusy = errors.New("the guest is still being thawed from before")

// createMarker writes a marker and locks it. It has its lock and its content
// before it has its name, so that nobody sees it without, and a crash in
// between leaves nothing. The error is errBusy when there is one.
func createMarker(directory string, m Marker) (*heldMarker, error) {
	if !uuidName.MatchString(m.UUID) {
		return nil, fmt.Errorf("%q is not a domain's UUID", m.UUID)
	}
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the markers' directory: %w", err)
	}
	file, err := os.OpenFile(directory, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot make a marker: %w", err)
	}
	h := &heldMarker{Marker: m, path: filepath.Join(directory, m.UUID), file: file}
	err = h.write()
	if err == nil {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		// See open(2), O_TMPFILE.
		err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", file.Fd()), unix.AT_FDCWD, h.path, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
		h.unlock()
		if errors.Is(err, unix.EEXIST) {
			return nil, errBusy
		}
		return nil, fmt.Errorf("cannot make a marker: %w", err)
	}
	return h, nil
}

func (h *heldMarker) write() error {
	content, err := json.Marshal(h.Marker)
	if err == nil {
		_, err = h.file.WriteAt(content, 0)
	}
	if err == nil {
		err = h.file.Truncate(int64(len(content)))
	}
	return err
}

// markHeld notes that the guest is held now.
func (h *heldMarker) markHeld() error {
	h.Held = true
	return h.write()
}

// reread takes over what the former holder noted. When that cannot be read it
// died while it wrote, and the guest counts as being held still.
func (h *heldMarker) reread() {
	var m Marker
	if err := json.NewDecoder(io.NewSectionReader(h.file, 0, maximumMarker)).Decode(&m); err == nil {
		h.Held = m.Held
	}
}

const maximumMarker = 4096 // bytes

// openMarker opens a marker without locking it.
func openMarker(path string) (*heldMarker, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot open the marker: %w", err)
	}
	h := &heldMarker{path: path, file: f}
	if err := json.NewDecoder(f).Decode(&h.Marker); err != nil {
		h.unlock()
		return nil, fmt.Errorf("cannot read the marker %s: %w", path, err)
	}
	return h, nil
}

func (h *heldMarker) tryLock() (bool, error) {
	err := unix.Flock(int(h.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	}
	return err == nil, err
}

// present tells whether the file is still the marker of its name.
func (h *heldMarker) present() bool {
	mine, err := h.file.Stat()
	if err != nil {
		return false
	}
	named, err := os.Lstat(h.path)
	return err == nil && os.SameFile(mine, named)
}

// remove ends the marker. Only the holder of the lock calls it.
func (h *heldMarker) remove() error {
	if !h.present() {
		return nil
	}
	if err := os.Remove(h.path); err != nil {
		return fmt.Errorf("cannot remove the marker: %w", err)
	}
	return nil
}

func (h *heldMarker) unlock() { _ = h.file.Close() }

// markers lists the marker files in a directory that may not exist.
func markers(directory string) ([]string, error) {
	entries, err := os.ReadDir(directory)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the markers: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if uuidName.MatchString(e.Name()) {
			paths = append(paths, filepath.Join(directory, e.Name()))
		}
	}
	return paths, nil
}
