//go:build lab

package labtest

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// addRepository adds a repository called name, and returns why there is none.
func (h *host) addRepository(name, typ, path string, o dbus.CreateRepositoryOptions) error {
	h.t.Helper()
	_, job, err := h.CreateRepository(h.t.Context(), name, typ, path, o)
	return h.outcome(job, err)
}

func makeDirectory(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestInputRepositories adds what cannot be one. No such repository stays.
func TestInputRepositories(t *testing.T) {
	h, base := newHost(t), fresh(t, "/srv")
	strange := makeDirectory(t, filepath.Join(base, "strange"))
	newer := makeDirectory(t, filepath.Join(base, "newer"))
	readOnly := makeDirectory(t, filepath.Join(base, "read-only"))
	for file, text := range map[string]string{
		filepath.Join(strange, "a"):                        "somebody's",
		filepath.Join(newer, "virtbackup-repository.json"): `{"format": 99, "id": "01JD8Q4M6Z3V5W7X9YABCDEFGH"}`,
		filepath.Join(base, "file"):                        "no directory",
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	command(t, "", "mount", "-t", "tmpfs", "-o", "ro", "test", readOnly)
	t.Cleanup(func() { command(t, "", "umount", readOnly) })
	if err := os.Symlink(strange, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	empty := makeDirectory(t, filepath.Join(base, "empty"))
	for _, c := range []struct {
		what, typ, path string
		existing        bool
		name            dbus.ErrorName
		words           []string
	}{
		{"of no known type", "tape", empty, false, dbus.ErrInvalidArgument, []string{`"tape"`, "dir"}},
		{"no address", "nfs", empty, false, dbus.ErrInvalidArgument, []string{"no address", "nfs"}},
		{"relative", "dir", "srv/x", false, dbus.ErrInvalidArgument, []string{`"srv/x"`, "absolute"}},
		{"empty path", "dir", "", false, dbus.ErrInvalidArgument, []string{"absolute"}},
		{"the root", "dir", "/", false, dbus.ErrInvalidArgument, []string{"root"}},
		{"with ..", "dir", base + "/../x", false, dbus.ErrInvalidArgument, []string{".."}},
		{"with a slash at its end", "dir", empty + "/", false, dbus.ErrInvalidArgument, []string{"absolute"}},
		{"missing", "dir", filepath.Join(base, "missing"), false, dbus.ErrRepositoryUnavailable, []string{"missing", "does not exist"}},
		{"missing, with a newline", "dir", filepath.Join(base, "a\nb"), false, dbus.ErrRepositoryUnavailable, []string{"does not exist"}},
		{"a file", "dir", filepath.Join(base, "file"), false, dbus.ErrRepositoryUnavailable, []string{"file"}},
		{"a link to what is not empty", "dir", filepath.Join(base, "link"), false, dbus.ErrRepositoryUnavailable, []string{"not empty"}},
		{"not empty", "dir", strange, false, dbus.ErrRepositoryUnavailable, []string{"strange", "not empty"}},
		{"not a repository", "dir", empty, true, dbus.ErrRepositoryUnavailable, []string{"not a virtbackup repository"}},
		{"of a newer format", "dir", newer, true, dbus.ErrRepositoryUnavailable, []string{"newer"}},
		{"of a newer format, to be made", "dir", newer, false, dbus.ErrRepositoryUnavailable, []string{"newer"}},
		{"read-only", "dir", readOnly, false, dbus.ErrRepositoryUnavailable, []string{"read-only"}},
	} {
		err := h.addRepository("strange", c.typ, c.path, dbus.CreateRepositoryOptions{Existing: c.existing})
		refuses(t, c.what, err, c.name, c.words...)
		if _, err := h.FindRepository(t.Context(), "strange"); err == nil {
			t.Errorf("%s: it was added", c.what)
		}
	}
	if left, err := os.ReadDir(strange); err != nil || len(left) != 1 {
		t.Errorf("the strange directory holds %v, %v", left, err)
	}
}

// TestInputRepositoryChanges is a good repository that is not what it was.
func TestInputRepositoryChanges(t *testing.T) {
	base := fresh(t, "/srv")
	name := filepath.Base(base)
	h := newHostAt(t, makeDirectory(t, filepath.Join(base, name+"-used")))
	other := newHostAt(t, makeDirectory(t, filepath.Join(base, name+"-other")))
	g := startBare(t, "input-changes", bareDisk(t, "vda", "qcow2", ""))
	b := h.backup(g, dbus.BackupOptions{})
	header := filepath.Join(h.path, "virtbackup-repository.json")
	aside := h.path + ".aside"
	swap := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		what     string
		do, undo func()
		words    []string
	}{
		{"missing", func() { swap(h.path, aside) }, func() { swap(aside, h.path) }, []string{"does not exist"}},
		{"another at its place", func() { swap(h.path, aside); swap(other.path, h.path) }, func() { swap(h.path, other.path); swap(aside, h.path) }, []string{"holds the repository"}},
		{"none any more", func() { swap(header, aside) }, func() { swap(aside, header) }, []string{"not a virtbackup repository"}},
		{"a link to another", func() {
			swap(h.path, aside)
			if err := os.Symlink(other.path, h.path); err != nil {
				t.Fatal(err)
			}
		}, func() { _ = os.Remove(h.path); swap(aside, h.path) }, []string{"holds the repository"}},
		{"read-only", func() {
			command(t, "", "mount", "--bind", h.path, h.path)
			command(t, "", "mount", "-o", "remount,bind,ro", h.path)
		}, func() { command(t, "", "umount", h.path) }, []string{"read-only"}},
	} {
		c.do()
		err := h.try(g, dbus.BackupOptions{})
		refuses(t, c.what+", backup", err, dbus.ErrRepositoryUnavailable, append(c.words, h.offering)...)
		if c.what != "read-only" {
			err = h.outcome(h.RestoreBackup(t.Context(), b.ID, "input-changes-2", dbus.RestoreOptions{}))
			refuses(t, c.what+", restore", err, dbus.ErrRepositoryUnavailable, append(c.words, h.offering)...)
		}
		err = h.outcome(h.CheckRepository(t.Context(), h.repository, dbus.CheckRepositoryOptions{}))
		refuses(t, c.what+", check", err, dbus.ErrRepositoryUnavailable, append(c.words, h.offering)...)
		c.undo()
	}
	if err := h.outcome(h.CheckRepository(t.Context(), h.repository, dbus.CheckRepositoryOptions{})); err != nil {
		t.Errorf("as it was: %v", err)
	}
	want := g.snapshot()
	b = h.backup(g, dbus.BackupOptions{})
	if b.Kind != dbus.KindIncremental {
		t.Errorf("as it was, the backup is %s: %v", b.Kind, b.Causes)
	}
	h.chainIsExact(b, want)
}
