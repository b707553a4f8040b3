package repository

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// idJob is the job that rewrites.
const idJob = "01JDDDDDDDDDDDDDDDDDDDDDDD"

// rewritten are other contents for some files of a backup, as of a merge.
func rewritten(backup string) map[string][]byte {
	return map[string][]byte{
		"vda.qcow2":   []byte("all of vda of " + backup + ", without its parent"),
		"vda.digests": []byte("other digests of " + backup),
	}
}

// rewriteManifest is the manifest of a backup without a parent any more.
func rewriteManifest(m Manifest, backup string) *Manifest {
	m.Parent, m.Kind = "", KindFull
	m.Disks = append([]Disk(nil), m.Disks...)
	m.Files = append([]File(nil), m.Files...)
	for i, d := range m.Disks {
		m.Disks[i].Kind, m.Disks[i].Changes = KindFull, ""
		if content, ok := rewritten(backup)[d.File]; ok {
			m.Disks[i].StoredBytes = uint64(len(content))
		}
	}
	for i, f := range m.Files {
		if content, ok := rewritten(backup)[f.Name]; ok {
			m.Files[i].Size = uint64(len(content))
		}
	}
	return &m
}

func rewrite(ctx context.Context, r *Repository, backup string) error {
	c, err := r.Claim(testDomain, idJob)
	if err != nil {
		return err
	}
	w, err := writeAnew(r, c, backup)
	if err != nil {
		return err
	}
	if err := w.Commit(ctx, rewriteManifest(*w.Manifest(), backup)); err != nil {
		return errors.Join(err, w.Discard(), c.Release())
	}
	return c.Release()
}

// writeAnew makes the new files.
func writeAnew(r *Repository, c *Claim, backup string) (*Rewrite, error) {
	w, err := r.Rewrite(c, backup)
	if err != nil {
		return nil, err
	}
	for name, content := range rewritten(backup) {
		f, err := w.Create(name)
		if err != nil {
			return nil, err
		}
		_, err = f.Write(content)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// merge has a backup stand on its parent no more, and deletes that.
func merge(ctx context.Context, r *Repository) error {
	if err := rewrite(ctx, r, idB); err != nil {
		return err
	}
	c, err := r.Claim(testDomain, idJob)
	if err != nil {
		return err
	}
	return errors.Join(r.Delete(ctx, c, testDomain, idA), c.Release())
}

// isOneOrTheOther checks that a backup's files are all the old ones or all the
// new ones, and fit its manifest; it returns whether they are new.
func isOneOrTheOther(t *testing.T, r *Repository, backup string) bool {
	t.Helper()
	m, err := r.Manifest(testDomain, backup)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Check(m); err != nil {
		t.Fatal(err)
	}
	for name, content := range testFiles(backup) {
		if other, ok := rewritten(backup)[name]; ok && m.Generation > 0 {
			content = other
		}
		f, err := r.OpenImage(testDomain, backup, name)
		if err != nil {
			t.Fatal(err)
		}
		stored, err := io.ReadAll(f)
		if err := errors.Join(err, f.Close()); err != nil || !bytes.Equal(stored, content) {
			t.Fatalf("%s of generation %d is %q, %v", name, m.Generation, stored, err)
		}
	}
	return m.Generation > 0
}

// plainNamesOnly checks that no file waits for its name.
func plainNamesOnly(t *testing.T, root string) {
	t.Helper()
	for _, f := range listFiles(t, root) {
		if strings.Contains(f, generationMark) {
			t.Errorf("%s is left", f)
		}
	}
}

func TestRewrite(t *testing.T) {
	root := prepared(t, idA, idB)
	r := open(t, root, ourKey)
	if err := rewrite(t.Context(), r, idB); err != nil {
		t.Fatal(err)
	}
	if !isOneOrTheOther(t, r, idB) {
		t.Error("the files are the old ones")
	}
	plainNamesOnly(t, root)
	// Nothing builds on the parent any more.
	c, err := r.Claim(testDomain, idA)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Delete(t.Context(), c, testDomain, idA), c.Release()); err != nil {
		t.Fatal(err)
	}
	isOneOrTheOther(t, r, idB)
	if err := rewrite(t.Context(), r, idB); err != nil { // once more
		t.Fatal(err)
	}
	if m, err := r.Manifest(testDomain, idB); err != nil || m.Generation != 2 {
		t.Errorf("%+v, %v", m, err)
	}
	plainNamesOnly(t, root)
}

func TestRewriteThatIsCancelled(t *testing.T) {
	root := prepared(t, idA, idB)
	r := open(t, root, ourKey)
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	cancel(stop)
	if err := rewrite(ctx, r, idB); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	checkWhole(t, root, r, idA, idB)
}

func TestRewriteRefusesWhatDoesNotFit(t *testing.T) {
	root := prepared(t, idA, idB)
	r := open(t, root, ourKey)
	c, err := r.Claim(testDomain, idB)
	if err != nil {
		t.Fatal(err)
	}
	w, err := r.Rewrite(c, idB)
	if err != nil {
		t.Fatal(err)
	}
	f, err := w.Create("vda.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("short"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := w.Commit(t.Context(), rewriteManifest(*w.Manifest(), idB)); !errors.Is(err, ErrDamaged) {
		t.Errorf("a file of another size: %v", err)
	}
	if err := errors.Join(w.Discard(), c.Release()); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, root, r, idA, idB)
	other := open(t, root, otherKey)
	if c, err = other.Claim(testDomain, idB); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Rewrite(c, idB); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("another host's: %v", err)
	}
}

