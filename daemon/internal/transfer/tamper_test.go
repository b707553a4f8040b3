package transfer

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// chainSize is that of two nodes of digests, of which the increment keeps one.
const chainSize = 8 << 20

// chainOfTwo makes a full backup with an increment; want is what that holds.
func chainOfTwo(t *testing.T, compression string) (h *host, want, full, increment string) {
	t.Helper()
	h = newHost(t)
	d := h.disk("vda", "qcow2", chainSize)
	d.io(h, "write -P 1 0 2M", "write -P 1 6M 1M")
	full, increment = h.id(), h.id()
	for _, b := range []*BackupSpec{h.backupSpec(full, "", full, d), h.backupSpec(increment, full, full, d)} {
		b.Compression = compression
		if r := h.take(b, d); r.Error != nil {
			t.Fatal(r.Error)
		}
		want = d.raw(h)
		d.io(h, "write -P 2 1M 64k", "write -P 3 3M 64k")
	}
	return h, want, full, increment
}

// refused checks that neither verify nor restore accept the increment.
func refused(h *host, what, increment string) {
	h.Helper()
	if !damaged(h, increment) {
		h.Errorf("%s: verify found nothing", what)
	}
	if restored(h, what, increment) != "" {
		h.Errorf("%s: it was restored", what)
	}
}

// damaged tells whether verify finds anything in a backup and its parents.
func damaged(h *host, backup string) bool {
	h.Helper()
	r := h.run(Spec{Operation: OperationVerify, Backups: []string{backup}})
	if r.Error != nil || len(r.Backups) == 0 {
		h.Fatalf("verify: %+v", r)
	}
	for _, b := range r.Backups {
		if b.Error != nil {
			return true
		}
	}
	return false
}

// restored restores a backup and returns the file, or "" if that was refused
// and left nothing.
func restored(h *host, what, backup string) string {
	h.Helper()
	dir := filepath.Join(h.dir, "restore-"+h.id())
	if err := os.Mkdir(dir, 0o700); err != nil {
		h.Fatal(err)
	}
	r := h.restore(backup, FormatRaw, dir, "vda")
	if r.Error == nil {
		return filepath.Join(dir, "vda.raw")
	}
	if r.Error.Class != ClassVerification && r.Error.Class != ClassManifest {
		h.Errorf("%s: restore: %+v", what, r.Error)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		h.Errorf("%s: left behind: %v (error %v)", what, left, err)
	}
	return ""
}

// TestEveryBitFlipIsFound flips bits all over the files of a chain of two. What
// can be restored nevertheless (a refcount was hit, or a cluster that the
// increment replaces) is what was backed up, and what restore refuses verify
// has found.
func TestEveryBitFlipIsFound(t *testing.T) {
	for _, compression := range []string{"none", "zstd"} {
		h, want, full, increment := chainOfTwo(t, compression)
		refusals := 0
		for _, name := range []string{full + "/vda.qcow2", full + "/vda.digests", increment + "/vda.qcow2", increment + "/vda.digests", increment + "/manifest.json"} {
			p := filepath.Join(h.repo, testDomain, name)
			good, err := os.ReadFile(p)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 12 {
				at := usedByte(good, len(good)*i/12)
				bad := bytes.Clone(good)
				bad[at] ^= 0x10
				h.write(p, string(bad))
				found := damaged(h, increment)
				if out := restored(h, name, increment); out != "" {
					h.command("cmp", want, out)
					continue
				}
				refusals++
				if !found {
					t.Errorf("byte %d of %s changed: refused by restore, not found by verify", at, name)
				}
			}
			h.write(p, string(good[:len(good)-1]))
			refused(h, name+" cut short", increment)
			h.write(p, string(good))
		}
		if refusals < 20 {
			t.Errorf("only %d changes were refused: the test shows little", refusals)
		}
	}
}

// usedByte returns a place at or behind at with a byte that means something:
// nothing reads the padding.
func usedByte(b []byte, at int) int {
	for i := at; i < len(b); i++ {
		if b[i] != 0 {
			return i
		}
	}
	return 16
}

// forge replaces the image of a backup, with a manifest that fits its size and
// is authentic: only what the image says about itself gives it away.
func forge(h *host, backup string, image []byte) {
	h.Helper()
	dir := filepath.Join(h.repo, testDomain, backup)
	h.write(filepath.Join(dir, "vda.qcow2"), string(image))
	name := filepath.Join(dir, "manifest.json")
	b, err := os.ReadFile(name)
	if err != nil {
		h.Fatal(err)
	}
	var m repository.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		h.Fatal(err)
	}
	m.Disks[0].StoredBytes = uint64(len(image))
	key, err := (&worker{spec: &Spec{Repository: RepositorySpec{KeyFile: h.key}}}).key()
	if err != nil {
		h.Fatal(err)
	}
	m.HMAC = ""
	sum := hmac.New(sha256.New, key)
	sum.Write(encodeManifest(h, m))
	m.HMAC = hex.EncodeToString(sum.Sum(nil))
	h.write(name, string(encodeManifest(h, m)))
}

