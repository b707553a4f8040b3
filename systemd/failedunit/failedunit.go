// Package failedunit has systemd know of backups that failed: each is a unit virtbackup-failed@<job>.service that fails too,
// so that whatever an admin has in place for units that fail (OnFailure=, "systemctl --failed", monitoring) serves for backups.
package failedunit

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

const (
	prefix = "virtbackup-failed@"
	suffix = ".service"
)

// Units are those units. Backups fail seldom: each call has a connection of its own, and none can be lost in between.
type Units struct{}

// jobID is what the id of a job looks like: nothing that systemd would have escaped.
var jobID = regexp.MustCompile(`^[0-9A-Z]{1,64}$`)

// Raise has systemd start the unit of a job, and does not wait for what becomes of it.
func (Units) Raise(ctx context.Context, job string) error {
	return with(ctx, job, "start", func(conn *systemd.Conn, unit string) error {
		_, err := conn.StartUnitContext(ctx, unit, "replace", nil)
		return err
	})
}

// Clear has systemd forget that the unit of a job failed. One that is not known is no error.
func (Units) Clear(ctx context.Context, job string) error {
	return with(ctx, job, "clear", func(conn *systemd.Conn, unit string) error {
		var e dbus.Error
		err := conn.ResetFailedUnitContext(ctx, unit)
		if errors.As(err, &e) && e.Name == "org.freedesktop.systemd1.NoSuchUnit" {
			return nil
		}
		return err
	})
}

// Raised returns the jobs whose units have failed.
func (Units) Raised(ctx context.Context) ([]string, error) {
	conn, err := systemd.NewSystemConnectionContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot list units %s*: %w", prefix, err)
	}
	defer conn.Close()
	units, err := conn.ListUnitsByPatternsContext(ctx, []string{"failed"}, []string{prefix + "*" + suffix})
	if err != nil {
		return nil, fmt.Errorf("cannot list units %s*: %w", prefix, err)
	}
	var jobs []string
	for _, u := range units {
		jobs = append(jobs, strings.TrimSuffix(strings.TrimPrefix(u.Name, prefix), suffix))
	}
	return jobs, nil
}

func with(ctx context.Context, job, doing string, do func(conn *systemd.Conn, unit string) error) error {
	if !jobID.MatchString(job) {
		return fmt.Errorf("cannot %s a unit: %q is not the id of a job", doing, job)
	}
	unit := prefix + job + suffix
	conn, err := systemd.NewSystemConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("cannot %s unit %s: %w", doing, unit, err)
	}
	defer conn.Close()
	if err := do(conn, unit); err != nil {
		return fmt.Errorf("cannot %s unit %s: %w", doing, unit, err)
	}
	return nil
}
