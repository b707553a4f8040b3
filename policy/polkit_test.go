package policy

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

// nobody is the user of these tests who is not root.
const nobody = 65534

func connect(t *testing.T, address string) *godbus.Conn {
	t.Helper()
	conn, err := godbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func newPolkit(t *testing.T, address string) *Polkit {
	t.Helper()
	return NewPolkit(connect(t, address), slog.New(slog.NewTextHandler(t.Output(), nil)))
}

func example(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile("examples/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func request(conn *godbus.Conn, uid uint32, method string, details map[string]string) Request {
	return Request{Sender: conn.Names()[0], UID: uid, Method: method, Details: details}
}

func refused(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, dbus.ErrNotAuthorized) {
		t.Errorf("%s: %v", what, err)
	}
}

func TestPolkitLetsRootAndNobodyElse(t *testing.T) {
	address := bustest.Start(t)
	bustest.StartPolkit(t, address, "org.virtbackup1.policy")
	p := newPolkit(t, address)
	root, other := connect(t, address), bustest.DialAs(t, address, nobody)
	for method, action := range table() {
		if err := p.Authorize(t.Context(), request(root, 0, method, nil)); err != nil {
			t.Errorf("root, %s: %v", method, err)
		}
		err := p.Authorize(t.Context(), request(other, nobody, method, nil))
		if action == ActionNone {
			if err != nil {
				t.Errorf("nobody, %s: %v", method, err)
			}
			continue
		}
		refused(t, "nobody, "+method, err)
	}
	refused(t, "a method that is not in the table",
		p.Authorize(t.Context(), request(root, 0, "org.virtbackup1.Manager.Undocumented", nil)))
	refused(t, "root's user id with another's bus name",
		p.Authorize(t.Context(), request(other, 0, "org.virtbackup1.Domain.Backup", nil)))
}

func TestRuleForOneUserAndOneDomain(t *testing.T) {
	address := bustest.Start(t)
	rule := strings.ReplaceAll(example(t, "50-one-user-one-domain.rules"), `"alice"`, `"nobody"`)
	bustest.StartPolkit(t, address, "org.virtbackup1.policy", rule)
	p := newPolkit(t, address)
	alice, other := bustest.DialAs(t, address, nobody), bustest.DialAs(t, address, 1)
	hers := map[string]string{dbus.DetailDomainUUID: "6a1f4d5e-0c0b-4b6e-9f1e-3a0d2c9b8f77", dbus.DetailDomainName: "web"}
	others := map[string]string{dbus.DetailDomainUUID: "00000000-0c0b-4b6e-9f1e-3a0d2c9b8f77", dbus.DetailDomainName: "web"}
	const backup, remove = "org.virtbackup1.Domain.Backup", "org.virtbackup1.Backup.Delete"
	if err := p.Authorize(t.Context(), request(alice, nobody, backup, hers)); err != nil {
		t.Errorf("her own domain: %v", err)
	}
	refused(t, "another's domain", p.Authorize(t.Context(), request(alice, nobody, backup, others)))
	refused(t, "what the rule does not name", p.Authorize(t.Context(), request(alice, nobody, remove, hers)))
	refused(t, "no details", p.Authorize(t.Context(), request(alice, nobody, backup, nil)))
	refused(t, "another user", p.Authorize(t.Context(), request(other, 1, backup, hers)))
}

func TestOtherExamples(t *testing.T) {
	address := bustest.Start(t)
	operators := strings.ReplaceAll(example(t, "50-backup-operators.rules"), `"backup-operators"`, `"nogroup"`)
	bustest.StartPolkit(t, address, "org.virtbackup1.policy", operators, example(t, "50-everybody-sees.rules"))
	p := newPolkit(t, address)
	operator := bustest.DialAs(t, address, nobody)
	const backup = "org.virtbackup1.Domain.Backup"
	for _, method := range []string{"org.freedesktop.DBus.Properties.GetAll", "org.virtbackup1.Chain.Verify"} {
		if err := p.Authorize(t.Context(), request(operator, nobody, method, nil)); err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
	if err := p.Authorize(t.Context(), request(operator, nobody, backup, map[string]string{dbus.DetailOffering: "daily"})); err != nil {
		t.Error(err)
	}
	refused(t, "another offering", p.Authorize(t.Context(), request(operator, nobody, backup, map[string]string{dbus.DetailOffering: "weekly"})))
	refused(t, "not in the group, not at the console",
		p.Authorize(t.Context(), request(bustest.DialAs(t, address, 1), 1, "org.freedesktop.DBus.Properties.GetAll", nil)))
}

func TestWhatPolkitDoesNotAnswerIsRefused(t *testing.T) {
	address := bustest.Start(t)
	p := newPolkit(t, address)
	root := connect(t, address)
	r := request(root, 0, "org.virtbackup1.Domain.Backup", nil)
	refused(t, "no polkitd", p.Authorize(t.Context(), r))

	polkitd := bustest.StartPolkit(t, address, "org.virtbackup1.policy")
	if err := p.Authorize(t.Context(), r); err != nil {
		t.Fatalf("polkitd is there now: %v", err)
	}
	gone := connect(t, address)
	vanished := request(gone, 0, r.Method, nil)
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	for known := true; known; {
		if err := root.BusObject().Call("org.freedesktop.DBus.NameHasOwner", 0, vanished.Sender).Store(&known); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, "a sender that is gone", p.Authorize(t.Context(), vanished))
	never := r
	never.Sender = ":1.4000000"
	refused(t, "a sender that never was", p.Authorize(t.Context(), never))
	empty := r
	empty.Sender = ""
	refused(t, "no sender", p.Authorize(t.Context(), empty))
	binary := r
	binary.Details = map[string]string{dbus.DetailDomainName: "a\xffb"}
	refused(t, "details that D-Bus cannot carry", p.Authorize(t.Context(), binary))

	if err := polkitd.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	p.quick, p.interactive = 50*time.Millisecond, 50*time.Millisecond
	refused(t, "a polkitd that hangs", p.Authorize(t.Context(), r))
	r.Interactive = true
	refused(t, "a polkitd that hangs, interactively", p.Authorize(t.Context(), r))
	p.quick = time.Hour
	r.Interactive = false
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error)
	go func() { answer <- p.Authorize(ctx, r) }()
	cancel()
	refused(t, "a caller that went", <-answer)
	go func() { answer <- p.Authorize(t.Context(), r) }()
	if err := polkitd.Kill(); err != nil {
		t.Fatal(err)
	}
	refused(t, "a polkitd that dies", <-answer)
}
