package transfer

import (
	"context"
	"strings"
	"testing"
	"time"
)

// TestShareIsKept has a backup read and write no faster than it may, and go on
// as fast as it can when it may.
func TestShareIsKept(t *testing.T) {
	h := newHost(t)
	vda := h.disk("vda", "raw", 4<<20)
	vda.io(h, "write -P 1 0 4M")
	take := func(during func(dir string)) time.Duration {
		id := h.id()
		b := h.backupSpec(id, "", id, vda)
		b.Compression = "none"
		defer h.serve(b, vda)()
		dir := h.job(Spec{Operation: OperationBackup, Backup: b})
		h.letGo(dir)
		during(dir)
		began := time.Now()
		if r := h.runJob(context.Background(), dir); r.Error != nil {
			t.Fatal(r.Error)
		}
		return time.Since(began)
	}
	rate := func(dir string, bytes uint64) {
		if err := WriteRate(dir, Rate{Bytes: bytes}); err != nil {
			t.Error(err)
		}
	}
	// What is over the burst takes its time.
	if took := take(func(dir string) { rate(dir, 8<<20) }); took < 375*time.Millisecond {
		t.Errorf("4 MiB at 8 MiB/s took %v", took)
	}
	// A share that is lifted: at 64 KiB/s it would be a minute.
	if took := take(func(dir string) {
		rate(dir, 64<<10)
		time.AfterFunc(throttleInterval, func() { rate(dir, 0) })
	}); took > 20*time.Second {
		t.Errorf("it took %v after it was let go", took)
	}
}

func TestCancelDoesNotWaitForItsShare(t *testing.T) {
	h := newHost(t)
	vda := h.disk("vda", "raw", 8<<20)
	vda.io(h, "write -P 1 0 8M")
	id := h.id()
	b := h.backupSpec(id, "", id, vda)
	defer h.serve(b, vda)()
	dir := h.job(Spec{Operation: OperationBackup, Backup: b})
	h.letGo(dir)
	if err := WriteRate(dir, Rate{Bytes: 1}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	time.AfterFunc(300*time.Millisecond, func() { cancel(ErrCancelled) })
	if r := h.runJob(ctx, dir); r.Error == nil || r.Error.Class != ClassCancelled {
		t.Errorf("%+v", r.Error)
	}
	h.checkClean()
}

// TestPromisedSpaceIsLeft refuses a backup that would take the space of others.
func TestPromisedSpaceIsLeft(t *testing.T) {
	h := newHost(t)
	vda := h.disk("vda", "raw", 1<<20)
	for name, set := range map[string]func(*Spec){
		"its own":     func(s *Spec) { s.Backup.Expected = 1 << 60 },
		"of others":   func(s *Spec) { s.Repository.Promised = 1 << 60 },
		"to be free":  func(s *Spec) { s.Repository.MinimumFree = 1 << 60 },
		"all is well": func(s *Spec) { s.Backup.Expected, s.Repository.Promised = 1, 1 },
	} {
		id := h.id()
		b := h.backupSpec(id, "", id, vda)
		stop := h.serve(b, vda)
		s := Spec{Operation: OperationBackup, Backup: b}
		set(&s)
		r := h.run(s)
		stop()
		if name == "all is well" {
			if r.Error != nil {
				t.Errorf("%s: %v", name, r.Error)
			}
		} else if r.Error == nil || r.Error.Class != ClassFull || !strings.Contains(r.Error.Message, "must stay free") {
			t.Errorf("%s: %+v", name, r.Error)
		}
	}
	h.checkClean()
}
