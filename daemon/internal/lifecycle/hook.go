package lifecycle

import (
	"context"
	"os"
	"time"
)

// HookStatus says whether libvirt tells what it does.
type HookStatus string

// The states of the hook.
const (
	HookMissing  HookStatus = "missing"  // it is not where libvirt looks for it, or cannot be executed
	HookInactive HookStatus = "inactive" // this libvirtd was started before it was installed, and has not called it: restart libvirtd
	HookActive   HookStatus = "active"
)

// HookState is what is known of the hook.
type HookState struct {
	Status HookStatus
	Last   time.Time // when it told something last, of what is known; zero for never
}

// Hook returns the state of the hook.
func (k *Keeper) Hook(ctx context.Context) (HookState, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var last entry
	all, err := k.Catalog.TrackedDomains(ctx)
	if err != nil {
		return HookState{}, err
	}
	for _, domain := range all {
		e, err := k.load(ctx, domain)
		if err != nil {
			return HookState{}, err
		}
		if e.Told > last.Told {
			last = e
		}
	}
	s := HookState{Status: HookInactive}
	if last.Told != 0 {
		s.Last = time.UnixMicro(last.Told).UTC()
	}
	info, err := os.Stat(k.HookPath)
	switch {
	case err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o111 == 0:
		s.Status = HookMissing
	}
	return s, nil
}
