package repository

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

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
	c, err := r.Claim(testDomain, backup)
	if err != nil {
		return err
	}
	w, err := r.Rewrite(testDomain, backup)
	if err != nil {
		return err
	}
	for name, content := range rewritten(backup) {
		f, err := w.Create(name)
		if err != nil {
			return err
		}
		_, err = f.Write(content)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	if err := w.Commit(ctx, c, rewriteManifest(*w.Manifest(), backup)); err != nil {
		return errors.Join(err, w.Discard(), c.Release())
	}
	return c.Release()
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
	w, err := r.Rewrite(testDomain, idB)
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
	if err := w.Commit(t.Context(), c, rewriteManifest(*w.Manifest(), idB)); !errors.Is(err, ErrDamaged) {
		t.Errorf("a file of another size: %v", err)
	}
	if err := errors.Join(w.Discard(), c.Release()); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, root, r, idA, idB)
	if _, err := open(t, root, otherKey).Rewrite(testDomain, idB); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("another host's: %v", err)
	}
}

func TestKilledInRewrite(t *testing.T) {
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
