package chain

import (
	"errors"
	"fmt"
	"slices"
)

var (
	// ErrUnknown says that a backup is not among those known.
	ErrUnknown = errors.New("no such backup")
	// ErrHasChildren says that increments build on a backup.
	ErrHasChildren = errors.New("increments build on it")
	// ErrRunning says that a backup is being made.
	ErrRunning = errors.New("backup is being made")
	// ErrGap says that a chain of images is not whole.
	ErrGap = errors.New("chain of images is not whole")
)

// Backup is what the rules need to know of one backup.
type Backup struct {
	ID     string
	Chain  string
	Parent string // "" for a full backup, and a failed one
	Kind   Kind
	State  BackupState
	Images []Image
}

// Image is one disk in a backup.
type Image struct {
	Target string // "vda"
	Kind   Kind
	Size   uint64 // bytes
}

// PlanDelete returns what goes when these backups are deleted, in the order in
// which it has to go: what builds on a backup before that backup. Unless
// withChildren is set it refuses (ErrHasChildren) to delete what others build
// on. backups has to hold all of the chains concerned.
func PlanDelete(backups []Backup, ids []string, withChildren bool) ([]string, error) {
	known, children := map[string]Backup{}, map[string][]string{}
	for _, b := range backups {
		known[b.ID] = b
		if b.Parent != "" {
			children[b.Parent] = append(children[b.Parent], b.ID)
		}
	}
	asked := map[string]bool{}
	for _, id := range ids {
		asked[id] = true
	}
	var order []string
	planned := map[string]bool{}
	var plan func(id string) error
	plan = func(id string) error {
		if planned[id] {
			return nil
		}
		planned[id] = true
		b, ok := known[id]
		if !ok {
			return fmt.Errorf("cannot delete backup %s: %w", id, ErrUnknown)
		}
		if b.State == Running {
			return fmt.Errorf("cannot delete backup %s: %w", id, ErrRunning)
		}
		for _, child := range children[id] {
			if !withChildren && !asked[child] {
				return fmt.Errorf("cannot delete backup %s: %w (%s)", id, ErrHasChildren, child)
			}
			if err := plan(child); err != nil {
				return err
			}
		}
		order = append(order, id)
		return nil
	}
	for _, id := range ids {
		if err := plan(id); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// DiskChain is where a disk's contents are.
type DiskChain struct {
	Target  string
	Size    uint64   // bytes
	Backups []string // whose images make it up: the backup's own first, a full one last
}

// PlanRestore returns the images that make up each disk of a backup. It refuses
// (ErrGap) when the backup is not complete, or one of them is missing or being
// deleted. A damaged one may be among them: nothing of its damage is seen in a
// backup that is complete. backups has to hold
// the backup and all that it builds on.
func PlanRestore(backups []Backup, id string) ([]DiskChain, error) {
	i := slices.IndexFunc(backups, func(b Backup) bool { return b.ID == id })
	if i < 0 {
		return nil, fmt.Errorf("cannot restore backup %s: %w", id, ErrUnknown)
	}
	var plan []DiskChain
	for _, image := range backups[i].Images {
		line, err := imageLine(backups, backups[i], image)
		if err != nil {
			return nil, fmt.Errorf("cannot restore disk %s of backup %s: %w", image.Target, id, err)
		}
		plan = append(plan, DiskChain{Target: image.Target, Size: image.Size, Backups: line})
	}
	return plan, nil
}

// imageLine follows an image down to the full one that it starts from.
func imageLine(backups []Backup, b Backup, image Image) ([]string, error) {
	var line []string
	for {
		if b.State != Complete && (b.State != Damaged || len(line) == 0) {
			return nil, fmt.Errorf("%w: backup %s is %s", ErrGap, b.ID, b.State)
		}
		if slices.Contains(line, b.ID) {
			return nil, fmt.Errorf("%w: backup %s builds on itself", ErrGap, b.ID)
		}
		line = append(line, b.ID)
		if image.Kind == Full {
			return line, nil
		}
		parent := slices.IndexFunc(backups, func(p Backup) bool { return p.ID == b.Parent })
		if parent < 0 {
			return nil, fmt.Errorf("%w: backup %s builds on %q, which is not there", ErrGap, b.ID, b.Parent)
		}
		below := slices.IndexFunc(backups[parent].Images, func(i Image) bool { return i.Target == image.Target })
		if below < 0 {
			return nil, fmt.Errorf("%w: backup %s has no image of it", ErrGap, b.Parent)
		}
		b, image = backups[parent], backups[parent].Images[below]
	}
}
