// Package mountunit mounts storage through systemd: each as a transient mount unit in the host's namespace, so that
// whoever asks needs no right to mount, the mount outlives him, and one whose server does not answer is ended by a
// timeout and can hang a process of systemd's only.
//
// It asks systemd, which reads /proc/self/mountinfo, what is mounted. It never looks at a mount point itself: that would
// hang where the server does.
package mountunit

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/coreos/go-systemd/v22/unit"
	"github.com/godbus/dbus/v5"
)

// ErrMounted says that something is mounted there already.
var ErrMounted = errors.New("something is mounted there already")

// ErrTimeout says that mounting or unmounting took too long, and was given up.
var ErrTimeout = errors.New("it took too long, and was given up")

// slack is for systemd itself, beyond the time that a unit has.
const slack = 30 * time.Second

// Mount is what to mount, systemd.mount(5).
type Mount struct {
	Where       string // an absolute path
	What        string
	Type        string
	Options     string
	Description string
	Force       bool          // umount -f
	Timeout     time.Duration // of mounting, and of unmounting later
	Errors      string        // path of a file for what mount(8) says
}

// State is what systemd knows of a mount point.
type State struct {
	Where   string
	Mounted bool   // also while it is being mounted or unmounted
	Active  string // systemd's ActiveState
	Result  string // of the last mount or unmount: "success", "exit-code", "timeout", …
}

// Systemd is systemd's manager of system units. Each call makes a connection of its own: there are few.
type Systemd struct{}

func connect(ctx context.Context) (*systemd.Conn, error) {
	conn, err := systemd.NewSystemConnectionContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to systemd: %w", err)
	}
	return conn, nil
}

func nameOf(where string) (string, error) {
	if !filepath.IsAbs(where) || filepath.Clean(where) != where || where == "/" {
		return "", fmt.Errorf("%q is not a clean absolute path below /", where)
	}
	return unit.UnitNamePathEscape(where) + suffix, nil
}

const suffix = ".mount"

// Mount mounts, and returns when that is done.
func (Systemd) Mount(ctx context.Context, m Mount) error {
	name, err := nameOf(m.Where)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, m.Timeout+slack)
	defer cancel()
	conn, err := connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	state, err := stateOf(ctx, conn, name, m.Where)
	if err != nil {
		return err
	}
	if state.Mounted {
		return fmt.Errorf("cannot mount %s: %w", m.Where, ErrMounted)
	}
	// One that failed before stays until it is forgotten, and keeps its name.
	if state.Active == "failed" {
		if err := conn.ResetFailedUnitContext(ctx, name); err != nil && errorName(err) != noSuchUnit {
			return fmt.Errorf("cannot forget unit %s: %w", name, err)
		}
	}
	done := make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, name, "fail", m.properties(), done)
	if errorName(err) == unitExists {
		err = m.again(ctx, conn, name, done)
	}
	if err != nil {
		return fmt.Errorf("cannot mount %s: %w", m.Where, err)
	}
	return settle(ctx, conn, name, "mount "+m.Where, done)
}

const unitExists = "org.freedesktop.systemd1.UnitExists"

// again starts the unit of an earlier mount, which systemd keeps as long as something refers to it: a worker that is
// being ended, or a mount(8) that hangs.
func (m Mount) again(ctx context.Context, conn *systemd.Conn, name string, done chan<- string) error {
	is, err := conn.GetUnitTypePropertiesContext(ctx, name, "Mount")
	if err != nil {
		return err
	}
	if is["What"] != m.What || is["Type"] != m.Type || is["Options"] != m.Options {
		return fmt.Errorf("systemd still knows an earlier mount there, of %v: it is forgotten when nothing uses it any more", is["What"])
	}
	_, err = conn.StartUnitContext(ctx, name, "fail", done)
	return err
}

