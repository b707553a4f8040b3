package repository

import (
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// tryName begins the name of what Try writes; the host's id follows.
const tryName = "try."

// Try writes a little, brings it to storage and removes it again: whether that
// can be done, neither the free space nor the flags of a file system tell.
func (r *Repository) Try() error {
	name := stagingName + "/" + tryName + r.host
	err := r.tree.mkdir(stagingName)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cannot write to repository %s: %w", r.id, err)
	}
	if err := ignoreMissing(r.tree.remove(name, 0)); err != nil {
		return fmt.Errorf("cannot write to repository %s: %w", r.id, err)
	}
	err = errors.Join(r.tree.writeNew(name, []byte(rand.Text())), ignoreMissing(r.tree.remove(name, 0)))
	if err != nil {
		return fmt.Errorf("cannot write to repository %s: %w", r.id, err)
	}
	return nil
}
