package restore

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

// TestResolve follows links of root's, as an admin puts them there, and none
// of anybody else, who would have other files replaced.
func TestResolve(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes links of two owners")
	}
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"real", "nvram"} {
		if err := os.Mkdir(filepath.Join(base, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(base, "real", "disk")
	write(t, disk, "old")
	write(t, filepath.Join(base, "shadow"), "secret")
	const foreign = true
	link := func(to, name string, foreign bool) {
		t.Helper()
		path := filepath.Join(base, name)
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
		if foreign {
			if err := os.Lchown(path, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}
	}
	link("real", "images", !foreign)
	link(filepath.Join(base, "images"), "pool", !foreign)
	link("../images/disk", "nvram/linked", !foreign)
	link("../shadow", "nvram/VARS.fd", foreign)
	link(base, "away", foreign)
	link("nvram/VARS.fd", "twice", !foreign)
	link("loop", "loop", !foreign)
	for _, name := range []string{"real/disk", "images/disk", "pool/disk", "pool/./../real//disk", "nvram/linked"} {
		if got, owner, err := existing(base + "/" + name); err != nil || got != disk || *owner.UID != 0 {
			t.Errorf("%s: %q, error %v", name, got, err)
		}
	}
	for _, name := range []string{"nvram/VARS.fd", "away/real/disk", "twice", "loop", "real"} {
		if got, _, err := existing(base + "/" + name); err == nil {
			t.Errorf("%s was taken for %s", name, got)
		}
	}
	if _, _, err := existing(filepath.Join(base, "nothing")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("nothing: %v", err)
	}
}

// TestPlacesOfTPMsStay keeps what an admin made as the place of a TPM's state.
func TestPlacesOfTPMsStay(t *testing.T) {
	base := t.TempDir()
	place, link := filepath.Join(base, "tpm", "vm"), filepath.Join(base, "tpm", "link")
	if err := errors.Join(os.MkdirAll(place, 0o700), os.Symlink(place, link)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{place, link} {
		name := tpmPrefix + filepath.Base(hypervisor.TPMStateFile("x", "2.0"))
		removeTPMDirectories(Plan{Files: []OnlyFile{{Name: name, Destination: filepath.Join(path, filepath.Base(name))}}})
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
}