func (m Mount) properties() []systemd.Property {
	p := []systemd.Property{
		property("Description", m.Description),
		property("What", m.What),
		property("Type", m.Type),
		property("Options", m.Options),
		property("TimeoutUSec", uint64(m.Timeout.Microseconds())),
		property("DirectoryMode", uint32(0)),
		property("ForceUnmount", m.Force),
	}
	if m.Errors != "" {
		p = append(p, property("StandardErrorFileToTruncate", m.Errors))
	}
	return p
}

func property(name string, value any) systemd.Property {
	return systemd.Property{Name: name, Value: dbus.MakeVariant(value)}
}

// settle waits for the end of systemd's job for a unit, and says how it ended.
func settle(ctx context.Context, conn *systemd.Conn, name, doing string, done <-chan string) error {
	var result string
	select {
	case result = <-done:
	case <-ctx.Done():
		return fmt.Errorf("cannot %s: %w", doing, context.Cause(ctx))
	}
	if result == "done" {
		return nil
	}
	state, err := stateOf(ctx, conn, name, "")
	switch {
	case err != nil:
		return err
	case result == "timeout" || state.Result == "timeout":
		return fmt.Errorf("cannot %s: %w", doing, ErrTimeout)
	}
	return fmt.Errorf("cannot %s: %s (%s), see journalctl -u %s", doing, result, state.Result, name)
}

// Unmount unmounts, and returns when that is done. What is not mounted is no error; what is in use is one.
func (Systemd) Unmount(ctx context.Context, where string, limit time.Duration) error {
	name, err := nameOf(where)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, limit+slack)
	defer cancel()
	conn, err := connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	done := make(chan string, 1)
	_, err = conn.StopUnitContext(ctx, name, "replace", done)
	if errorName(err) == noSuchUnit {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot unmount %s: %w", where, err)
	}
	if err := settle(ctx, conn, name, "unmount "+where, done); err != nil {
		return err
	}
	// systemd calls a stop done also when umount(8) failed, and the mount stays.
	state, err := stateOf(ctx, conn, name, where)
	if err == nil && state.Mounted {
		err = fmt.Errorf("cannot unmount %s: it is in use (%s), see journalctl -u %s", where, state.Result, name)
	}
	return err
}

// State tells whether something is mounted at a path.
func (Systemd) State(ctx context.Context, where string) (State, error) {
	name, err := nameOf(where)
	if err != nil {
		return State{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, slack)
	defer cancel()
	conn, err := connect(ctx)
	if err != nil {
		return State{}, err
	}
	defer conn.Close()
	return stateOf(ctx, conn, name, where)
}

func stateOf(ctx context.Context, conn *systemd.Conn, name, where string) (State, error) {
	properties, err := conn.GetAllPropertiesContext(ctx, name)
	if err != nil {
		return State{}, fmt.Errorf("cannot get the state of unit %s: %w", name, err)
	}
	s := State{Where: where}
	s.Active, _ = properties["ActiveState"].(string)
	s.Result, _ = properties["Result"].(string)
	s.Mounted = mounted(s.Active)
	return s, nil
}

// mounted: a unit that is activating or deactivating may have its mount.
func mounted(active string) bool { return active != "inactive" && active != "failed" && active != "" }

// Below lists what is mounted directly in a directory.
func (Systemd) Below(ctx context.Context, directory string) ([]State, error) {
	prefix, err := nameOf(directory)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, slack)
	defer cancel()
	conn, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	pattern := strings.TrimSuffix(prefix, suffix) + "-*" + suffix
	units, err := conn.ListUnitsByPatternsContext(ctx, nil, []string{pattern})
	if err != nil {
		return nil, fmt.Errorf("cannot list units %s: %w", pattern, err)
	}
	var all []State
	for _, u := range units {
		where := unit.UnitNamePathUnescape(strings.TrimSuffix(u.Name, suffix))
		if mounted(u.ActiveState) && filepath.Dir(where) == directory {
			all = append(all, State{Where: where, Mounted: true, Active: u.ActiveState})
		}
	}
	return all, nil
}

const noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"

// errorName is the name of a D-Bus error, or "".
func errorName(err error) string {
	var e dbus.Error
	if errors.As(err, &e) {
		return e.Name
	}
	return ""
}
