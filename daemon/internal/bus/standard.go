package bus

import (
	"context"
	_ "embed"
	"fmt"
	"log/slog"
	"strings"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/policy"
)

// standard is a method of a standard interface: it is parsed by path, as it is
// answered for more than one kind of object.
type standard struct {
	in    string
	parse func(c call) (request, error)
}

const getManagedObjects = dbus.InterfaceObjectManager + ".GetManagedObjects"

func standardMethods() map[string]standard {
	return map[string]standard{
		getManagedObjects:                            {"", managedObjects},
		dbus.InterfaceProperties + ".Get":            {"ss", getProperty},
		dbus.InterfaceProperties + ".GetAll":         {"s", getProperties},
		dbus.InterfaceProperties + ".Set":            {"ssv", setProperty},
		dbus.InterfaceIntrospectable + ".Introspect": {"", introspect},
	}
}

func managedObjects(c call) (request, error) {
	if c.path != dbus.Root {
		return request{}, dbus.Errorf(unknownInterface, "the ObjectManager is at %s", dbus.Root)
	}
	return request{run: func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		records, err := s.backend.Objects(ctx)
		all := make(map[godbus.ObjectPath]map[string]map[string]godbus.Variant, len(records))
		for _, r := range records {
			all[r.Ref().Path()] = map[string]map[string]godbus.Variant{r.Ref().Kind.Interface(): dbus.EncodeRecord(r)}
		}
		return []any{all}, err
	}}, nil
}

// properties reads the properties that a call asks for, when it is allowed to.
type properties func(ctx context.Context, s *Server) (map[string]godbus.Variant, error)

// readable finds whose properties a call is about.
func readable(c call) (dbus.Ref, properties, error) {
	asked := arguments(c.args).text(0)
	ref, ok := dbus.ParsePath(c.path)
	switch {
	case c.path == dbus.LogControlPath && asked == dbus.InterfaceLogControl:
		return dbus.Ref{}, func(_ context.Context, s *Server) (map[string]godbus.Variant, error) { return s.logControl(), nil }, nil
	case c.path == dbus.LogControlPath:
		return dbus.Ref{}, noProperties, unlessStandard(asked)
	case !ok:
		return dbus.Ref{}, nil, dbus.Errorf(unknownObject, "there is no object at %s", c.path)
	case asked != ref.Kind.Interface():
		return ref, noProperties, unlessStandard(asked)
	}
	return ref, func(ctx context.Context, s *Server) (map[string]godbus.Variant, error) { return s.read(ctx, ref) }, nil
}

func noProperties(context.Context, *Server) (map[string]godbus.Variant, error) {
	return map[string]godbus.Variant{}, nil
}

// unlessStandard refuses an interface that the object does not have; the
// standard ones have no properties.
func unlessStandard(name string) error {
	switch name {
	case dbus.InterfaceIntrospectable, dbus.InterfaceObjectManager, dbus.InterfaceProperties, "org.freedesktop.DBus.Peer":
		return nil
	}
	return dbus.Errorf(unknownInterface, "the object does not have the interface %q", name)
}

// read reads the properties of an object.
func (s *Server) read(ctx context.Context, ref dbus.Ref) (map[string]godbus.Variant, error) {
	if ref.Kind == dbus.KindManager {
		manager, err := s.backend.Manager(ctx)
		return dbus.EncodeRecord(manager), err
	}
	record, err := s.backend.Object(ctx, ref)
	if err != nil {
		return nil, err
	}
	return dbus.EncodeRecord(record), nil
}

func getProperties(c call) (request, error) {
	ref, read, err := readable(c)
	return request{about: ref, run: func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		all, err := read(ctx, s)
		return []any{all}, err
	}}, err
}

func getProperty(c call) (request, error) {
	ref, read, err := readable(c)
	name := arguments(c.args).text(1)
	return request{about: ref, run: func(ctx context.Context, s *Server, _ Caller) ([]any, error) {
		all, err := read(ctx, s)
		if err != nil {
			return nil, err
		}
		value, ok := all[name]
		if !ok {
			return nil, dbus.Errorf(unknownProperty, "there is no property %q", name)
		}
		return []any{value}, nil
	}}, err
}

