package service

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/bus"
	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/validation/step"
	"github.com/virtbackup/virtbackup/dbus"
)

func TestHowBackupsAreTriedIsSaidByOfferingsAndDomains(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	id, err := s.CreateOffering(t.Context(), bus.Caller{}, "daily", "nas", dbus.OfferingOptions{Overrides: dbus.Overrides{Validation: dbus.Validation{
		Validate: new(true), ValidationSteps: new(step.Names()), ValidationBootTimeout: new(uint32(30)), ValidationCommand: new("/bin/cat"),
		ValidationArguments: new([]string{"/hello, world"}), ValidationExpected: new("aGVsbG8="), ValidationPorts: new([]string{"22", "443"}),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if o := offering(t, s, id); !o.Validate || o.ValidationBootTimeout != 30 || o.ValidationCommand != "/bin/cat" || o.ValidationExpected != "aGVsbG8=" ||
		!slices.Equal(o.ValidationArguments, []string{"/hello, world"}) || !slices.Equal(o.ValidationPorts, []string{"22", "443"}) || o.ValidationScreenshotWait != 0 {
		t.Errorf("%+v", o)
	}
	if err := s.Catalog.AssignDomain(t.Context(), "d1", "web", "daily"); err != nil {
		t.Fatal(err)
	}
	set := func(v dbus.Validation) error {
		return s.SetOverrides(t.Context(), bus.Caller{}, "d1", dbus.Overrides{Validation: v}, nil)
	}
	if err := set(dbus.Validation{ValidationCommand: new("true"), ValidationArguments: &[]string{}, ValidationScreenshotWait: new(uint32(5))}); err != nil {
		t.Fatal(err)
	}
	v, err := s.EffectiveValidation(t.Context(), "d1")
	if err != nil || !v.Validate || v.Command != "true" || len(v.Arguments) > 0 || v.BootTimeout != 30*time.Second || v.ScreenshotWait != 5*time.Second || v.Expected != "aGVsbG8=" {
		t.Errorf("%+v, %v", v, err)
	}
	settings, err := s.DomainSettings(t.Context(), "d1")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []dbus.EffectiveSetting{
		{Key: "validation_command", Value: "true", Source: "domain"}, {Key: "validation_boot_timeout", Value: "30", Source: "offering"},
		{Key: "validation_ports", Value: "22, 443", Source: "offering"}, {Key: "validation_command_timeout", Value: "0", Source: "default"},
	} {
		if !slices.Contains(settings, want) {
			t.Errorf("no %+v in %v", want, settings)
		}
	}
	for name, v := range map[string]dbus.Validation{
		"base64":    {ValidationExpected: new("hello!")},
		"port":      {ValidationPorts: new([]string{"0"})},
		"ports":     {ValidationPorts: new(slices.Repeat([]string{"80"}, 65))},
		"zero byte": {ValidationCommand: new("a\x00b")},
		"long":      {ValidationArguments: new([]string{strings.Repeat("x", 5000)})},
		"timeout":   {ValidationBootTimeout: new(uint32(1 << 31))},
		"step":      {ValidationSteps: new([]string{"wait_for_boot", "rm"})},
	} {
		if err := set(v); !errors.Is(err, dbus.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestBackupsTellWhatCameOfTryingThem(t *testing.T) {
	s, _ := newService(t)
	withRepositories(t, s, "nas")
	recorded(t, s, catalog.Backup{ID: "A1", Domain: "d1", DomainName: "web", Repository: "ID-nas", Kind: chain.Full}, true)
	if _, err := s.BackupScreenshot(t.Context(), "A1"); !errors.Is(err, dbus.ErrNotFound) {
		t.Errorf("of one that was not tried: %v", err)
	}
	findings, err := json.Marshal([]step.Finding{{Step: step.NameJudge, Verdict: step.NotValid, Cause: "a kernel panic", Output: "panic", Took: 3 * time.Millisecond}})
	if err != nil {
		t.Fatal(err)
	}
	at := time.UnixMicro(1_800_000_000_000_000)
	err = s.Catalog.RecordValidation(t.Context(), catalog.ValidationRecord{ID: "V1", Backup: "A1", Job: "J1", Started: at.Add(-time.Second), Findings: findings,
		ValidationSummary: catalog.ValidationSummary{Result: catalog.NotValid, Step: step.NameJudge, Cause: "a kernel panic", Finished: at}}, []byte("PNG"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := s.Object(t.Context(), dbus.Ref{Kind: dbus.KindBackup, ID: "A1"})
	if err != nil {
		t.Fatal(err)
	}
	if b := r.(dbus.BackupProperties); b.ValidationResult != dbus.ValidationNotValid || b.ValidationStep != "judge_screen" || b.ValidationCause != "a kernel panic" || !b.Validated.Equal(at) {
		t.Errorf("%+v", b)
	}
	all, err := s.BackupValidations(t.Context(), "A1", 10)
	if err != nil || len(all) != 1 || !all[0].HasScreenshot || len(all[0].Findings) != 1 {
		t.Fatal(all, err)
	}
	if f := all[0].Findings[0]; f != (dbus.ValidationFinding{Step: "judge_screen", Verdict: dbus.VerdictNotValid, Cause: "a kernel panic", Output: "panic", TookUsec: 3000}) {
		t.Errorf("%+v", f)
	}
	if png, err := s.BackupScreenshot(t.Context(), "A1"); err != nil || string(png) != "PNG" {
		t.Errorf("%q, %v", png, err)
	}
}
