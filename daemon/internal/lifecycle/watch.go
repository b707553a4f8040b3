package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

const (
	// settle lets events that come together cost one look.
	settle = 200 * time.Millisecond
	// replayEach is how often to look for records of hooks that could not wake us.
	replayEach = time.Minute
	// observeLimit bounds how long one look at domains waits for libvirt.
	observeLimit = 30 * time.Second
)

// Run looks at all domains of the catalog, and again at each that something
// happens to, until ctx ends: what changed unseen is known at once, and not only
// when the next backup asks.
func (k *Keeper) Run(ctx context.Context) {
	events := k.Domains.Subscribe(ctx)
	all, happened := true, map[string]bool{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				return
			}
			k.Log.Debug("libvirt told of a domain", "event", e.Kind, "name", e.Name, "action", e.Action, "detail", e.Detail, "device", e.Device)
			switch {
			case e.Kind == hypervisor.EventMissed:
				all = true
			case concerns(e):
				happened[e.UUID] = true
			default:
				continue
			}
			timer.Reset(settle)
		case <-timer.C:
			if err := k.catchUp(ctx, all, happened); err != nil && ctx.Err() == nil {
				k.Log.Warn("cannot see what happened to domains; it is tried again", "error", err)
			} else {
				all = false
				clear(happened)
			}
			timer.Reset(replayEach)
		}
	}
}

// concerns tells whether an event says something of a domain's disks.
func concerns(e hypervisor.Event) bool {
	switch e.Kind {
	case hypervisor.EventLifecycle, hypervisor.EventDeviceAdded, hypervisor.EventDeviceRemoved, hypervisor.EventDiskChange,
		hypervisor.EventBlockJob, hypervisor.EventControlError:
		return true
	}
	return false
}

// replayIdle is Replay that waits for nobody.
func (k *Keeper) replayIdle(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, err := k.replay(ctx)
	return err
}

// catchUp takes what the hook recorded, and looks at all domains, or at those to
// which something happened.
func (k *Keeper) catchUp(ctx context.Context, all bool, happened map[string]bool) error {
	if err := k.replayIdle(ctx); err != nil {
		return err
	}
	if !all && len(happened) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, observeLimit)
	defer cancel()
	known, err := k.Catalog.Domains(ctx, "")
	if err != nil {
		return err
	}
	var failed []error
	for _, one := range known {
		if !all && !happened[one.UUID] {
			continue
		}
		if err := k.lookAt(ctx, one.UUID); err != nil && !errors.Is(err, hypervisor.ErrNoDomain) {
			failed = append(failed, err)
		}
	}
	if all {
		failed = append(failed, k.forgetGone(ctx))
	}
	return errors.Join(failed...)
}

// lookAt looks at a domain while nobody works on its images: seen before that
// and compared after it, they would be those of before.
func (k *Keeper) lookAt(ctx context.Context, uuid string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	d, err := k.Domains.ByUUID(ctx, uuid)
	if err == nil {
		_, err = k.observe(ctx, d)
	}
	return err
}

// forgetGone forgets domains that libvirt does not have any more, and of which
// there is no backup: hooks tell of each that ever was.
func (k *Keeper) forgetGone(ctx context.Context) error {
	all, err := k.Catalog.TrackedDomains(ctx)
	if err != nil {
		return err
	}
	for _, domain := range all {
		if _, err := k.Domains.ByUUID(ctx, domain); err == nil {
			continue
		} else if !errors.Is(err, hypervisor.ErrNoDomain) {
			return fmt.Errorf("cannot tell whether domain %s is still there: %w", domain, err)
		}
		if err := k.Catalog.ForgetTracking(ctx, domain); err != nil {
			return err
		}
	}
	return nil
}
