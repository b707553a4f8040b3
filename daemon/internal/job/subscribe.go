package job

import "sync"

// subscriber hands changes to one function. Changes of a job that come faster
// than the function takes them are merged, so that a slow one holds up nobody.
type subscriber struct {
	mu      sync.Mutex
	changed *sync.Cond
	closed  bool
	order   []string // ids of the jobs with a change to tell
	latest  map[string]Status
}

// Subscribe calls fn with the status of each job that changes, one call at a
// time. A job is told again when it changed again; states in between may be
// left out, its end is not. After cancel returns, fn is not called any more
// (cancel must not be called from fn).
func (e *Engine) Subscribe(fn func(Status)) (cancel func()) {
	s := &subscriber{latest: map[string]Status{}}
	s.changed = sync.NewCond(&s.mu)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			st, ok := s.next()
			if !ok {
				return
			}
			fn(st)
		}
	}()
	e.mu.Lock()
	e.subscribers[s] = struct{}{}
	e.mu.Unlock()
	return func() {
		e.mu.Lock()
		delete(e.subscribers, s)
		e.mu.Unlock()
		s.close()
		<-done
	}
}

// publish tells the subscribers about a job. The engine's mutex is held.
func (e *Engine) publish(en *entry) {
	st := en.status()
	for s := range e.subscribers {
		s.put(st)
	}
}

func (s *subscriber) put(st Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, waiting := s.latest[st.ID]; !waiting {
		s.order = append(s.order, st.ID)
	}
	s.latest[st.ID] = st
	s.changed.Signal()
}

func (s *subscriber) next() (Status, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.order) == 0 && !s.closed {
		s.changed.Wait()
	}
	if len(s.order) == 0 { // all told before it ends
		return Status{}, false
	}
	id := s.order[0]
	s.order = s.order[1:]
	st := s.latest[id]
	delete(s.latest, id)
	return st, true
}

func (s *subscriber) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.changed.Signal()
}
