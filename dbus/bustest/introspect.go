package bustest

import (
	"encoding/xml"
	"errors"
	"strings"
	"testing"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
)

// Call is a method as introspection over the bus tells it, with arguments that
// it takes.
type Call struct {
	Path   godbus.ObjectPath
	Method string
	Args   []any
}

// Do makes the call. What the other side answers is a dbus.Error.
func (c Call) Do(conn *godbus.Conn) error {
	err := conn.Object(dbus.BusName, c.Path).Call(c.Method, 0, c.Args...).Err
	var remote godbus.Error
	if errors.As(err, &remote) {
		return &dbus.Error{Name: dbus.ErrorName(remote.Name), Message: remote.Error()}
	}
	return err
}

// Calls introspects a path of virtbackupd, and returns a call of each method
// there. Those that are open to everybody are left out: Introspect itself, and
// Peer.
func Calls(t testing.TB, conn *godbus.Conn, path godbus.ObjectPath) []Call {
	t.Helper()
	var text string
	if err := conn.Object(dbus.BusName, path).Call(dbus.InterfaceIntrospectable+".Introspect", 0).Store(&text); err != nil {
		t.Fatalf("cannot introspect %s: %v", path, err)
	}
	var node struct {
		Interfaces []dbus.Interface `xml:"interface"`
	}
	if err := xml.Unmarshal([]byte(text), &node); err != nil {
		t.Fatalf("cannot parse the introspection of %s: %v", path, err)
	}
	var calls []Call
	for _, i := range node.Interfaces {
		if i.Name == dbus.InterfaceIntrospectable || i.Name == "org.freedesktop.DBus.Peer" {
			continue
		}
		for _, m := range i.Methods {
			args := arguments(t, m.Signature("in"))
			if i.Name == dbus.InterfaceProperties {
				args[0] = ownInterface(path)
			}
			calls = append(calls, Call{path, i.Name + "." + m.Name, args})
		}
	}
	return calls
}

// ownInterface returns the interface whose properties an object has.
func ownInterface(path godbus.ObjectPath) string {
	if ref, ok := dbus.ParsePath(path); ok {
		return ref.Kind.Interface()
	}
	return dbus.InterfaceLogControl
}

// arguments returns some of the given signature.
func arguments(t testing.TB, signature string) []any {
	t.Helper()
	var args []any
	for len(signature) > 0 {
		length := 1
		switch {
		case strings.HasPrefix(signature, "as"):
			args, length = append(args, []string{}), len("as")
		case strings.HasPrefix(signature, "a{sv}"):
			args, length = append(args, map[string]godbus.Variant{}), len("a{sv}")
		case signature[0] == 's':
			args = append(args, "LogLevel")
		case signature[0] == 'u':
			args = append(args, uint32(1))
		case signature[0] == 'v':
			args = append(args, godbus.MakeVariant("debug"))
		default:
			t.Fatalf("no arguments for %q", signature)
		}
		signature = signature[length:]
	}
	return args
}
