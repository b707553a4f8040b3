package lifecycle

import (
	"context"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// HookStatus says whether libvirt tells what it does.
type HookStatus string

// The states of the hook.
const (
	HookMissing HookStatus = "missing" // it is not where libvirt looks for it, or cannot be executed
	// HookInactive: libvirtd was started before the hook was installed, and has
	// not called it since. libvirtd looks for hooks when it starts or reloads.
	HookInactive HookStatus = "inactive"
	HookActive   HookStatus = "active"
)

// HookState is what is known of the hook.
type HookState struct {
	Status HookStatus
	Last   time.Time // when it told something last; zero for never, or not known any more
}

// pidFiles are those of libvirt's daemons that call the hook, the modular one
// and the one for everything.
var pidFiles = [...]string{"/run/virtqemud.pid", "/run/libvirtd.pid"}

// Hook returns the state of the hook.
func (k *Keeper) Hook(ctx context.Context) (HookState, error) {
	last, err := k.lastTold(ctx)
	if err != nil {
		return HookState{}, err
	}
	s := HookState{Status: HookInactive}
	if last.Told != 0 {
		s.Last = time.UnixMicro(last.Told).UTC()
	}
	var hook unix.Stat_t
	if err := unix.Stat(k.HookPath, &hook); err != nil || hook.Mode&unix.S_IFMT != unix.S_IFREG || hook.Mode&0o111 == 0 {
		s.Status = HookMissing
		return s, nil
	}
	libvirt := ""
	for _, file := range pidFiles {
		if libvirt = process(file); libvirt != "" {
			break
		}
	}
	// One that does not run, and starts when it is needed, will find the hook.
	if libvirt == "" || libvirt == last.Libvirt || startTime(libvirt).After(time.Unix(hook.Ctim.Unix())) {
		s.Status = HookActive
	}
	return s, nil
}

// lastTold is what the hook told last. The catalog is asked for it once: it has
// an entry for each domain.
func (k *Keeper) lastTold(ctx context.Context) (last entry, err error) {
	if known := k.last.Load(); known != nil {
		return *known, nil
	}
	k.mu.Lock() // nothing is told meanwhile
	defer k.mu.Unlock()
	all, err := k.Catalog.TrackedDomains(ctx)
	if err != nil {
		return last, err
	}
	for _, domain := range all {
		e, err := k.load(ctx, domain)
		if err != nil {
			return last, err
		}
		if e.Told > last.Told {
			last = e
		}
	}
	k.last.Store(&last)
	return last, nil
}

// ticks is how many of the kernel's clock ticks for user space are a second
// (USER_HZ, the same on all architectures that QEMU runs guests on).
const ticks = 100

// startTime returns when a process, as process names it, was started; the zero
// time if that cannot be told.
func startTime(process string) time.Time {
	_, start, _ := strings.Cut(process, "@")
	n, err := strconv.ParseInt(start, 10, 64)
	var since unix.Timespec
	if err != nil || unix.ClockGettime(unix.CLOCK_BOOTTIME, &since) != nil {
		return time.Time{}
	}
	booted := time.Now().Add(-time.Duration(since.Nano()))
	return booted.Add(time.Duration(n) * time.Second / ticks)
}
