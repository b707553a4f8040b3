//go:build nas

package nastest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// becomes waits until it is told of a repository, which is looked at, that it has a state.
func (r *repository) becomes(want dbus.RepositoryState) {
	r.t.Helper()
	r.look()
	eventually(r.t, fmt.Sprintf("%s is %s", r.name, want), func() error {
		if p := r.properties(); p.State != want {
			return fmt.Errorf("it is %s: %s", p.State, p.StateMessage)
		}
		return nil
	})
}

// look has the repository looked at now. What is found is told elsewhere.
func (r *repository) look() { _, _ = ctl("repository", "check", r.name, "--no-block") }

// TestServerThatIsGone takes the server of a repository away. What does not
// need it goes on, and it is used again when it is back.
func TestServerThatIsGone(t *testing.T) {
	address := serveNFS(t, volume(t, "gone", 64))
	r := add(t, "gone", address, "--type", "nfs", "-o", "vers=4.2")
	command(t, "", "mkdir", "/srv/here")
	other := add(t, "here", "/srv/here")
	newDomain(t, "without-server", "8M")
	first := change(t, "without-server", "write -q -P 1 0 1M")
	a := r.backUp("without-server")
	command(t, "", "systemctl", "stop", "nfs-server.service")
	t.Cleanup(func() { _ = exec.Command("systemctl", "start", "nfs-server.service").Run() })
	r.look()
	eventually(t, "it is told that nothing answers", func() error {
		if p := r.properties(); p.State != dbus.RepositoryHung && p.State != dbus.RepositoryGone {
			return fmt.Errorf("it is %s: %s", p.State, p.StateMessage)
		}
		return nil
	})
	begin := time.Now()
	r.ctl("status")
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("status takes %v", took)
	}
	other.restoresTo(other.backUp("without-server"), first)
	if out, err := ctl("backup", "without-server", "--offering", r.name); err == nil {
		t.Errorf("a backup to it was made: %s", out)
	}
	command(t, "", "systemctl", "start", "nfs-server.service")
	r.becomes(dbus.RepositoryOnline)
	second := change(t, "without-server", "write -q -P 2 512k 1M")
	r.restoresTo(a, first)
	r.restoresTo(r.backUp("without-server"), second)
}

// TestShareThatIsFull fills a share.
func TestShareThatIsFull(t *testing.T) {
	point := volume(t, "full", 16)
	r := add(t, "full", serveNFS(t, point), "--type", "nfs", "-o", "vers=4.2")
	newDomain(t, "filling", "8M")
	want := change(t, "filling", "write -q -P 1 0 4M")
	filler := filepath.Join(point, "filler")
	_ = exec.Command("dd", "if=/dev/zero", "of="+filler, "bs=64k").Run() // until no space is left
	r.becomes(dbus.RepositoryFull)
	if out, err := ctl("backup", "filling", "--offering", r.name); err == nil {
		t.Errorf("a backup to it was made: %s", out)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	r.becomes(dbus.RepositoryOnline)
	r.restoresTo(r.backUp("filling"), want)
}
