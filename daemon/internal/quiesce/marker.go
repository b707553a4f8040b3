package quiesce

import (
	"encoding/json"
	"errors"
	"fmt"
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
}

// heldMarker is an open marker file. Its lock is held by whoever is
// responsible for the guest.
type heldMarker struct {
	Marker
	path string
	file *os.File
}

var uuidName = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// createMarker writes a marker and locks it. There must be none for the
// domain: a leftover one is still somebody's work.
func createMarker(directory string, m Marker) (*heldMarker, error) {
	if !uuidName.MatchString(m.UUID) {
		return nil, fmt.Errorf("%q is not a domain's UUID", m.UUID)
	}
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the markers' directory: %w", err)
	}
	content, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("cannot write a marker: %w", err)
	}
	// Locked before it has its name: nobody may see it without its lock.
	tmp, err := os.CreateTemp(directory, ".new-*")
	if err != nil {
		return nil, fmt.Errorf("cannot make a marker: %w", err)
	}
	h := &heldMarker{Marker: m, path: filepath.Join(directory, m.UUID), file: tmp}
	_, err = tmp.Write(content)
	if err == nil {
		err = unix.Flock(int(tmp.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err == nil {
		err = os.Link(tmp.Name(), h.path)
	}
	if err := errors.Join(err, os.Remove(tmp.Name())); err != nil {
		h.unlock()
		if errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("domain %s is still being thawed from before: %w", m.UUID, err)
		}
		return nil, fmt.Errorf("cannot make a marker: %w", err)
	}
	return h, nil
}

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
