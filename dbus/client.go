package dbus

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"

	godbus "github.com/godbus/dbus/v5"
)

// ErrNoDaemon is what a Client's call fails with when virtbackupd cannot be
// reached, or went away before it answered.
const ErrNoDaemon ErrorName = "org.freedesktop.DBus.Error.ServiceUnknown"

// Client calls virtbackupd. Its methods may be used by many goroutines at
// once; objects are named by their ids.
type Client struct {
	conn *godbus.Conn
	// Interactive lets polkit ask the person at the terminal or desktop for a
	// password. Calls may then take as long as that person does.
	Interactive bool
}

// ConnectSystem connects to the system bus. The context is for connecting only.
func ConnectSystem(ctx context.Context) (*Client, error) {
	conn, err := godbus.SystemBusPrivate()
	return hello(ctx, conn, err)
}

// Connect connects to the bus at a D-Bus address.
func Connect(ctx context.Context, address string) (*Client, error) {
	conn, err := godbus.Dial(address)
	return hello(ctx, conn, err)
}

// ConnectPipe connects to the bus at the other end of a pipe, as that of
// systemd-stdio-bridge(1) on another host, and takes the pipe over.
func ConnectPipe(ctx context.Context, pipe io.ReadWriteCloser) (*Client, error) {
	conn, err := godbus.NewConn(pipe)
	return hello(ctx, conn, err)
}

func hello(ctx context.Context, conn *godbus.Conn, err error) (*Client, error) {
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the bus: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	err = conn.Auth(nil)
	if err == nil {
		err = conn.Hello()
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot introduce ourselves to the bus: %w", err)
	}
	return NewClient(conn), nil
}

// NewClient makes a Client of a connection that said Hello, and takes it over:
// for one over a pipe to another host's systemd-stdio-bridge, as an example.
func NewClient(conn *godbus.Conn) *Client { return &Client{conn: conn} }

// Close closes the connection. Calls that wait fail.
func (c *Client) Close() error { return c.conn.Close() }

// call calls a method and stores its results. It makes the message itself,
// because godbus' Object.Call drops FlagAllowInteractiveAuthorization.
func (c *Client) call(ctx context.Context, path godbus.ObjectPath, method string, flags godbus.Flags, args []any, results ...any) error {
	if path == NoObject {
		return Errorf(ErrNotFound, "no object has that id")
	}
	dot := strings.LastIndexByte(method, '.')
	if c.Interactive {
		flags |= godbus.FlagAllowInteractiveAuthorization
	}
	msg := &godbus.Message{
		Type: godbus.TypeMethodCall, Flags: flags, Body: args,
		Headers: map[godbus.HeaderField]godbus.Variant{
			godbus.FieldDestination: godbus.MakeVariant(BusName),
			godbus.FieldPath:        godbus.MakeVariant(path),
			godbus.FieldInterface:   godbus.MakeVariant(method[:dot]),
			godbus.FieldMember:      godbus.MakeVariant(method[dot+1:]),
		},
	}
	if len(args) > 0 {
		msg.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(args...))
	}
	call := <-c.conn.SendWithContext(ctx, msg, make(chan *godbus.Call, 1)).Done
	if call.Err != nil {
		return fromCall(call.Err)
	}
	if err := call.Store(results...); err != nil {
		return fmt.Errorf("cannot read the answer to %s: %w", method, err)
	}
	return nil
}

// object calls a method of the API on an object.
func (c *Client) object(ctx context.Context, ref Ref, member string, args []any, results ...any) error {
	return c.call(ctx, ref.Path(), ref.Kind.Interface()+"."+member, 0, args, results...)
}

func (c *Client) manager(ctx context.Context, member string, args []any, results ...any) error {
	return c.object(ctx, Ref{Kind: KindManager}, member, args, results...)
}

