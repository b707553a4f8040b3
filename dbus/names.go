package dbus

import (
	"fmt"
	"strings"

	godbus "github.com/godbus/dbus/v5"
)

const (
	// BusName is the well-known name of virtbackupd.
	BusName = "org.virtbackup1"
	// Root is the path of the Manager and of the ObjectManager.
	Root godbus.ObjectPath = "/org/virtbackup1"
	// NoObject is the path that stands for no object.
	NoObject godbus.ObjectPath = "/"

	// InterfaceObjectManager, InterfaceProperties and InterfaceIntrospectable
	// are those of the D-Bus specification, "Standard Interfaces".
	InterfaceObjectManager  = "org.freedesktop.DBus.ObjectManager"
	InterfaceProperties     = "org.freedesktop.DBus.Properties"
	InterfaceIntrospectable = "org.freedesktop.DBus.Introspectable"
	// InterfaceLogControl is systemd's org.freedesktop.LogControl1(5), at
	// LogControlPath.
	InterfaceLogControl                   = "org.freedesktop.LogControl1"
	LogControlPath      godbus.ObjectPath = "/org/freedesktop/LogControl1"
)

// Kind is what an object is.
type Kind string

// The kinds of objects. There is one Manager, and its Ref has no ID.
const (
	KindManager    Kind = "manager"
	KindRepository Kind = "repository"
	KindOffering   Kind = "offering"
	KindSchedule   Kind = "schedule"
	KindDomain     Kind = "domain"
	KindChain      Kind = "chain"
	KindBackup     Kind = "backup"
	KindJob        Kind = "job"
)

// Kinds returns all kinds, the Manager first.
func Kinds() []Kind {
	return []Kind{KindManager, KindRepository, KindOffering, KindSchedule, KindDomain, KindChain, KindBackup, KindJob}
}

// Interface returns the name of the D-Bus interface of objects of the kind.
func (k Kind) Interface() string {
	return BusName + "." + strings.ToUpper(string(k[:1])) + string(k[1:])
}

// Managed tells whether objects of the kind are listed by the ObjectManager.
// Chains and backups are too many; the Manager is the ObjectManager itself.
func (k Kind) Managed() bool { return k != KindChain && k != KindBackup && k != KindManager }

// Ref names one object. ID consists of letters, digits and dashes: an ULID, or
// the UUID of a domain.
type Ref struct {
	Kind Kind
	ID   string
}

// Path returns the object path. A dash of the ID, which a path cannot hold, is
// an underscore there. It is NoObject for an empty Ref or a malformed ID.
func (r Ref) Path() godbus.ObjectPath {
	switch {
	case r.Kind == KindManager:
		return Root
	case r.Kind == "" || !validID(r.ID):
		return NoObject
	}
	return Root + godbus.ObjectPath("/"+string(r.Kind)+"/"+strings.ReplaceAll(r.ID, "-", "_"))
}

// String returns kind and ID, for messages.
func (r Ref) String() string {
	if r.Kind == KindManager {
		return string(r.Kind)
	}
	return fmt.Sprintf("%s %q", r.Kind, r.ID)
}

// ParsePath is the inverse of Ref.Path.
func ParsePath(path godbus.ObjectPath) (Ref, bool) {
	if path == Root {
		return Ref{Kind: KindManager}, true
	}
	rest, ok := strings.CutPrefix(string(path), string(Root)+"/")
	if !ok {
		return Ref{}, false
	}
	kind, label, _ := strings.Cut(rest, "/")
	ref := Ref{Kind: Kind(kind), ID: strings.ReplaceAll(label, "_", "-")}
	for _, k := range Kinds()[1:] {
		if k == ref.Kind {
			return ref, validID(ref.ID) && ref.Path() == path
		}
	}
	return Ref{}, false
}

func validID(id string) bool {
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && c != '-' {
			return false
		}
	}
	return id != "" && len(id) <= 64
}
