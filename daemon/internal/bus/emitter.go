package bus

import (
	"slices"
	"sync"
	"time"

	godbus "github.com/godbus/dbus/v5"
	"github.com/virtbackup/virtbackup/dbus"
)

// quiet is the least time between two PropertiesChanged of one object.
const quiet = 100 * time.Millisecond

// emitter sends signals, in the order of what they tell. Changes of an object
// that come faster than quiet become one signal; what follows about the same
// object waits for none, but takes the change along first.
type emitter struct {
	server *Server

	mu      sync.Mutex
	running bool
	queue   []event

	// changing are the properties of each interface that can change.
	changing map[string][]string

	queued chan struct{}
	ending chan struct{}
	ended  chan struct{}

	// The rest belongs to the goroutine.
	objects map[dbus.Ref]*emitted
}

// event is something to tell: a change when tell is nil.
type event struct {
	about dbus.Ref
	tell  func(e *emitter)
}

// emitted is when an object last had a signal, and whether it is to have one.
type emitted struct {
	last    time.Time
	changed bool
}

func newEmitter(s *Server, interfaces []dbus.Interface) *emitter {
	changing := make(map[string][]string)
	for _, i := range interfaces {
		changing[i.Name] = i.Changing()
	}
	return &emitter{
		server: s, queued: make(chan struct{}, 1), ending: make(chan struct{}),
		ended: make(chan struct{}), changing: changing, objects: make(map[dbus.Ref]*emitted),
	}
}

func (e *emitter) start() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running = true
	go e.run()
}

// stop sends what is left and ends the goroutine.
func (e *emitter) stop() {
	e.mu.Lock()
	e.running = false
	e.mu.Unlock()
	close(e.ending)
	<-e.ended
}

func (e *emitter) add(about dbus.Ref, tell func(e *emitter)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	same := func(q event) bool { return q.about == about && q.tell == nil }
	if !e.running || tell == nil && slices.ContainsFunc(e.queue, same) {
		return
	}
	e.queue = append(e.queue, event{about, tell})
	select {
	case e.queued <- struct{}{}:
	default:
	}
}

func (e *emitter) take() []event {
	e.mu.Lock()
	defer e.mu.Unlock()
	taken := e.queue
	e.queue = nil
	return taken
}

func (e *emitter) run() {
	defer close(e.ended)
	var due <-chan time.Time
	for last := false; !last; {
		select {
		case <-e.ending:
			last = true
		case <-e.queued:
		case <-due:
		}
		for _, event := range e.take() {
			e.handle(event)
		}
		due = e.emitDue(last)
	}
}

func (e *emitter) handle(event event) {
	o := e.objects[event.about]
	if event.tell == nil {
		if o == nil {
			o = &emitted{}
			e.objects[event.about] = o
		}
		o.changed = true
		return
	}
	if o != nil && o.changed {
		e.emitChange(event.about, o)
	}
	event.tell(e)
}

// emitDue emits the changes that were quiet for long enough, or all of them,
// and returns what tells when the next one is; nil for never.
func (e *emitter) emitDue(all bool) <-chan time.Time {
	next := time.Duration(-1)
	for ref, o := range e.objects {
		wait := quiet - time.Since(o.last)
		if !o.changed {
			if wait <= 0 {
				delete(e.objects, ref)
			}
			continue
		}
		if all || wait <= 0 {
			e.emitChange(ref, o)
		} else if next < 0 || wait < next {
			next = wait
		}
	}
	if next < 0 {
		return nil
	}
	return time.After(next)
}

// emitChange invalidates all properties of an object that can change. Which
// did is not looked up: a listener may have read a value in between, and must
// be told even when it is back at what it was.
func (e *emitter) emitChange(ref dbus.Ref, o *emitted) {
	o.changed, o.last = false, time.Now()
	e.emit(ref.Path(), dbus.InterfaceProperties+".PropertiesChanged",
		ref.Kind.Interface(), map[string]godbus.Variant{}, e.changing[ref.Kind.Interface()])
}

func (e *emitter) emit(path godbus.ObjectPath, name string, args ...any) {
	if err := e.server.conn.Emit(path, name, args...); err != nil {
		e.server.config.Log.Warn("cannot send a signal", "signal", name, "path", path, "error", err)
	}
}

// Added implements Notifier.
func (s *Server) Added(ref dbus.Ref) {
	s.emitter.add(ref, func(e *emitter) {
		e.emit(dbus.Root, dbus.InterfaceObjectManager+".InterfacesAdded", ref.Path(),
			map[string]map[string]godbus.Variant{ref.Kind.Interface(): {}})
	})
}

// Removed implements Notifier.
func (s *Server) Removed(ref dbus.Ref) {
	s.emitter.add(ref, func(e *emitter) {
		delete(e.objects, ref)
		e.emit(dbus.Root, dbus.InterfaceObjectManager+".InterfacesRemoved", ref.Path(), []string{ref.Kind.Interface()})
	})
}

// Changed implements Notifier.
func (s *Server) Changed(ref dbus.Ref) { s.emitter.add(ref, nil) }

// JobNew implements Notifier.
func (s *Server) JobNew(id string) {
	ref := dbus.Ref{Kind: dbus.KindJob, ID: id}
	s.emitter.add(ref, func(e *emitter) {
		e.emit(dbus.Root, dbus.KindManager.Interface()+".JobNew", id, ref.Path())
	})
}

// JobRemoved implements Notifier.
func (s *Server) JobRemoved(id string, result dbus.JobState) {
	ref := dbus.Ref{Kind: dbus.KindJob, ID: id}
	s.emitter.add(ref, func(e *emitter) {
		e.emit(dbus.Root, dbus.KindManager.Interface()+".JobRemoved", id, ref.Path(), string(result))
	})
}
