package restore

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

// knows is a libvirt with some secrets.
type knows struct {
	Hypervisor
	secrets map[hypervisor.Secret]bool
}

func (k knows) HasSecret(_ context.Context, which hypervisor.Secret) (bool, error) {
	return k.secrets[which], nil
}

// TestSecretsAreNamed has a plan name the secrets of what is restored, and no
// others.
func TestSecretsAreNamed(t *testing.T) {
	m := repository.Manifest{
		Disks:   []repository.Disk{{Target: "vda", Format: "raw", Container: "qcow2"}, {Target: "vdb", Format: "raw", Container: "raw"}, {Target: "vdc"}},
		Files:   []repository.File{{Name: "tpm/tpm2-00.permall"}},
		Secrets: []repository.Secret{{For: "vda", UUID: "A"}, {For: "vdb", Usage: "/b"}, {For: repository.SecretForTPM, UUID: "T"}},
	}
	here := map[hypervisor.Secret]bool{{UUID: "A"}: true}
	k := New(Deps{Hypervisor: knows{secrets: here}})
	p := Plan{Disks: []Disk{{Target: "vda", Format: "raw"}, {Target: "vdc", Format: "qcow2"}}}
	p.planContainers(m)
	if d := p.Disks[0]; d.opened() != "qcow2" || d.Encryption != (hypervisor.Encryption{Format: "luks", Secret: hypervisor.Secret{UUID: "A"}}) {
		t.Errorf("got %+v", d)
	}
	if d := p.Disks[1]; d.opened() != "qcow2" || d.Encryption != (hypervisor.Encryption{}) {
		t.Errorf("got %+v", d)
	}
	if err := k.planSecrets(t.Context(), m, &p); err != nil || len(p.Secrets) != 1 || p.Secrets[0] != "disk vda is encrypted with libvirt's secret A" {
		t.Errorf("%q, %v", p.Secrets, err)
	}
	p = Plan{Disks: []Disk{{Target: "vdb"}}, Files: []OnlyFile{{Name: "tpm/tpm2-00.permall"}}}
	if err := k.planSecrets(t.Context(), m, &p); err != nil || len(p.Warnings) != 2 || !strings.Contains(p.Warnings[0], `of usage "/b", which is not here`) ||
		!strings.Contains(p.Warnings[1], "the TPM's state is encrypted with libvirt's secret T, which is not here") {
		t.Errorf("%q, %v", p.Warnings, err)
	}
}

// TestPlaceOfNothing puts a file where there is none, and takes it back, each
// twice, as after a crash.
func TestPlaceOfNothing(t *testing.T) {
	f := staged(t, "tpm2-00.permall")
	f.Fresh = true
	write(t, f.Final+".other", "new") // now: it must not get the inode of one that goes
	if err := f.exchange(); err == nil {
		t.Error("it took the place of a file")
	}
	holds(t, f.Final, "old")
	if err := os.Remove(f.Final); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.exchange(); err != nil {
			t.Fatal(err)
		}
		holds(t, f.Final, "restored")
	}
	for range 2 {
		if err := exchangeBack([]file{f}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(f.Final); !os.IsNotExist(err) {
			t.Errorf("%s is there: %v", f.Final, err)
		}
	}
	// Somebody else's is left alone.
	if err := os.Rename(f.Final+".other", f.Final); err != nil {
		t.Fatal(err)
	}
	if err := exchangeBack([]file{f}); err != nil {
		t.Fatal(err)
	}
	holds(t, f.Final, "new")
}

func TestPlaceOfTPM(t *testing.T) {
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	state := hypervisor.TPMStateFile(uuid, "2.0")
	for destination, want := range map[string]string{
		state:                        filepath.Join(hypervisor.TPMDirectory, "job"),
		"/srv/tpm/a/tpm2-00.permall": "/srv/tpm/job",
	} {
		if got := tpmStaging(destination, "job"); got != want {
			t.Errorf("%s is staged in %s", destination, got)
		}
	}
	for name, known := range map[string]bool{"tpm/tpm2-00.permall": true, "tpm/tpm-00.permall": true, "tpm/other": false, "nvram": false} {
		if _, any := tpmOf(repository.Manifest{Files: []repository.File{{Name: name}}}); any != known {
			t.Errorf("%s: %v", name, any)
		}
	}
}