// TestRewriteIsNotCollected clears up, and looks at the backup, while a job writes
// its files anew: the check of a repository waits for no job.
func TestRewriteIsNotCollected(t *testing.T) {
	root := prepared(t, idA, idB)
	r := open(t, root, ourKey)
	c, err := r.Claim(testDomain, idJob)
	if err != nil {
		t.Fatal(err)
	}
	w, err := writeAnew(r, c, idB)
	if err != nil {
		t.Fatal(err)
	}
	live := func(id string) bool { return id == idJob }
	stop, done := make(chan struct{}), make(chan error, 2)
	for _, f := range []func() error{
		func() error { return r.Collect(t.Context(), live) },
		func() error { _, err := r.Whole(testDomain, idB); return err },
	} {
		go func() {
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if err := f(); err != nil {
					done <- err
					return
				}
			}
		}()
	}
	for range 50 {
		if err := w.Commit(t.Context(), rewriteManifest(*w.Manifest(), idB)); err != nil {
			t.Fatal(err)
		}
		if w, err = writeAnew(r, c, idB); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := errors.Join(<-done, <-done, w.Discard(), c.Release()); err != nil {
		t.Fatal(err)
	}
	if !isOneOrTheOther(t, r, idB) {
		t.Error("the files are the old ones")
	}
	plainNamesOnly(t, root)
}

// TestKilledInMerge kills who merges and deletes: what is there before anything
// was cleared up can be restored.
func TestKilledInMerge(t *testing.T) {
	t.Parallel()
	eachKill(t, "merge", func() string { return prepared(t, idA, idB) }, func(root string) {
		r := open(t, root, ourKey)
		backups, err := r.Backups(testDomain)
		if err != nil || !slices.Contains(backups, idB) {
			t.Fatalf("%v are there (error %v)", backups, err)
		}
		isNew := isOneOrTheOther(t, r, idB)
		plain, err := os.ReadFile(filepath.Join(root, testDomain, idB, "vda.qcow2"))
		if err != nil {
			t.Fatal(err)
		}
		if needed := !isNew || bytes.Equal(plain, testFiles(idB)["vda.qcow2"]); needed && !slices.Contains(backups, idA) {
			t.Fatal("the parent is gone, and is needed")
		}
		if err := r.Collect(t.Context(), func(string) bool { return false }); err != nil {
			t.Fatal(err)
		}
		if isOneOrTheOther(t, r, idB) != isNew {
			t.Fatal("it changed while it was cleared up")
		}
		for _, n := range listFiles(t, root) {
			if strings.Contains(n, generationMark) || strings.Contains(n, ownerName) {
				t.Fatalf("%s is left", n)
			}
		}
	})
}

func TestKilledInRewrite(t *testing.T) {
	t.Parallel()
	old, now := 0, 0
	eachKill(t, "rewrite", func() string { return prepared(t, idA, idB) }, func(root string) {
		r := open(t, root, ourKey)
		isNew := isOneOrTheOther(t, r, idB)
		if isNew {
			now++
		} else {
			old++
		}
		// As QEMU finds it, by name alone: either, but nothing else.
		for name, content := range rewritten(idB) {
			stored, err := os.ReadFile(filepath.Join(root, testDomain, idB, name))
			if err != nil || !bytes.Equal(stored, content) && !bytes.Equal(stored, testFiles(idB)[name]) {
				t.Fatalf("%s is %q, %v", name, stored, err)
			}
		}
		if err := r.Collect(t.Context(), func(string) bool { return false }); err != nil {
			t.Fatal(err)
		}
		if isOneOrTheOther(t, r, idB) != isNew {
			t.Error("collecting changed which files count")
		}
		plainNamesOnly(t, root)
		if err := rewrite(t.Context(), r, idB); err != nil {
			t.Fatal(err)
		}
		isOneOrTheOther(t, r, idB)
		plainNamesOnly(t, root)
	})
	if old == 0 || now == 0 {
		t.Errorf("%d kills were before the commit and %d after it", old, now)
	}
}
