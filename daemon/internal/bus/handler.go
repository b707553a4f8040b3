package bus

import (
	"context"
	"errors"
	"maps"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/policy"
)

// call is a method call as it came in. Its arguments were decoded for it
// alone, so nobody else can change them.
type call struct {
	sender      string
	path        godbus.ObjectPath
	iface       string
	member      string
	signature   string
	interactive bool
	args        []any
}

// Errors of the D-Bus specification for calls that nothing answers to.
const (
	unknownObject    dbus.ErrorName = "org.freedesktop.DBus.Error.UnknownObject"
	unknownInterface dbus.ErrorName = "org.freedesktop.DBus.Error.UnknownInterface"
	unknownMethod    dbus.ErrorName = "org.freedesktop.DBus.Error.UnknownMethod"
	unknownProperty  dbus.ErrorName = "org.freedesktop.DBus.Error.UnknownProperty"
	propertyReadOnly dbus.ErrorName = "org.freedesktop.DBus.Error.PropertyReadOnly"
	invalidArgs      dbus.ErrorName = "org.freedesktop.DBus.Error.InvalidArgs"
)

// handler, object, iface and member lead godbus from a message to handle. They
// accept everything: handle decides.
type (
	handler struct{ server *Server }
	iface   struct{ server *Server }
	member  struct{ server *Server }
)

// LookupObject implements godbus.Handler.
func (h handler) LookupObject(godbus.ObjectPath) (godbus.ServerObject, bool) { return h, true }

// LookupInterface implements godbus.ServerObject.
func (h handler) LookupInterface(string) (godbus.Interface, bool) { return iface(h), true }

// LookupMethod implements godbus.Interface.
func (i iface) LookupMethod(string) (godbus.Method, bool) { return member(i), true }

// DecodeArguments implements godbus.ArgumentDecoder: it keeps the whole call.
func (m member) DecodeArguments(_ *godbus.Conn, sender string, msg *godbus.Message, args []any) ([]any, error) {
	c := call{sender: sender, interactive: msg.Flags&godbus.FlagAllowInteractiveAuthorization != 0, args: args}
	c.path, _ = msg.Headers[godbus.FieldPath].Value().(godbus.ObjectPath)
	c.iface, _ = msg.Headers[godbus.FieldInterface].Value().(string)
	c.member, _ = msg.Headers[godbus.FieldMember].Value().(string)
	if signature, ok := msg.Headers[godbus.FieldSignature].Value().(godbus.Signature); ok {
		c.signature = signature.String()
	}
	return []any{c}, nil
}

// Call implements godbus.Method.
func (m member) Call(args ...any) ([]any, error) {
	if err := m.server.enter(); err != nil {
		return nil, err
	}
	defer m.server.calls.Done()
	out, err := m.server.handle(args[0].(call))
	if err != nil {
		return nil, dbus.ToError(err)
	}
	return out, nil
}

// NumArguments, NumReturns, ArgumentValue and ReturnValue implement
// godbus.Method; with DecodeArguments there, godbus does not use them.
func (member) NumArguments() int     { return 0 }
func (member) NumReturns() int       { return 0 }
func (member) ArgumentValue(int) any { return nil }
func (member) ReturnValue(int) any   { return nil }

// request is a call that is understood.
type request struct {
	// about is the object that is called; its record gives polkit's details.
	about dbus.Ref
	// mentions are the things that the arguments name, which the details tell
	// in place of the object's own.
	mentions []mention
	// names are details of things that are yet to be made; an empty one takes
	// a detail away.
	names map[string]string
	// apart returns the details of things each of which is to be authorized by
	// itself, in place of the whole; nil for the whole.
	apart func(ctx context.Context, s *Server) ([]map[string]string, error)
	// run does it.
	run func(ctx context.Context, s *Server, c Caller) ([]any, error)
}

// mention is a name or id in an argument.
type mention struct {
	kind dbus.Kind
	name string
}

