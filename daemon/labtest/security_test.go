//go:build lab

// Package labtest tries the installed daemon, as people and their tools meet
// it, on a real host.
package labtest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

const (
	systemBus = "unix:path=/run/dbus/system_bus_socket"
	labuser   = 2000
	// doNotQueue is DBUS_NAME_FLAG_DO_NOT_QUEUE.
	doNotQueue = 4
	domainXML  = `<domain type="qemu"><name>NAME</name><memory>65536</memory><os><type arch="x86_64">hvm</type></os></domain>`
)

func command(t *testing.T, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// defineDomain defines a domain without disks, and returns its UUID.
func defineDomain(t *testing.T, name string) string {
	t.Helper()
	command(t, strings.ReplaceAll(domainXML, "NAME", name), "virsh", "define", "/dev/stdin")
	t.Cleanup(func() { command(t, "", "virsh", "undefine", name) })
	awaitDomain(t, name)
	return command(t, "", "virsh", "domuuid", name)
}

// awaitDomain waits until the daemon has heard of a domain.
func awaitDomain(t *testing.T, name string) {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
	defer stop()
	c, err := dbus.ConnectSystem(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for {
		_, err := c.FindDomain(ctx, name)
		if err == nil {
			return
		}
		if !errors.Is(err, dbus.ErrNotFound) {
			t.Fatalf("the daemon does not know the domain %s: %v", name, err)
		}
	}
}

func rootClient(t *testing.T) *dbus.Client {
	t.Helper()
	c, err := dbus.ConnectSystem(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// refused tells whether polkit, or the bus before it, refused a call.
func refused(err error) bool {
	return errors.Is(err, dbus.ErrNotAuthorized) || errors.Is(err, dbus.ErrorName("org.freedesktop.DBus.Error.AccessDenied"))
}

func TestEveryIntrospectedMethodIsRefusedToAnUnprivilegedUser(t *testing.T) {
	user := bustest.DialAs(t, systemBus, labuser)
	calls := bustest.Calls(t, user, dbus.LogControlPath)
	for _, ref := range []dbus.Ref{{Kind: dbus.KindManager}, {Kind: dbus.KindDomain, ID: defineDomain(t, "victim")}} {
		calls = append(calls, bustest.Calls(t, user, ref.Path())...)
	}
	for _, kind := range dbus.Kinds() {
		nothing := dbus.Ref{Kind: kind, ID: "01JD8Q4M6Z3V5W7X9YABCDEFGH"}
		calls = append(calls, bustest.Calls(t, user, nothing.Path())...)
	}
	methods := make(map[string]bool)
	for _, c := range calls {
		methods[c.Method] = true
		if err := c.Do(user); !refused(err) {
			t.Errorf("%s at %s: %v", c.Method, c.Path, err)
		}
	}
	interfaces, err := dbus.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		for _, m := range i.Methods {
			if !methods[i.Name+"."+m.Name] {
				t.Errorf("%s.%s was not found by introspection", i.Name, m.Name)
			}
		}
	}
	t.Logf("%d methods were refused", len(methods))
}

func TestPolkitRuleGivesOneUserOneDomain(t *testing.T) {
	mine, other := defineDomain(t, "mine"), defineDomain(t, "other")
	rule, err := os.ReadFile("../../policy/examples/50-one-user-one-domain.rules")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(`"alice"`, `"labuser"`, "6a1f4d5e-0c0b-4b6e-9f1e-3a0d2c9b8f77", mine).Replace(string(rule))
	const file = "/etc/polkit-1/rules.d/50-test.rules"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(file)
		command(t, "", "systemctl", "restart", "polkit.service")
	})
	command(t, "", "systemctl", "restart", "polkit.service")
	user, ctx := dbus.NewClient(bustest.DialAs(t, systemBus, labuser)), t.Context()
	if uuid, err := user.FindDomain(ctx, "mine"); err != nil || uuid != mine {
		t.Errorf("the user's own domain: %q, %v", uuid, err)
	}
	if p, err := dbus.Get[dbus.DomainProperties](ctx, user, mine); err != nil || p.Name != "mine" {
		t.Errorf("the user's own domain: %+v, %v", p, err)
	}
	if _, err := user.BackupDomain(ctx, mine, dbus.BackupOptions{}); err == nil || errors.Is(err, dbus.ErrNotAuthorized) {
		t.Errorf("a backup without an offering is allowed, and is no use: %v", err)
	}
	_, found := user.FindDomain(ctx, "other")
	_, read := dbus.Get[dbus.DomainProperties](ctx, user, other)
	_, backup := user.BackupDomain(ctx, other, dbus.BackupOptions{})
	_, all := user.Objects(ctx)
	for what, err := range map[string]error{
		"another's domain is found": found, "another's domain is read": read, "another's domain is backed up": backup,
		"all objects are listed": all, "the domain's offering is taken": user.UnassignDomain(ctx, mine),
	} {
		if !errors.Is(err, dbus.ErrNotAuthorized) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestNothingIsAllowedWithoutPolkit is the second half of T2: root, too, is
// let in by polkit only.
func TestNothingIsAllowedWithoutPolkit(t *testing.T) {
	c, ctx := rootClient(t), t.Context()
	if _, err := dbus.Get[dbus.ManagerProperties](ctx, c, ""); err != nil {
		t.Fatal(err)
	}
	command(t, "", "systemctl", "mask", "--runtime", "--now", "polkit.service")
	unmask := func() { command(t, "", "systemctl", "unmask", "--runtime", "polkit.service") }
	t.Cleanup(unmask)
	if err := c.Reload(ctx); !errors.Is(err, dbus.ErrNotAuthorized) {
		t.Errorf("without polkitd: %v", err)
	}
	unmask()
	if err := c.Reload(ctx); err != nil {
		t.Errorf("with polkitd again: %v", err)
	}
}

// TestNameCannotBeTaken is T7 on the real system bus.
func TestNameCannotBeTaken(t *testing.T) {
	command(t, "", "systemctl", "stop", "virtbackupd.service")
	user := bustest.DialAs(t, systemBus, labuser)
	if reply, err := user.RequestName(dbus.BusName, doNotQueue); err == nil {
		t.Errorf("a user took the name: %v", reply)
	}
	if _, err := dbus.Get[dbus.ManagerProperties](t.Context(), rootClient(t), ""); err != nil {
		t.Errorf("the daemon is not started by a call: %v", err)
	}
}