// job calls a method that returns the path of a job, and returns its id.
func (c *Client) job(ctx context.Context, ref Ref, member string, args ...any) (string, error) {
	var path godbus.ObjectPath
	if err := c.object(ctx, ref, member, args, &path); err != nil {
		return "", err
	}
	return idOf(path, KindJob)
}

// find calls a method of the Manager that returns the path of an object.
func (c *Client) find(ctx context.Context, kind Kind, member string, args ...any) (string, error) {
	var path godbus.ObjectPath
	if err := c.manager(ctx, member, args, &path); err != nil {
		return "", err
	}
	return idOf(path, kind)
}

func idOf(path godbus.ObjectPath, kind Kind) (string, error) {
	if path == NoObject {
		return "", nil
	}
	ref, ok := ParsePath(path)
	if !ok || ref.Kind != kind {
		return "", fmt.Errorf("virtbackupd answered with %q, and a %s is expected", path, kind)
	}
	return ref.ID, nil
}

// Get reads the properties of an object: Get[JobProperties](ctx, c, id). The
// Manager has no id.
func Get[R Record](ctx context.Context, c *Client, id string) (R, error) {
	return get[R](ctx, c, id, 0)
}

func get[R Record](ctx context.Context, c *Client, id string, flags godbus.Flags) (R, error) {
	var record R
	ref := Ref{Kind: record.Ref().Kind, ID: id}
	var properties map[string]godbus.Variant
	err := c.call(ctx, ref.Path(), InterfaceProperties+".GetAll", flags, []any{ref.Kind.Interface()}, &properties)
	if err != nil {
		return record, err
	}
	if err := DecodeRecord(properties, &record); err != nil {
		return record, fmt.Errorf("cannot read the properties of %s: %w", ref, err)
	}
	return record, nil
}

// Objects are all managed objects, in the order of their paths.
type Objects struct {
	Repositories []RepositoryProperties
	Offerings    []OfferingProperties
	Schedules    []ScheduleProperties
	Domains      []string // UUIDs; Client.Domains tells the rest
	Jobs         []JobProperties
}

// Objects reads all managed objects at once.
func (c *Client) Objects(ctx context.Context) (Objects, error) {
	var managed map[godbus.ObjectPath]map[string]map[string]godbus.Variant
	if err := c.call(ctx, Root, InterfaceObjectManager+".GetManagedObjects", 0, nil, &managed); err != nil {
		return Objects{}, err
	}
	byPath := make(map[string]map[string]map[string]godbus.Variant, len(managed))
	for path, interfaces := range managed {
		byPath[string(path)] = interfaces
	}
	var o Objects
	var errs []error
	for _, path := range sortedKeys(byPath) {
		interfaces := byPath[path]
		if ref, ok := ParsePath(godbus.ObjectPath(path)); ok && ref.Kind == KindDomain {
			o.Domains = append(o.Domains, ref.ID)
		}
		errs = append(errs,
			appendRecord(&o.Repositories, interfaces), appendRecord(&o.Offerings, interfaces), appendRecord(&o.Schedules, interfaces),
			appendRecord(&o.Jobs, interfaces))
	}
	return o, errors.Join(errs...)
}

func appendRecord[R Record](list *[]R, interfaces map[string]map[string]godbus.Variant) error {
	var record R
	properties, ok := interfaces[record.Ref().Kind.Interface()]
	if !ok {
		return nil
	}
	if err := DecodeRecord(properties, &record); err != nil {
		return fmt.Errorf("cannot read the properties of a %s: %w", record.Ref().Kind, err)
	}
	*list = append(*list, record)
	return nil
}

// Repositories lists all repositories, by name.
func (c *Client) Repositories(ctx context.Context) ([]RepositoryProperties, error) {
	return list[RepositoryProperties](ctx, c, Ref{Kind: KindManager}, "ListRepositories")
}

// Offerings lists all offerings, by name.
func (c *Client) Offerings(ctx context.Context) ([]OfferingProperties, error) {
	return list[OfferingProperties](ctx, c, Ref{Kind: KindManager}, "ListOfferings")
}