func setProperty(c call) (request, error) {
	asked, name := arguments(c.args).text(0), arguments(c.args).text(1)
	if c.path != dbus.LogControlPath || asked != dbus.InterfaceLogControl || name != "LogLevel" {
		return request{run: func(context.Context, *Server, Caller) ([]any, error) {
			return nil, dbus.Errorf(propertyReadOnly, "the property %q cannot be written", name)
		}}, nil
	}
	text, ok := c.args[2].(godbus.Variant).Value().(string)
	level, known := levelOf(text)
	if !ok || !known {
		return request{}, dbus.Errorf(invalidArgs, "LogLevel is one of those of syslog: emerg to debug")
	}
	return request{run: func(_ context.Context, s *Server, caller Caller) ([]any, error) {
		s.config.Level.Set(level)
		s.config.Log.Info("log level set", "level", text, "uid", caller.UID)
		return nil, nil
	}}, nil
}

// levelOf returns the slog level of a syslog level, as log levels of
// org.freedesktop.LogControl1 are.
func levelOf(text string) (slog.Level, bool) {
	switch text {
	case "emerg", "alert", "crit", "err":
		return slog.LevelError, true
	case "warning":
		return slog.LevelWarn, true
	case "notice", "info":
		return slog.LevelInfo, true
	case "debug":
		return slog.LevelDebug, true
	}
	return 0, false
}

// logControl returns the properties of org.freedesktop.LogControl1.
func (s *Server) logControl() map[string]godbus.Variant {
	level := "debug"
	switch l := s.config.Level.Level(); {
	case l >= slog.LevelError:
		level = "err"
	case l >= slog.LevelWarn:
		level = "warning"
	case l >= slog.LevelInfo:
		level = "info"
	}
	return map[string]godbus.Variant{
		"LogLevel": godbus.MakeVariant(level), "LogTarget": godbus.MakeVariant("journal"),
		"SyslogIdentifier": godbus.MakeVariant("virtbackupd"),
	}
}

//go:embed introspection/object.xml
var objectXML string

//go:embed introspection/manager.xml
var managerXML string

//go:embed introspection/logcontrol.xml
var logControlXML string

// introspect describes a path. Everybody may ask: the answer for an object is
// the same whether or not it exists, and the objects of a kind are listed only
// for those who may see them all.
func introspect(c call) (request, error) {
	path := string(c.path)
	ref, isObject := dbus.ParsePath(c.path)
	switch {
	case isObject:
		return described(ref)
	case c.path == dbus.LogControlPath:
		return node(objectXML+logControlXML, nil)
	}
	if kind, ok := strings.CutPrefix(path, string(dbus.Root)+"/"); ok {
		return kindNode(c, dbus.Kind(kind))
	}
	children := make(map[string]bool)
	for _, known := range []godbus.ObjectPath{dbus.Root, dbus.LogControlPath} {
		if below, ok := strings.CutPrefix(string(known), strings.TrimSuffix(path, "/")+"/"); ok {
			child, _, _ := strings.Cut(below, "/")
			children[child] = true
		}
	}
	if len(children) == 0 {
		return request{}, dbus.Errorf(unknownObject, "there is no object at %s", path)
	}
	return node("", children)
}

// described introspects an object.
func described(ref dbus.Ref) (request, error) {
	return request{run: func(_ context.Context, s *Server, _ Caller) ([]any, error) {
		body := objectXML
		children := make(map[string]bool)
		if ref.Kind == dbus.KindManager {
			body += managerXML
			for _, kind := range dbus.Kinds()[1:] {
				children[string(kind)] = true
			}
		}
		for _, i := range s.interfaces {
			if i.Name == ref.Kind.Interface() {
				body += i.XML
			}
		}
		return []any{nodeXML(body, children)}, nil
	}}, nil
}

// kindNode introspects the node above the objects of a kind.
func kindNode(c call, kind dbus.Kind) (request, error) {
	return request{run: func(ctx context.Context, s *Server, caller Caller) ([]any, error) {
		children := make(map[string]bool)
		list := policy.Request{Sender: caller.Sender, UID: caller.UID, Method: getManagedObjects}
		if s.config.Authorizer.Authorize(ctx, list) == nil {
			records, err := s.backend.Objects(ctx)
			if err != nil {
				return nil, err
			}
			for _, r := range records {
				if r.Ref().Kind == kind {
					children[strings.TrimPrefix(string(r.Ref().Path()), string(c.path)+"/")] = true
				}
			}
		}
		return []any{nodeXML("", children)}, nil
	}}, nil
}

func node(body string, children map[string]bool) (request, error) {
	return request{run: func(context.Context, *Server, Caller) ([]any, error) {
		return []any{nodeXML(body, children)}, nil
	}}, nil
}

func nodeXML(body string, children map[string]bool) string {
	var b strings.Builder
	b.WriteString(`<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"` + "\n" +
		`  "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">` + "\n<node>\n" + body)
	for child := range children {
		fmt.Fprintf(&b, "  <node name=%q/>\n", child)
	}
	b.WriteString("</node>\n")
	return b.String()
}
