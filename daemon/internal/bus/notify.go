package bus

import "github.com/virtbackup/virtbackup/dbus"

// Notifier is told by a Backend what became of its objects; Server is one.
// Its methods do not wait, and may be called at any time.
type Notifier interface {
	// Added and Removed say that a managed object appeared or went.
	Added(ref dbus.Ref)
	Removed(ref dbus.Ref)
	// Changed says that properties of an object, or of the Manager, may read
	// differently now. Many in a short time become one signal.
	Changed(ref dbus.Ref)
	// JobNew and JobRemoved are the Manager's signals; Added and Removed are
	// called as well for the managed object.
	JobNew(id string)
	JobRemoved(id string, result dbus.JobState)
}