// Schedules lists all schedules, by name.
func (c *Client) Schedules(ctx context.Context) ([]ScheduleProperties, error) {
	return list[ScheduleProperties](ctx, c, Ref{Kind: KindManager}, "ListSchedules")
}

// DomainPage is one page of Manager.ListDomains.
type DomainPage struct {
	Domains []DomainProperties
	// Counts says, of all that the filter selects, how many are protected how.
	Counts map[Protection]uint32
	Next   string // the cursor; empty on the last page
}

// DomainPage reads one page of domains, those first that need somebody to look
// at them; limit as of the API.
func (c *Client) DomainPage(ctx context.Context, f DomainFilter, cursor string, limit uint32) (page DomainPage, err error) {
	var domains []map[string]godbus.Variant
	var counts map[string]uint32
	if err := c.manager(ctx, "ListDomains", []any{EncodeOptions(f), cursor, limit}, &domains, &counts, &page.Next); err != nil {
		return page, err
	}
	page.Domains, page.Counts = make([]DomainProperties, len(domains)), make(map[Protection]uint32, len(counts))
	for i, properties := range domains {
		if err := DecodeRecord(properties, &page.Domains[i]); err != nil {
			return page, err
		}
	}
	for protection, n := range counts {
		page.Counts[Protection(protection)] = n
	}
	return page, nil
}

// Domains lists domains as Backups does backups, in the order of DomainPage.
func (c *Client) Domains(ctx context.Context, f DomainFilter) iter.Seq2[DomainProperties, error] {
	return pages(func(cursor string, limit uint32) ([]DomainProperties, string, error) {
		page, err := c.DomainPage(ctx, f, cursor, limit)
		return page.Domains, page.Next, err
	})
}

// Backups lists backups, newest first. It asks for pages as they are needed,
// and yields one error at most, as the last.
func (c *Client) Backups(ctx context.Context, f BackupFilter) iter.Seq2[BackupProperties, error] {
	return listed[BackupProperties](ctx, c, "ListBackups", EncodeOptions(f))
}

// Chains lists chains as Backups does backups.
func (c *Client) Chains(ctx context.Context, f ChainFilter) iter.Seq2[ChainProperties, error] {
	return listed[ChainProperties](ctx, c, "ListChains", EncodeOptions(f))
}

// Jobs lists jobs as Backups does backups.
func (c *Client) Jobs(ctx context.Context, f JobFilter) iter.Seq2[JobProperties, error] {
	return listed[JobProperties](ctx, c, "ListJobs", EncodeOptions(f))
}

func listed[R Record](ctx context.Context, c *Client, member string, filters map[string]godbus.Variant) iter.Seq2[R, error] {
	return pages(func(cursor string, limit uint32) ([]R, string, error) {
		var page []map[string]godbus.Variant
		var next string
		if err := c.manager(ctx, member, []any{filters, cursor, limit}, &page, &next); err != nil {
			return nil, "", err
		}
		all := make([]R, len(page))
		for i, properties := range page {
			if err := DecodeRecord(properties, &all[i]); err != nil {
				return nil, "", err
			}
		}
		return all, next, nil
	})
}

// The first page is as large as what people look at, the others as large as can be.
const (
	firstPage = 100
	laterPage = 1000
)

// pages yields what pages hold, read as they are needed.
func pages[R any](read func(cursor string, limit uint32) ([]R, string, error)) iter.Seq2[R, error] {
	return func(yield func(R, error) bool) {
		cursor, limit := "", uint32(firstPage)
		for {
			page, next, err := read(cursor, limit)
			if err != nil {
				var none R
				yield(none, err)
				return
			}
			for _, one := range page {
				if !yield(one, nil) {
					return
				}
			}
			if next == "" {
				return
			}
			cursor, limit = next, laterPage
		}
	}
}