func encodeManifest(h *host, m repository.Manifest) []byte {
	h.Helper()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(m); err != nil {
		h.Fatal(err)
	}
	return b.Bytes()
}

// TestHostileImages puts images into a repository that would make QEMU open a
// file, connect somewhere, or take all memory (THREATS.md T14, T15).
func TestHostileImages(t *testing.T) {
	h, _, _, increment := chainOfTwo(t, "none")
	secret := filepath.Join(h.dir, "secret")
	h.write(secret, strings.Repeat("s", chainSize))
	create := func(args ...string) []byte {
		p := filepath.Join(h.dir, "hostile-"+h.id())
		h.command("qemu-img", append(append([]string{"create", "-q", "-u", "-f", "qcow2"}, args...), p, fmt.Sprint(chainSize))...)
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	good, err := os.ReadFile(h.image(increment, "vda"))
	if err != nil {
		t.Fatal(err)
	}
	patched := func(at int, v uint64, n int) []byte {
		b := bytes.Clone(good)
		var raw [8]byte
		binary.BigEndian.PutUint64(raw[:], v)
		copy(b[at:], raw[8-n:])
		return b
	}
	corpus := map[string][]byte{
		"no backing":          create(),
		"backing elsewhere":   create("-b", secret, "-F", "raw"),
		"backing by json":     create("-b", `json:{"driver":"file","filename":"`+secret+`"}`, "-F", "raw"),
		"backing by nbd":      create("-b", "nbd:unix:/run/x:exportname=y", "-F", "raw"),
		"backing up the tree": create("-b", "../../../../../etc/passwd", "-F", "raw"),
		"data file":           create("-o", "data_file="+filepath.Join(h.dir, "data"), "-o", "data_file_raw=on"),
		"encrypted":           patched(32, 1, 4),
		"huge L1":             patched(36, 1<<31, 4),
		"bigger disk":         patched(24, 1<<50, 8),
		"smaller disk":        patched(24, 1<<20, 8),
		"unknown feature":     patched(72, 1<<20, 8),
		"snapshots":           patched(60, 3, 4),
		"L1 outside the file": patched(40, 1<<40, 8),
		"clusters of 2^40":    patched(20, 40, 4),
		"no image":            bytes.Repeat([]byte{0}, len(good)),
		"empty":               {},
	}
	for what, image := range corpus {
		forge(h, increment, image)
		refused(h, what, increment)
	}
	forge(h, increment, good)
	if damaged(h, increment) || restored(h, "the good image", increment) == "" {
		t.Error("the true image with the manifest made by the test is refused: the test shows nothing")
	}
}

// TestForgedManifest changes what a manifest says without the key.
func TestForgedManifest(t *testing.T) {
	h, _, full, increment := chainOfTwo(t, "none")
	d := disk{"vda", filepath.Join(h.dir, "vda.qcow2"), "qcow2", chainSize}
	name := filepath.Join(h.repo, testDomain, increment, "manifest.json")
	good, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	h.write(name, strings.Replace(string(good), `"kind": "incremental"`, `"kind": "full"`, 1))
	refused(h, "forged kind", increment)
	list := h.run(Spec{Operation: OperationList})
	if list.Error != nil || len(list.Backups) != 2 || list.Backups[0].Error != nil || list.Backups[1].Error == nil {
		t.Fatalf("list: %+v", list)
	}
	if c := list.Backups[1].Error.Class; c != ClassManifest {
		t.Errorf("listed with class %s", c)
	}
	b := h.backupSpec(h.id(), increment, full, d)
	if r := h.take(b, d); r.Error == nil || r.Error.Class != ClassParent {
		t.Errorf("an increment to a forged parent: %+v", r.Error)
	}
	h.checkClean()
}

func TestDamagedParentIsSeenBeforeTheGuestIsTouched(t *testing.T) {
	h, _, full, increment := chainOfTwo(t, "none")
	d := disk{"vda", filepath.Join(h.dir, "vda.qcow2"), "qcow2", chainSize}
	if err := os.Truncate(h.image(full, "vda"), 100<<10); err != nil {
		t.Fatal(err)
	}
	b := h.backupSpec(h.id(), increment, full, d)
	// There is no go.json: a worker that gets as far as waiting would hang.
	r := h.runJob(t.Context(), h.job(Spec{Operation: OperationBackup, Backup: b}))
	if r.Error == nil || r.Error.Class != ClassParent {
		t.Errorf("%+v", r.Error)
	}
	h.checkClean()
}