// handle takes a call from its arrival to its answer. What is asked of the
// Backend before the call is authorized only tells polkit what the call is
// about; that something does not exist is said only afterwards.
func (s *Server) handle(c call) ([]any, error) {
	done, err := s.limits.sender(c.sender)
	if err != nil {
		return nil, err
	}
	defer done()
	r, err := s.parse(c)
	if err != nil {
		return nil, err
	}
	ctx, leave := s.callers.whileThere(s.asking, c.sender)
	defer leave()
	id, err := uid(ctx, s.conn, c.sender)
	if err != nil {
		return nil, s.refusal(err)
	}
	done, err = s.limits.user(id)
	if err != nil {
		return nil, err
	}
	defer done()
	asked := policy.Request{Sender: c.sender, UID: id, Method: c.iface + "." + c.member, Interactive: c.interactive}
	if err := s.authorize(ctx, r, asked); err != nil {
		return nil, s.refusal(err)
	}
	s.config.Log.Debug("call", "method", asked.Method, "path", c.path, "uid", id, "sender", c.sender)
	// From here on the call is done even when its caller goes.
	return r.run(s.ctx, s, Caller{UID: id, Sender: c.sender})
}

// authorize asks whether a request may go on: about the whole, or about each of
// its parts.
func (s *Server) authorize(ctx context.Context, r request, asked policy.Request) error {
	var parts []map[string]string
	var missing error
	if r.apart != nil {
		parts, missing = r.apart(ctx, s)
	}
	if r.apart == nil || len(parts) == 0 {
		details, err := s.details(ctx, r)
		parts, missing = append(parts, details), errors.Join(missing, err)
	}
	for _, details := range parts {
		asked.Details = details
		if err := s.config.Authorizer.Authorize(ctx, asked); err != nil {
			return err
		}
	}
	return missing
}

// parse understands a call, or says why it cannot be.
func (s *Server) parse(c call) (request, error) {
	ref, isObject := dbus.ParsePath(c.path)
	name := c.iface + "." + c.member
	if standard, ok := standardMethods()[name]; ok {
		if c.signature != standard.in {
			return request{}, dbus.Errorf(invalidArgs, "%s takes %q, not %q", name, standard.in, c.signature)
		}
		return standard.parse(c)
	}
	if !isObject {
		return request{}, dbus.Errorf(unknownObject, "there is no object at %s", c.path)
	}
	if c.iface != ref.Kind.Interface() {
		return request{}, dbus.Errorf(unknownInterface, "a %s does not have the interface %q", ref.Kind, c.iface)
	}
	m, ok := s.methods[name]
	if !ok {
		return request{}, dbus.Errorf(unknownMethod, "%s has no method %q", c.iface, c.member)
	}
	if c.signature != m.in {
		return request{}, dbus.Errorf(invalidArgs, "%s takes %q, not %q", name, m.in, c.signature)
	}
	r, err := m.parse(ref, arguments(c.args))
	r.about = ref
	return r, err
}

// details returns what polkit is told of a request, and an error when one of
// the things that it is about does not exist.
func (s *Server) details(ctx context.Context, r request) (map[string]string, error) {
	details := map[string]string{}
	var missing error
	if r.about.Kind != dbus.KindManager && r.about.Kind != "" {
		record, err := s.backend.Object(ctx, r.about)
		if err == nil {
			details = record.Details()
		}
		missing = err
	}
	for k := range r.names {
		delete(details, k)
	}
	for _, m := range r.mentions {
		record, err := s.find(ctx, m)
		if err != nil {
			missing = err
			continue
		}
		maps.Copy(details, record.Details())
	}
	for k, v := range r.names {
		if v != "" {
			details[k] = v
		}
	}
	s.addRepository(ctx, details)
	return details, missing
}

func (s *Server) find(ctx context.Context, m mention) (dbus.Record, error) {
	ref, err := s.backend.Find(ctx, m.kind, m.name)
	if err != nil {
		return nil, err
	}
	return s.backend.Object(ctx, ref)
}

// addRepository adds the repository of the offering, where that is known only
// by the offering. Without it a rule about the repository does not apply.
func (s *Server) addRepository(ctx context.Context, details map[string]string) {
	offering := details[dbus.DetailOffering]
	if offering == "" || details[dbus.DetailRepository] != "" {
		return
	}
	if record, err := s.find(ctx, mention{dbus.KindOffering, offering}); err == nil {
		maps.Copy(details, record.Details())
	}
}
