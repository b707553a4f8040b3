package bus

import (
	"sync"

	"github.com/virtbackup/virtbackup/dbus"
)

// How many calls may be in progress at once. A caller's connection is counted
// before anything is asked about it, its user afterwards. Root is held only to
// the limit of a connection: what others do must not lock it out.
const (
	callsPerSender = 32
	callsPerUser   = 64
	callsInAll     = 256
)

// limiter counts calls in progress.
type limiter struct {
	mu      sync.Mutex
	senders map[string]int
	users   map[uint32]int
	all     int
}

func newLimiter() *limiter {
	return &limiter{senders: make(map[string]int), users: make(map[uint32]int)}
}

// sender counts a call of a connection; done uncounts it.
func (l *limiter) sender(name string) (done func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.senders[name] >= callsPerSender {
		return nil, dbus.Errorf(dbus.ErrLimitsExceeded, "more than %d calls of one connection at once", callsPerSender)
	}
	l.senders[name]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		release(l.senders, name)
	}, nil
}

// user counts a call of a user; done uncounts it.
func (l *limiter) user(uid uint32) (done func(), err error) {
	if uid == 0 {
		return func() {}, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users[uid] >= callsPerUser {
		return nil, dbus.Errorf(dbus.ErrLimitsExceeded, "more than %d calls of one user at once", callsPerUser)
	}
	if l.all >= callsInAll {
		return nil, dbus.Errorf(dbus.ErrLimitsExceeded, "more than %d calls at once", callsInAll)
	}
	l.users[uid]++
	l.all++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		release(l.users, uid)
		l.all--
	}, nil
}

func release[K comparable](counts map[K]int, key K) {
	if counts[key]--; counts[key] == 0 {
		delete(counts, key)
	}
}
