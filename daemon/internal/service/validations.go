package service

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/validation"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
	"github.com/virtbackup/virtbackup/dbus"
)

// EffectiveValidation returns whether and how backups of a domain are tried.
func (s *Service) EffectiveValidation(ctx context.Context, uuid string) (catalog.Validation, error) {
	d, o, err := s.assigned(ctx, uuid)
	if err != nil {
		return catalog.Validation{}, err
	}
	e, err := effectiveOf(o, d)
	return e.Validation, err
}

// ValidateBackup tries a backup.
func (s *Service) ValidateBackup(ctx context.Context, caller bus.Caller, id string, o dbus.ValidateOptions) (string, error) {
	b, err := s.Catalog.Backup(ctx, id)
	if err != nil {
		return "", failure.Named(err)
	}
	if b.State != chain.Complete {
		return "", dbus.Errorf(dbus.ErrBusy, "backup %s is %s, and only complete ones are tried", id, b.State)
	}
	if err := fitValidation(catalog.Validation{Steps: o.Steps}); err != nil {
		return "", err
	}
	j := validation.NewJob(b, validation.Request{Steps: o.Steps})
	j.UID = caller.UID
	return s.start(ctx, j)
}

// BackupValidations returns what came of trying a backup, newest first.
func (s *Service) BackupValidations(ctx context.Context, id string, limit int) ([]dbus.ValidationRecord, error) {
	list, err := s.Catalog.Validations(ctx, id, limit)
	if err != nil {
		return nil, failure.Named(err)
	}
	var all []dbus.ValidationRecord
	for _, v := range list {
		var findings []step.Finding
		if err := json.Unmarshal(v.Findings, &findings); err != nil {
			return nil, fmt.Errorf("cannot read the findings of validation %s: %w", v.ID, err)
		}
		one := dbus.ValidationRecord{ID: v.ID, Job: v.Job, Result: dbus.ValidationResult(v.Result), Step: v.Step, Cause: v.Cause,
			Started: v.Started, Finished: v.Finished, HasScreenshot: v.HasScreenshot}
		for _, f := range findings {
			one.Findings = append(one.Findings, dbus.ValidationFinding{
				Step: f.Step, Verdict: dbus.ValidationVerdict(f.Verdict), Cause: f.Cause, Output: f.Output, TookUsec: uint64(f.Took.Microseconds()),
			})
		}
		all = append(all, one)
	}
	return all, nil
}

// BackupScreenshot returns the newest screenshot of a backup's guest.
func (s *Service) BackupScreenshot(ctx context.Context, id string) ([]byte, error) {
	png, err := s.Catalog.Screenshot(ctx, id)
	if errors.Is(err, catalog.ErrNotFound) {
		return nil, dbus.Errorf(dbus.ErrNotFound, "there is no screenshot of backup %s: it was not tried yet, or only without the step screenshot", id)
	}
	return png, failure.Named(err)
}

func seconds(d time.Duration) uint32 { return uint32(d / time.Second) }

// Bounds of what a domain's validation may say.
const (
	longestValidation   = 24 * time.Hour // each of its times
	mostArguments       = 64
	mostArgumentBytes   = 4096
	mostExpectedBytes   = step.MaxOutput
	mostValidationPorts = 64
)

func fitValidation(v catalog.Validation) error {
	for _, one := range v.Steps {
		if !slices.Contains(step.Names(), one) {
			return dbus.Errorf(dbus.ErrInvalidArgument, "there is no validation step %q: there are %s", one, strings.Join(step.Names(), ", "))
		}
	}
	for key, d := range map[string]time.Duration{
		"validation_boot_timeout": v.BootTimeout, "validation_command_timeout": v.CommandTimeout, "validation_screenshot_wait": v.ScreenshotWait,
	} {
		if d > longestValidation {
			return dbus.Errorf(dbus.ErrInvalidArgument, "%s of %d s is too long: at most %d", key, seconds(d), seconds(longestValidation))
		}
	}
	if len(v.Arguments) > mostArguments || slices.ContainsFunc(append([]string{v.Command}, v.Arguments...), func(a string) bool {
		return len(a) > mostArgumentBytes || strings.ContainsRune(a, 0)
	}) {
		return dbus.Errorf(dbus.ErrInvalidArgument, "the validation command is too long, or has a zero byte: at most %d arguments of %d bytes", mostArguments, mostArgumentBytes)
	}
	expected, err := base64.StdEncoding.DecodeString(v.Expected)
	if err != nil || len(expected) > mostExpectedBytes {
		return dbus.Errorf(dbus.ErrInvalidArgument, "validation_expected is not base64, or of more than %d bytes: \"printf hello | base64\" makes some", mostExpectedBytes)
	}
	if len(v.Ports) > mostValidationPorts {
		return dbus.Errorf(dbus.ErrInvalidArgument, "%d ports are too many: at most %d", len(v.Ports), mostValidationPorts)
	}
	if _, err := step.ParsePorts(v.Ports); err != nil {
		return dbus.Errorf(dbus.ErrInvalidArgument, "validation_ports: %v", err)
	}
	return nil
}
