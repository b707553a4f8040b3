package repository

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"
)

const (
	testDomain = "6c1fc1a8-7c3f-4a0e-9a39-0f0c2a1f6b11"
	idA        = "01JAAAAAAAAAAAAAAAAAAAAAAA"
	idB        = "01JBBBBBBBBBBBBBBBBBBBBBBB"
	idC        = "01JCCCCCCCCCCCCCCCCCCCCCCC"
)

var (
	ourKey   = bytes.Repeat([]byte{7}, 32)
	otherKey = bytes.Repeat([]byte{8}, 32)
)

func newRepository(t *testing.T) (string, *Repository) {
	t.Helper()
	root := t.TempDir()
	id, err := Init(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	r := open(t, root, ourKey)
	if r.ID() != id {
		t.Fatalf("id is %s, Init said %s", r.ID(), id)
	}
	return root, r
}

func open(t *testing.T, root string, key []byte) *Repository {
	t.Helper()
	r, err := Open(root, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// testFiles is the content of the files of a test backup.
func testFiles(backup string) map[string][]byte {
	return map[string][]byte{
		"vda.qcow2":   []byte("image of " + backup),
		"vda.digests": []byte("digests of " + backup),
		"domain.xml":  []byte("<domain/>"),

		"tpm/tpm2-00.permall": []byte("state"),
	}
}

func testManifest(backup, parent string) *Manifest {
	kind := KindFull
	if parent != "" {
		kind = KindIncremental
	}
	m := &Manifest{
		Domain: Domain{UUID: testDomain, Name: "web <1> & \"co\""}, Backup: backup, Parent: parent, Chain: idA, Kind: kind,
		Created: 1, Finished: 2, HostName: "host", Version: "0.1.0", Quiesce: "agent", Consistency: ConsistencyFilesystem,
	}
	for name, content := range testFiles(backup) {
		sum := blake3.Sum256(content)
		if name == "vda.qcow2" {
			m.Disks = []Disk{{Target: "vda", File: name, Size: 1 << 20, StoredBytes: uint64(len(content)),
				Kind: kind, Tracking: "cbt", Format: "qcow2", DigestRoot: hex.EncodeToString(sum[:])}}
			continue
		}
		m.Files = append(m.Files, File{name, uint64(len(content)), hex.EncodeToString(sum[:])})
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return m
}

// stageFiles stages a backup with all its files.
func stageFiles(r *Repository, backup string) (*Stage, error) {
	s, err := r.Stage(backup)
	if err != nil {
		return nil, err
	}
	for name, content := range testFiles(backup) {
		f, err := s.Create(name)
		if err != nil {
			return s, err
		}
		_, err = f.Write(content)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return s, err
		}
	}
	return s, nil
}

func makeBackup(ctx context.Context, r *Repository, backup, parent string) error {
	c, err := r.Claim(testDomain, backup)
	if err != nil {
		return err
	}
	s, err := stageFiles(r, backup)
	if err != nil {
		return err
	}
	if err := s.Commit(ctx, c, testManifest(backup, parent)); err != nil {
		return errors.Join(err, s.Discard(), c.Release())
	}
	return c.Release()
}

func mustBackup(t *testing.T, r *Repository, backup, parent string) {
	t.Helper()
	if err := makeBackup(t.Context(), r, backup, parent); err != nil {
		t.Fatal(err)
	}
}

// checkWhole checks that exactly these backups are committed, whole, and that
// nothing else is in the repository.
func checkWhole(t *testing.T, root string, r *Repository, backups ...string) {
	t.Helper()
	got, err := r.Backups(testDomain)
	if err != nil || !slices.Equal(got, backups) {
		t.Fatalf("backups are %v, want %v (error %v)", got, backups, err)
	}
	want := []string{repositoryName}
	for _, b := range backups {
		m, err := r.Manifest(testDomain, b)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Check(m); err != nil {
			t.Fatal(err)
		}
		for name, content := range testFiles(b) {
			f, err := r.OpenImage(testDomain, b, name)
			if err != nil {
				t.Fatal(err)
			}
			stored, err := io.ReadAll(f)
			if err := errors.Join(err, f.Close()); err != nil || !bytes.Equal(stored, content) {
				t.Fatalf("%s of %s is %q (error %v)", name, b, stored, err)
			}
			want = append(want, testDomain+"/"+b+"/"+name)
		}
		want = append(want, testDomain+"/"+b+"/"+manifestName)
	}
	slices.Sort(want)
	if files := listFiles(t, root); !slices.Equal(files, want) {
		t.Fatalf("the repository holds\n%s\nwant\n%s", strings.Join(files, "\n"), strings.Join(want, "\n"))
	}
	if len(backups) == 0 {
		if _, err := os.Lstat(filepath.Join(root, testDomain)); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("an empty directory is left: %v", err)
		}
	}
}

func listFiles(t *testing.T, root string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && (!d.IsDir() || filepath.Dir(p) == filepath.Join(root, stagingName)) {
			rel, _ := filepath.Rel(root, p)
			files = append(files, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	return files
}

func TestCommitListDelete(t *testing.T) {
	root, r := newRepository(t)
	mustBackup(t, r, idA, "")
	mustBackup(t, r, idB, idA)
	checkWhole(t, root, r, idA, idB)
	m, err := r.Manifest(testDomain, idB)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.Backing(m.Disks[0]); got != "../"+idA+"/vda.qcow2" {
		t.Errorf("backing is %q", got)
	}
	if domains, err := r.Domains(); err != nil || !slices.Equal(domains, []string{testDomain}) {
		t.Errorf("domains are %v, %v", domains, err)
	}
	c, err := r.Claim(testDomain, idC)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Delete(t.Context(), c, testDomain, idA); !errors.Is(err, ErrHasChildren) {
		t.Errorf("deleting a parent: %v", err)
	}
	for _, id := range []string{idB, idA} {
		if err := r.Delete(t.Context(), c, testDomain, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Delete(t.Context(), c, testDomain, idA); !errors.Is(err, ErrNoBackup) {
		t.Errorf("deleting again: %v", err)
	}
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, root, r)
}

func TestInitAndOpenRefuse(t *testing.T) {
	root, _ := newRepository(t)
	if _, err := Init(t.Context(), root); !errors.Is(err, ErrExists) {
		t.Errorf("Init of a repository: %v", err)
	}
	full := t.TempDir()
	write(t, filepath.Join(full, "precious"), "x")
	if _, err := Init(t.Context(), full); !errors.Is(err, ErrNotEmpty) {
		t.Errorf("Init of a full directory: %v", err)
	}
	if _, err := Open(full, ourKey); !errors.Is(err, ErrNotRepository) {
		t.Errorf("Open of another directory: %v", err)
	}
	for _, missing := range []string{filepath.Join(full, "none"), filepath.Join(full, "precious")} {
		if _, err := Open(missing, ourKey); !errors.Is(err, ErrMissing) {
			t.Errorf("Open of %s: %v", missing, err)
		}
		if _, err := Init(t.Context(), missing); !errors.Is(err, ErrMissing) {
			t.Errorf("Init of %s: %v", missing, err)
		}
	}
	header := filepath.Join(root, repositoryName)
	for content, want := range map[string]error{
		`{"format":2,"id":"x","new":[]}`: ErrNewerFormat,
		`{"format":1,"id":"../x"}`:       ErrNotRepository,
		`{"format":1`:                    ErrNotRepository,
		``:                               ErrNotRepository,
	} {
		write(t, header, content)
		if _, err := Open(root, ourKey); !errors.Is(err, want) {
			t.Errorf("Open with %s: %v", content, err)
		}
	}
	if err := os.Remove(header); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(header, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(root, ourKey); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("Open with a FIFO: %v", err)
	}
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNamesAreRefused(t *testing.T) {
	root, r := newRepository(t)
	outside := filepath.Join(filepath.Dir(root), "outside")
	bad := []string{"", ".", "..", "../outside", "a/b", "/etc/passwd", "a\x00b", "a\nb", "a b", "-x", strings.Repeat("a", 300),
		"..\\x", "é", "vda.qcow2/../../x", "tpm/", "tpm/..", "tpm/../x", "tpm//x", "tpm/a/b", "/tpm/x", manifestName, pendingName}
	s, err := r.Stage(idA)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range bad {
		if f, err := s.Create(name); err == nil {
			f.Close()
			t.Errorf("Create(%q) succeeded", name)
		}
		if _, err := r.OpenImage(testDomain, idA, name); err == nil {
			t.Errorf("OpenImage(%q) succeeded", name)
		}
		if _, err := r.Stage(name); err == nil {
			t.Errorf("Stage(%q) succeeded", name)
		}
		if _, err := r.Backups(name); err == nil {
			t.Errorf("Backups(%q) succeeded", name)
		}
		if _, err := r.Claim(name, idA); err == nil {
			t.Errorf("Claim(%q) succeeded", name)
		}
		if _, err := r.Manifest(testDomain, name); err == nil {
			t.Errorf("Manifest(%q) succeeded", name)
		}
		if err := r.Discard(testDomain, name); err == nil {
			t.Errorf("Discard(%q) succeeded", name)
		}
	}
	if _, err := os.Lstat(outside); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("something was made outside: %v", err)
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	checkWhole(t, root, r)
}

// TestLinksAreNotFollowed puts a link in each place of a committed backup.
func TestLinksAreNotFollowed(t *testing.T) {
	for _, place := range []string{testDomain, testDomain + "/" + idA, testDomain + "/" + idA + "/" + manifestName} {
		root, r := newRepository(t)
		mustBackup(t, r, idA, "")
		outside := filepath.Join(t.TempDir(), "moved")
		if err := os.Rename(filepath.Join(root, place), outside); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outside, filepath.Join(root, place)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Manifest(testDomain, idA); err == nil {
			t.Errorf("the manifest was read through a link at %s", place)
		}
		if place != testDomain+"/"+idA+"/"+manifestName {
			if _, err := r.OpenImage(testDomain, idA, "vda.qcow2"); err == nil {
				t.Errorf("the image was read through a link at %s", place)
			}
		}
		before := listFiles(t, outside)
		if err := r.Collect(t.Context(), func(string) bool { return false }); err == nil && place == testDomain {
			t.Error("Collect went through a link without a word")
		}
		if after := listFiles(t, outside); !slices.Equal(before, after) {
			t.Errorf("Collect removed files behind the link at %s", place)
		}
	}
	root, r := newRepository(t)
	if err := os.Remove(filepath.Join(root, stagingName)); err != nil {
		t.Fatal(err)
	}
	outside := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(root, stagingName)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Stage(idA); err == nil || len(listFiles(t, outside)) > 0 {
		t.Errorf("staged behind a link: %v", err)
	}
}

func TestManifestIsAuthentic(t *testing.T) {
	root, r := newRepository(t)
	mustBackup(t, r, idA, "")
	name := filepath.Join(root, testDomain, idA, manifestName)
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		write(t, name, string(good[:i]))
		if _, err := r.Manifest(testDomain, idA); !errors.Is(err, ErrManifest) {
			t.Fatalf("truncated to %d bytes: %v", i, err)
		}
		flipped := bytes.Clone(good)
		flipped[i] ^= 1
		write(t, name, string(flipped))
		if m, err := r.Manifest(testDomain, idA); err == nil {
			t.Fatalf("byte %d (%q) changed, and accepted: %+v", i, good[i], m)
		}
	}
	for what, forged := range map[string][]byte{
		"trailing space":   append(bytes.Clone(good), ' '),
		"doubled member":   bytes.Replace(good, []byte(`"format"`), []byte(`"format": 1, "format"`), 1),
		"unknown member":   bytes.Replace(good, []byte(`"format"`), []byte(`"x": 1, "format"`), 1),
		"other upper case": bytes.Replace(good, []byte(`"format"`), []byte(`"Format"`), 1),
	} {
		write(t, name, string(forged))
		if _, err := r.Manifest(testDomain, idA); !errors.Is(err, ErrManifest) {
			t.Errorf("%s: %v", what, err)
		}
	}
	write(t, name, string(bytes.Replace(good, []byte(`"format": 1`), []byte(`"format": 2`), 1)))
	if _, err := r.Manifest(testDomain, idA); !errors.Is(err, ErrNewerFormat) {
		t.Errorf("newer format: %v", err)
	}
	write(t, name, string(good))
	if _, err := open(t, root, otherKey).Manifest(testDomain, idA); !errors.Is(err, ErrForeignManifest) {
		t.Errorf("another host: %v", err)
	}
	moved := filepath.Join(root, testDomain, idB)
	if err := os.Rename(filepath.Join(root, testDomain, idA), moved); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Manifest(testDomain, idB); !errors.Is(err, ErrManifest) {
		t.Errorf("moved: %v", err)
	}
}

// TestChangesInManifest reads what says how changes were found, and what was
// written before that was said.
func TestChangesInManifest(t *testing.T) {
	for changes, valid := range map[string]bool{
		"": true, ChangesCBT: true, ChangesSnapshot: true, ChangesDigest: true, "none": false, "Digest": false,
	} {
		m := testManifest(idB, idA)
		m.Format, m.Repository, m.Host = Format, ID(idC), HostID(ourKey)
		m.Disks[0].Changes = changes
		if changes != "" {
			m.Disks[0].ReadBytes = 1 << 20
		}
		b, err := m.sign(ourKey)
		if err != nil {
			t.Fatal(err)
		}
		if said := bytes.Contains(b, []byte(`"changes"`)) && bytes.Contains(b, []byte(`"read_bytes"`)); said != (changes != "") {
			t.Errorf("changes %q: written as %s", changes, b)
		}
		switch got, err := parseManifest(b); {
		case (err == nil) != valid:
			t.Errorf("changes %q: %v", changes, err)
		case valid && got.Disks[0] != m.Disks[0]:
			t.Errorf("changes %q: read as %+v", changes, got.Disks[0])
		}
	}
}

func TestCheckFindsDamage(t *testing.T) {
	root, r := newRepository(t)
	mustBackup(t, r, idA, "")
	m, err := r.Manifest(testDomain, idA)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, testDomain, idA)
	for _, damage := range []func(name string) error{
		os.Remove,
		func(name string) error { return os.Truncate(name, 3) },
		func(name string) error { return errors.Join(os.Remove(name), unix.Mkfifo(name, 0o600)) },
		func(name string) error { return errors.Join(os.Remove(name), os.Symlink("/etc/passwd", name)) },
	} {
		for name, content := range testFiles(idA) {
			p := filepath.Join(dir, name)
			if err := damage(p); err != nil {
				t.Fatal(err)
			}
			if err := r.Check(m); !errors.Is(err, ErrDamaged) {
				t.Errorf("%s: %v", name, err)
			}
			os.Remove(p)
			write(t, p, string(content))
		}
	}
	if err := r.Check(m); err != nil {
		t.Error(err)
	}
}

func TestCommitRefusesWhatDoesNotFit(t *testing.T) {
	for what, change := range map[string]func(m *Manifest){
		"size":          func(m *Manifest) { m.Disks[0].StoredBytes++ },
		"missing file":  func(m *Manifest) { m.Files = append(m.Files, File{"nvram", 1, m.Files[0].BLAKE3}) },
		"unlisted file": func(m *Manifest) { m.Files = m.Files[1:] },
		"other backup":  func(m *Manifest) { m.Backup = idB },
		"parent":        func(m *Manifest) { m.Parent = idB },
		"target":        func(m *Manifest) { m.Disks[0].Target = "../x" },
		"held":          func(m *Manifest) { m.Held = -1 },
		"secret":        func(m *Manifest) { m.Secrets = []Secret{{For: "tpm", UUID: "x"}} },
		"usage":         func(m *Manifest) { m.Secrets = []Secret{{For: "vda", Usage: "a\nb"}} },
		"use":           func(m *Manifest) { m.Secrets = []Secret{{For: "../x"}} },
		"changes":       func(m *Manifest) { m.Disks[0].Changes = ChangesDigest }, // the image is full
		"read bytes":    func(m *Manifest) { m.Disks[0].ReadBytes = sizeLimit + 1 },
	} {
		root, r := newRepository(t)
		c, err := r.Claim(testDomain, idA)
		if err != nil {
			t.Fatal(err)
		}
		s, err := stageFiles(r, idA)
		if err != nil {
			t.Fatal(err)
		}
		m := testManifest(idA, "")
		change(m)
		if err := s.Commit(t.Context(), c, m); err == nil {
			t.Errorf("%s: committed", what)
		}
		if err := errors.Join(s.Discard(), c.Release()); err != nil {
			t.Fatal(err)
		}
		checkWhole(t, root, r)
	}
}

func TestCancelledCommitLeavesNothing(t *testing.T) {
	root, r := newRepository(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("stop")
	cancel(cause)
	if err := makeBackup(ctx, r, idA, ""); !errors.Is(err, cause) {
		t.Fatal(err)
	}
	checkWhole(t, root, r)
}
