package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

// domains is what libvirt would list.
type domains struct {
	Hypervisor
	all []hypervisor.Domain
}

func (d domains) Domains(context.Context) ([]hypervisor.Domain, error) { return d.all, nil }

// TestUsedByOthers finds a domain that is off and needs a layer as it is, by
// whatever name it knows that.
func TestUsedByOthers(t *testing.T) {
	d := t.TempDir()
	path := func(name string) string { return filepath.Join(d, name) }
	image := func(name string, backing ...string) {
		t.Helper()
		args := []string{"create", "-q", "-f", "qcow2"}
		for _, b := range backing {
			args = append(args, "-b", b, "-F", "qcow2")
		}
		args = append(args, path(name))
		if len(backing) == 0 {
			args = append(args, "1M")
		}
		if out, err := exec.CommandContext(t.Context(), "qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img %v: %v: %s", args, err, out)
		}
	}
	image("base")
	if err := errors.Join(os.Symlink("base", path("link")), os.Link(path("base"), path("second")), os.Symlink(d, path("pool"))); err != nil {
		t.Fatal(err)
	}
	image("plain", path("base"))
	image("by-link", path("link"))
	image("by-name", path("second"))
	image("alone")
	for source, held := range map[string]bool{
		"base": true, "plain": true, "by-link": true, "by-name": true, "pool/base": true, "alone": false, "missing": false,
	} {
		other := hypervisor.Domain{UUID: "2", Name: "other", XML: fmt.Sprintf(
			`<domain><devices><disk type='file' device='disk'><driver type='qcow2'/><source file='%s'/><target dev='vda'/></disk></devices></domain>`, path(source))}
		k := &Keeper{Hypervisor: domains{all: []hypervisor.Domain{{UUID: "1"}, other}}}
		if err := k.usedByOthers(t.Context(), "1", []string{path("base")}); errors.Is(err, ErrHeld) != held || !held && err != nil {
			t.Errorf("%s: %v", source, err)
		}
	}
}
