package catalog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"
)

func TestValidations(t *testing.T) {
	c, ctx := openNew(t), t.Context()
	fixture(t, c)
	take(t, c, fullBackup("b1"))
	take(t, c, increment("b2", "b1", "b1"))
	if _, err := c.Screenshot(ctx, "b1"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a screenshot of none: %v", err)
	}
	record := func(n int, backup string, result ValidationResult, picture string) {
		t.Helper()
		must(t, c.RecordValidation(ctx, ValidationRecord{ID: fmt.Sprintf("v%03d", n), Backup: backup, Job: "j", Started: epoch,
			ValidationSummary: ValidationSummary{Result: result, Step: "screenshot", Cause: fmt.Sprint(n), Finished: epoch.Add(time.Duration(n) * time.Second)},
			Findings:          json.RawMessage(`[{"step":"screenshot"}]`)}, []byte(picture)))
	}
	record(1, "b1", Valid, "first")
	record(2, "b1", NotValid, "second")
	for n := 3; n < 40; n++ {
		record(n, "b1", Unable, "")
	}
	record(50, "b2", Valid, "other")
	all, err := c.Validations(ctx, "b1", 100)
	must(t, err)
	if len(all) != validationsKept+1 || all[0].ID != "v039" || all[0].HasScreenshot || string(all[0].Findings) != `[{"step":"screenshot"}]` || !all[0].Started.Equal(epoch) {
		t.Errorf("%d are kept, the newest %+v", len(all), all[0])
	}
	if oldest := all[len(all)-1]; oldest.ID != "v002" || !oldest.HasScreenshot || oldest.Result != NotValid {
		t.Errorf("the one with the newest screenshot is gone: %+v", oldest)
	}
	if png, err := c.Screenshot(ctx, "b1"); err != nil || string(png) != "second" {
		t.Errorf("%q, %v", png, err)
	}
	b, err := c.Backup(ctx, "b1")
	must(t, err)
	// What a host could not tell later does not make it less bad.
	if v := b.Validation; v.Result != NotValid || v.Step != "screenshot" || v.Cause != "2" || !v.Finished.Equal(epoch.Add(39*time.Second)) {
		t.Errorf("the backup says %+v", v)
	}
	record(51, "b2", Unable, "")
	if b, err = c.Backup(ctx, "b2"); err != nil || b.Validation.Result != Unable || b.Validation.Cause != "51" {
		t.Errorf("the backup says %+v, %v", b.Validation, err)
	}
	counts, err := c.CountValidations(ctx)
	if err != nil || len(counts) != 2 || counts[NotValid] != 1 || counts[Unable] != 1 {
		t.Errorf("%v, %v", counts, err)
	}
	if err := c.RecordValidation(ctx, ValidationRecord{ID: "v060", Backup: "none", ValidationSummary: ValidationSummary{Result: Valid}}, nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("of no backup: %v", err)
	}
	if err := c.RecordValidation(ctx, ValidationRecord{ID: "v061", Backup: "b1", ValidationSummary: ValidationSummary{Result: Valid}},
		bytes.Repeat([]byte("x"), MaximumScreenshot+1)); err == nil {
		t.Error("a screenshot of any size is kept")
	}
	must(t, c.BeginDelete(ctx, []string{"b2"}, Step{Job: "j", Name: "deleting"}))
	must(t, c.DeleteBackups(ctx, []string{"b2"}))
	if all, err := c.Validations(ctx, "b2", 100); err != nil || len(all) != 0 {
		t.Errorf("of a backup that is gone: %v, %v", all, err)
	}
}
