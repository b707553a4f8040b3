//go:build lab

package labtest

import (
	"encoding/json"
	"os/exec"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// TestQuiescePolicy backs up a guest with an agent, and then without: what the
// backup is worth, how long the guest was held, and what it falls short of is
// told by the daemon and by the manifest alike.
func TestQuiescePolicy(t *testing.T) {
	h := newHost(t)
	g := newGuest(t, "qcow2:64M:fs")
	agent, prefer := dbus.QuiesceAgent, dbus.QuiescePrefer
	preferred := dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &agent, QuiescePolicy: &prefer}}
	for _, o := range []dbus.BackupOptions{frozenByAgent(), preferred} {
		b := h.backup(g, o)
		if b.Consistency != dbus.ConsistencyFilesystem || b.Shortfall != "" || b.HeldUsec == 0 {
			t.Errorf("%s, held for %d µs, %q", b.Consistency, b.HeldUsec, b.Shortfall)
		}
		h.manifestSays(b)
	}
	g.run("sh", "-c", "(sleep 0.5; kill $(pidof qemu-ga)) >/dev/null 2>&1 &")
	eventually(t, "the agent has ended", func() error {
		if exec.CommandContext(t.Context(), "virsh", "-q", "qemu-agent-command", "--timeout", "2", g.name, `{"execute":"guest-ping"}`).Run() == nil {
			return dbus.Errorf(dbus.ErrBusy, "it answers")
		}
		return nil
	})
	refuses(t, "required", h.try(g, frozenByAgent()), dbus.ErrUnavailable, g.name, "agent", "prefer")
	want := g.snapshot()
	b := h.backup(g, preferred)
	if b.Consistency != dbus.ConsistencyCrash || b.Shortfall != "the guest agent does not answer" || b.HeldUsec != 0 || b.Kind != dbus.KindIncremental {
		t.Errorf("%s %s, held for %d µs, %q", b.Kind, b.Consistency, b.HeldUsec, b.Shortfall)
	}
	h.manifestSays(b)
	h.restoreIsExact(b, want)
}

// manifestSays checks that a backup's manifest agrees on its consistency.
func (h *host) manifestSays(b dbus.BackupProperties) {
	h.t.Helper()
	var m struct {
		Consistency string `json:"consistency"`
		Held        uint64 `json:"held_usec"`
		Shortfall   string `json:"shortfall"`
	}
	if err := json.Unmarshal(h.file(b, "manifest.json"), &m); err != nil {
		h.t.Fatal(err)
	}
	if m.Consistency != string(b.Consistency) || m.Held != b.HeldUsec || m.Shortfall != b.Shortfall {
		h.t.Errorf("the manifest says %+v, the daemon %s, %d, %q", m, b.Consistency, b.HeldUsec, b.Shortfall)
	}
}
