package hypervisor

import (
	"context"
	"fmt"
	"sync"

	"libvirt.org/go/libvirt"
)

// EventKind says what an Event is about.
type EventKind string

// The kinds of events.
const (
	EventLifecycle     EventKind = "lifecycle"      // Action: defined, undefined, started, suspended, resumed, stopped, shutdown, pmsuspended, crashed; Detail as libvirt names it
	EventReboot        EventKind = "reboot"         // the guest was reset
	EventDeviceAdded   EventKind = "device-added"   // Device is the alias
	EventDeviceRemoved EventKind = "device-removed" // Device is the alias
	EventDiskChange    EventKind = "disk-change"    // Device is the alias
	EventTrayChange    EventKind = "tray-change"    // Device is the alias; Action: open, close
	EventBlockJob      EventKind = "block-job"      // Device is the target; Action: job type; Detail: completed, failed, canceled, ready
	EventThreshold     EventKind = "threshold"      // a disk was filled beyond a limit that was set; Device is the target, with the index of a layer ("vda[1]")
	EventMetadata      EventKind = "metadata"       // the domain's metadata was changed; Action: title, description, or the URI of an element
	EventJobCompleted  EventKind = "job-completed"  // Action: backup or other; Success and Detail (error)
	EventAgent         EventKind = "agent"          // Action: connected, disconnected
	EventIOError       EventKind = "io-error"       // Device is the alias; Detail is the reason ("enospc")
	EventControlError  EventKind = "control-error"  // libvirt lost QEMU's monitor
	EventSnapshot      EventKind = "snapshot"       // libvirt wrote down a snapshot; only Name is known, or nothing
	EventMissed        EventKind = "missed"         // events may have been missed: libvirtd was away, or the receiver was too slow
)

// Event is something that happened to a domain. UUID and Name are empty for
// EventMissed.
type Event struct {
	Kind           EventKind
	UUID, Name     string
	Action, Detail string
	Device         string
	Success        bool // EventJobCompleted only
}

const subscriberBuffer = 1024

// subscribers are the receivers of events. The zero value is ready.
type subscribers struct {
	mu     sync.Mutex
	all    map[chan Event]*bool // the channel, and whether it missed something
	closed bool
}

// Subscribe returns a channel of events. It is closed when ctx ends or the
// Hypervisor is closed. A receiver that is more than a thousand events behind
// loses events and gets an EventMissed in their place.
func (h *Hypervisor) Subscribe(ctx context.Context) <-chan Event {
	ch := make(chan Event, subscriberBuffer)
	s := &h.subs
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		close(ch)
		return ch
	}
	if s.all == nil {
		s.all = make(map[chan Event]*bool)
	}
	s.all[ch] = new(bool)
	context.AfterFunc(ctx, func() { s.remove(ch) })
	return ch
}

func (s *subscribers) remove(ch chan Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.all[ch]; ok {
		delete(s.all, ch)
		close(ch)
	}
}

func (s *subscribers) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for ch := range s.all {
		close(ch)
	}
	s.all = nil
}

// publish never blocks: it is called from libvirt's event loop.
func (s *subscribers) publish(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ch, missed := range s.all {
		// One place is kept for the marker, so that it is never lost itself.
		if *missed && len(ch) < cap(ch)-1 {
			ch <- Event{Kind: EventMissed}
			*missed = false
		}
		if len(ch) >= cap(ch)-1 {
			*missed = true
			continue
		}
		ch <- e
	}
}

// register asks libvirt for all events that we report, and returns the
// callbacks' ids. Drivers without some event (the test driver) just don't send it.
func (s *subscribers) register(c *libvirt.Connect) ([]int, error) {
	send := func(d *libvirt.Domain, e Event) {
		e.UUID, _ = d.GetUUIDString()
		e.Name, _ = d.GetName()
		s.publish(e)
	}
	var ids []int
	var failed error
	add := func(id int, err error) {
		switch {
		case err == nil:
			ids = append(ids, id)
		case !isCode(err, libvirt.ERR_NO_SUPPORT) && failed == nil:
			failed = fmt.Errorf("cannot register for libvirt's events: %w", classify(err))
		}
	}
	add(c.DomainEventLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
		action, detail := lifecycle(e)
		send(d, Event{Kind: EventLifecycle, Action: action, Detail: detail})
	}))
	add(c.DomainEventRebootRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain) { send(d, Event{Kind: EventReboot}) }))
	add(c.DomainEventControlErrorRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain) { send(d, Event{Kind: EventControlError}) }))
	add(c.DomainEventAgentLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventAgentLifecycle) {
		action := "disconnected"
		if e.State == libvirt.CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED {
			action = "connected"
		}
		send(d, Event{Kind: EventAgent, Action: action})
	}))
	add(c.DomainEventJobCompletedRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventJobCompleted) {
		action := "other"
		if e.Info.OperationSet && e.Info.Operation == libvirt.DOMAIN_JOB_OPERATION_BACKUP {
			action = "backup"
		}
		send(d, Event{Kind: EventJobCompleted, Action: action, Success: e.Info.JobSuccessSet && e.Info.JobSuccess, Detail: e.Info.ErrorMessage})
	}))
	add(c.DomainEventMetadataChangeRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventMetadataChange) {
		send(d, Event{Kind: EventMetadata, Action: metadata(e)})
	}))
	registerDevices(c, send, add)
	if failed != nil {
		for _, id := range ids {
			_ = c.DomainEventDeregister(id)
		}
		return nil, failed
	}
	return ids, nil
}

