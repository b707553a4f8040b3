package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/policy"
)

// Authorizer decides about calls; policy.Polkit is the one of the daemon.
type Authorizer interface {
	// Authorize returns nil when the call may go on.
	Authorize(ctx context.Context, r policy.Request) error
}

// Config is what a Server needs.
type Config struct {
	// Address of the bus; empty for the system bus.
	Address    string
	Authorizer Authorizer
	Log        *slog.Logger
	// Level is what org.freedesktop.LogControl1 shows and sets.
	Level *slog.LevelVar
}

// Server is virtbackupd on the bus. It is a Notifier from the beginning;
// notifications before Start go nowhere, as nobody can have listened.
type Server struct {
	config     Config
	interfaces []dbus.Interface
	methods    map[string]method
	limits     *limiter
	callers    *callers
	emitter    *emitter

	// Set by Start before any call arrives.
	conn    *godbus.Conn
	backend Backend
	// ctx is given to the Backend; it ends with Stop.
	ctx    context.Context
	cancel context.CancelFunc
	// asking is given to the Authorizer; it ends when Stop begins, so that
	// nobody's password is waited for.
	asking     context.Context
	stopAsking context.CancelFunc

	mu       sync.Mutex
	stopping bool
	// calls are the ones being done. None is added when stopping is set.
	calls sync.WaitGroup
}

// New makes a Server that is not on the bus yet.
func New(config Config) (*Server, error) {
	interfaces, err := dbus.Interfaces()
	if err != nil {
		return nil, err
	}
	methods, err := apiMethods(interfaces)
	if err != nil {
		return nil, err
	}
	s := &Server{config: config, interfaces: interfaces, methods: methods, limits: newLimiter(), callers: newCallers()}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.asking, s.stopAsking = context.WithCancel(s.ctx)
	s.emitter = newEmitter(s, interfaces)
	return s, nil
}

// Start connects to the bus, and takes the name org.virtbackup1 when all else
// is ready to answer. It neither waits for the name nor takes it from another.
func (s *Server) Start(ctx context.Context, backend Backend) error {
	s.backend = backend
	conn, err := s.dial()
	if err != nil {
		return fmt.Errorf("cannot connect to the bus: %w", err)
	}
	s.conn = conn
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := s.introduce(ctx); err != nil {
		_ = conn.Close()
		return err
	}
	return nil
}

func (s *Server) dial() (*godbus.Conn, error) {
	handler := godbus.WithHandler(handler{s})
	if s.config.Address == "" {
		return godbus.SystemBusPrivate(handler)
	}
	return godbus.Dial(s.config.Address, handler)
}

func (s *Server) introduce(ctx context.Context) error {
	if err := s.conn.Auth(nil); err != nil {
		return fmt.Errorf("cannot authenticate with the bus: %w", err)
	}
	if err := s.conn.Hello(); err != nil {
		return fmt.Errorf("cannot say hello to the bus: %w", err)
	}
	if err := s.callers.follow(ctx, s.conn); err != nil {
		return fmt.Errorf("cannot listen for callers that go: %w", err)
	}
	s.emitter.start()
	reply, err := s.conn.RequestName(dbus.BusName, godbus.NameFlagDoNotQueue)
	if err != nil {
		return fmt.Errorf("cannot take the name %s: %w", dbus.BusName, err)
	}
	if reply != godbus.RequestNameReplyPrimaryOwner {
		return fmt.Errorf("cannot take the name %s: %s; is another virtbackupd running?", dbus.BusName, reply)
	}
	return nil
}

// Done is closed when the connection to the bus is lost, or stopped.
func (s *Server) Done() <-chan struct{} { return s.conn.Context().Done() }

// enter counts a call that is about to be done, unless the Server is stopping.
// Its caller is told what the bus says when nobody owns the name.
func (s *Server) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return errStopping()
	}
	s.calls.Add(1)
	return nil
}

func errStopping() error { return dbus.Errorf(dbus.ErrNoDaemon, "virtbackupd is stopping") }

// refusal is what the caller is told of a call that could not be authorized.
// Stop ends what is being asked: nobody decided then that the caller may not,
// and it can call again when the daemon is back.
func (s *Server) refusal(err error) error {
	if s.asking.Err() != nil {
		return errStopping()
	}
	return err
}

// Stop gives the name back, lets the calls that are being done finish until
// ctx is done, sends what is left to be told, and closes the connection.
func (s *Server) Stop(ctx context.Context) error {
	_, err := s.conn.ReleaseName(dbus.BusName)
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	s.stopAsking()
	finished := make(chan struct{})
	go func() {
		s.calls.Wait()
		close(finished)
	}()
	select {
	case <-finished:
	case <-ctx.Done():
		err = errors.Join(err, fmt.Errorf("calls were still being done: %w", ctx.Err()))
	}
	s.emitter.stop()
	s.cancel()
	return errors.Join(err, s.conn.Close())
}
