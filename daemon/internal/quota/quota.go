// Package quota says how much a domain, an offering or a user may keep, and
// when that forbids the next backup.
//
// A quota is reached, not exceeded in advance: how large a backup becomes is not
// known before it is made. So the one that reaches it is kept, and the next is
// refused.
package quota

import "fmt"

// Limits bound what is kept. 0 is no bound.
type Limits struct {
	Bytes   uint64 // stored
	Backups int
	Chains  int
}

// Use is what there is. Backups that run take their place already.
type Use struct {
	Bytes         uint64
	Backups       int
	Chains        int
	Running       int // backups being made
	RunningChains int // of those, how many start a chain
}

// Forbids says why one more backup is not allowed; "" if it is. startsChain
// tells whether it would be the first of a chain.
func (l Limits) Forbids(u Use, startsChain bool) string {
	switch {
	case l.Bytes > 0 && u.Bytes >= l.Bytes:
		return fmt.Sprintf("%d of %d bytes are used", u.Bytes, l.Bytes)
	case l.Backups > 0 && u.Backups+u.Running >= l.Backups:
		return fmt.Sprintf("%d of %d backups are used", u.Backups+u.Running, l.Backups)
	case startsChain && l.Chains > 0 && u.Chains+u.RunningChains >= l.Chains:
		return fmt.Sprintf("%d of %d chains are used, and this backup would start one", u.Chains+u.RunningChains, l.Chains)
	}
	return ""
}