// registerDevices is the part of register that is about a domain's devices.
func registerDevices(c *libvirt.Connect, send func(*libvirt.Domain, Event), add func(int, error)) {
	add(c.DomainEventDeviceAddedRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventDeviceAdded) {
		send(d, Event{Kind: EventDeviceAdded, Device: e.DevAlias})
	}))
	add(c.DomainEventDeviceRemovedRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventDeviceRemoved) {
		send(d, Event{Kind: EventDeviceRemoved, Device: e.DevAlias})
	}))
	add(c.DomainEventDiskChangeRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventDiskChange) {
		send(d, Event{Kind: EventDiskChange, Device: e.DevAlias})
	}))
	add(c.DomainEventTrayChangeRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventTrayChange) {
		action := "close"
		if e.Reason == libvirt.DOMAIN_EVENT_TRAY_CHANGE_OPEN {
			action = "open"
		}
		send(d, Event{Kind: EventTrayChange, Device: e.DevAlias, Action: action})
	}))
	add(c.DomainEventBlockJob2Register(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventBlockJob) {
		send(d, Event{Kind: EventBlockJob, Device: e.Disk, Action: blockJobType(e.Type), Detail: blockJobStatus(e.Status)})
	}))
	add(c.DomainEventBlockThresholdRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventBlockThreshold) {
		send(d, Event{Kind: EventThreshold, Device: e.Dev})
	}))
	add(c.DomainEventIOErrorReasonRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventIOErrorReason) {
		send(d, Event{Kind: EventIOError, Device: e.DevAlias, Detail: e.Reason})
	}))
}

// lifecycle names a lifecycle event and its detail as libvirt's enumerations do.
func lifecycle(e *libvirt.DomainEventLifecycle) (action, detail string) {
	names := []struct {
		action  string
		details []string
	}{
		libvirt.DOMAIN_EVENT_DEFINED:     {"defined", []string{"added", "updated", "renamed", "from-snapshot"}},
		libvirt.DOMAIN_EVENT_UNDEFINED:   {"undefined", []string{"removed", "renamed"}},
		libvirt.DOMAIN_EVENT_STARTED:     {"started", []string{"booted", "migrated", "restored", "from-snapshot", "wakeup", "recreated"}},
		libvirt.DOMAIN_EVENT_SUSPENDED:   {"suspended", []string{"paused", "migrated", "ioerror", "watchdog", "restored", "from-snapshot", "api-error", "postcopy", "postcopy-failed", "guest-shutdown"}},
		libvirt.DOMAIN_EVENT_RESUMED:     {"resumed", []string{"unpaused", "migrated", "from-snapshot", "postcopy", "postcopy-failed"}},
		libvirt.DOMAIN_EVENT_STOPPED:     {"stopped", []string{"shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "from-snapshot", "recreated"}},
		libvirt.DOMAIN_EVENT_SHUTDOWN:    {"shutdown", []string{"finished", "guest", "host"}},
		libvirt.DOMAIN_EVENT_PMSUSPENDED: {"pmsuspended", []string{"memory", "disk"}},
		libvirt.DOMAIN_EVENT_CRASHED:     {"crashed", []string{"panicked", "crashloaded"}},
	}
	if e.Event < 0 || int(e.Event) >= len(names) {
		return "unknown", ""
	}
	n := names[e.Event]
	if e.Detail < 0 || e.Detail >= len(n.details) {
		return n.action, "unknown"
	}
	return n.action, n.details[e.Detail]
}

func metadata(e *libvirt.DomainEventMetadataChange) string {
	switch e.Type {
	case libvirt.DOMAIN_METADATA_TITLE:
		return "title"
	case libvirt.DOMAIN_METADATA_DESCRIPTION:
		return "description"
	default:
		return e.NSURI
	}
}

func blockJobType(t libvirt.DomainBlockJobType) string {
	switch t {
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_PULL:
		return "pull"
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_COPY:
		return "copy"
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_COMMIT:
		return "commit"
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT:
		return "active-commit"
	case libvirt.DOMAIN_BLOCK_JOB_TYPE_BACKUP:
		return "backup"
	default:
		return "unknown"
	}
}

func blockJobStatus(s libvirt.ConnectDomainEventBlockJobStatus) string {
	switch s {
	case libvirt.DOMAIN_BLOCK_JOB_COMPLETED:
		return "completed"
	case libvirt.DOMAIN_BLOCK_JOB_FAILED:
		return "failed"
	case libvirt.DOMAIN_BLOCK_JOB_CANCELED:
		return "canceled"
	case libvirt.DOMAIN_BLOCK_JOB_READY:
		return "ready"
	default:
		return "unknown"
	}
}
