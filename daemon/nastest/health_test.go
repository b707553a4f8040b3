//go:build nas

package nastest

import (
	"fmt"
	"os/exec"
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
