// Package health watches repositories from outside of them: a probe worker of
// its own looks at each from time to time, and reads and writes a little. One
// whose storage does not answer hangs the probe, and nothing else; as long as it
// does, the repository is hung.
package health

import (
	"fmt"
	"time"
)

// State of a repository.
type State string

// The states, worst first but for Unknown.
const (
	Unknown     State = "unknown"     // nobody has looked yet
	Hung        State = "hung"        // its storage does not answer
	Gone        State = "gone"        // its storage is not there, or cannot be mounted
	Unavailable State = "unavailable" // what is there cannot be used: another repository, or none
	ReadOnly    State = "read-only"
	Full        State = "full"
	Slow        State = "slow"
	Online      State = "online"
)

// Look is what came of one look at a repository.
type Look struct {
	Hung    bool
	Gone    bool
	Problem string // why it cannot be used, or what is known of its not answering

	ReadOnly    bool
	NoSpace     bool // nothing could be written
	Free        uint64
	MinimumFree uint64
	Took        time.Duration // to read and write a little
	Slow        time.Duration // from when on that is slow
}

// Judge says what a look means, and tells it to people; "" if all is well.
func Judge(l Look) (State, string) {
	switch {
	case l.Hung:
		return Hung, l.Problem
	case l.Gone:
		return Gone, l.Problem
	case l.Problem != "":
		return Unavailable, l.Problem
	case l.ReadOnly:
		return ReadOnly, "the file system is read-only"
	case l.NoSpace:
		return Full, "no space is left"
	case l.Free < l.MinimumFree:
		return Full, fmt.Sprintf("%d bytes are free, and %d must stay free", l.Free, l.MinimumFree)
	case l.Took >= l.Slow && l.Slow > 0:
		return Slow, fmt.Sprintf("it took %s to write a little", l.Took.Round(time.Millisecond))
	}
	return Online, ""
}

// Settings are of when to look.
type Settings struct {
	Every time.Duration // at a repository that is in use, or was not online
	Idle  time.Duration // at any other
	Limit time.Duration // after which one that does not answer is hung
	Slow  time.Duration
}

// due tells whether it is time to look at a repository again.
func due(now, last time.Time, s State, busy bool, set Settings) bool {
	every := set.Idle
	if busy || s != Online {
		every = min(set.Every, set.Idle)
	}
	// A clock that was set back must not keep anybody from looking.
	return last.IsZero() || last.After(now) || now.Sub(last) >= every
}
