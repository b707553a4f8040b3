package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// backup is one of ours.
type backup struct {
	dbus.BackupProperties
	path string // of its image
}

// wait follows a job to its end.
func (b *host) wait(ctx context.Context, job string) (dbus.JobProperties, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	p, err := b.client.WatchJob(ctx, job, func(dbus.JobUpdate) {})
	return p, errors.Join(err, p.Err())
}

// job starts a job and follows it and its worker.
func (b *host) job(ctx context.Context, start func() (string, error)) (dbus.JobProperties, figure, worker, error) {
	watched := make(chan worker)
	done := make(chan struct{})
	go func() { watched <- watchWorker(done) }()
	began := time.Now()
	id, err := start()
	var p dbus.JobProperties
	if err == nil {
		p, err = b.wait(ctx, id)
	}
	f := figure{took: time.Since(began)}
	close(done)
	w := <-watched
	f.worker, f.phases, f.cpu = w.ended.Sub(w.started), w.phases, w.cpu
	return p, f, w, err
}

// backup backs the guest up.
func (b *host) backup(ctx context.Context, full bool, compression dbus.Compression) (figure, error) {
	return b.backupWith(ctx, full, dbus.Settings{Compression: &compression})
}

func (b *host) backupWith(ctx context.Context, full bool, s dbus.Settings) (figure, error) {
	mode, quiesce := dbus.ModeIncremental, dbus.QuiesceNone
	s.Mode, s.Quiesce = &mode, &quiesce
	o := dbus.BackupOptions{Repository: "plain", Full: full, Settings: s}
	p, f, w, err := b.job(ctx, func() (string, error) { return b.client.BackupDomain(ctx, b.uuid, o) })
	if err != nil {
		return f, err
	}
	if b.last.BackupProperties, err = dbus.Get[dbus.BackupProperties](ctx, b.client, p.Backup); err != nil {
		return f, err
	}
	if got := b.last.Kind == dbus.KindFull; got != full {
		return f, fmt.Errorf("the backup is %s: %s", b.last.Kind, strings.Join(b.last.Causes, ", "))
	}
	b.last.path = filepath.Join(plain, b.uuid, p.Backup, "vda.qcow2")
	f.stored = int64(b.last.StoredBytes)
	if !full {
		f.note = fmt.Sprintf("read %.1f MiB, stored %.1f MiB", mib(w.read), mib(b.last.StoredBytes))
	}
	return f, nil
}

func mib(bytes uint64) float64 { return float64(bytes) / (1 << 20) }

// deleteChain deletes the chain of the last backup.
func (b *host) deleteChain(ctx context.Context) error {
	_, job, err := b.client.DeleteChain(ctx, b.last.Chain, dbus.DeleteChainOptions{})
	if err != nil {
		return err
	}
	_, err = b.wait(ctx, job)
	return err
}

// restore restores the last backup as a new domain.
func (b *host) restore(ctx context.Context) (figure, error) {
	dir := images + "/restored"
	if err := os.Mkdir(dir, 0o777); err != nil {
		return figure{}, err
	}
	o := dbus.RestoreOptions{Destination: dir}
	_, f, _, err := b.job(ctx, func() (string, error) { return b.client.RestoreBackup(ctx, b.last.ID, "restored", o) })
	if err != nil {
		return f, err
	}
	f.stored, err = syncAll(dir)
	return f, errors.Join(err, command(ctx, "virsh", "-q", "undefine", "restored"), b.compare(ctx, dir))
}

// compare compares the disk that was restored with the backup as QEMU reads
// it, and removes it.
func (b *host) compare(ctx context.Context, dir string) error {
	images, err := filepath.Glob(dir + "/*vda*")
	if err == nil && len(images) != 1 {
		err = fmt.Errorf("%d images were restored to %s", len(images), dir)
	}
	if err != nil {
		return err
	}
	return errors.Join(command(ctx, "qemu-img", "compare", "-q", b.last.path, images[0]), os.RemoveAll(dir))
}

// worker is what was seen of one.
type worker struct {
	started, ended time.Time
	phases         phases
	cpu            time.Duration
	memory         uint64 // at most, in bytes (VmHWM)
	read           uint64 // from the guest's disk, in bytes
}

// phases are those of a worker, and how long it was seen in each.
type phases []phase

type phase struct {
	name        string
	began, last time.Time
}

func (p phases) enter(name string, now time.Time) phases {
	if n := len(p); n > 0 {
		p[n-1].last = now
		if p[n-1].name == name {
			return p
		}
	}
	return append(p, phase{name, now, now})
}

func (p phases) took(name string) (d time.Duration) {
	for _, one := range p {
		if one.name == name {
			d += one.last.Sub(one.began)
		}
	}
	return d
}

func (p phases) String() string {
	var text []string
	for _, one := range p {
		text = append(text, fmt.Sprintf("%s %.2f s", one.name, p.took(one.name).Seconds()))
	}
	return strings.Join(text, ", ")
}

// watchWorker looks at the worker that runs meanwhile, every few milliseconds.
func watchWorker(done <-chan struct{}) worker {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	var w worker
	pid := ""
	for {
		select {
		case <-done:
			return w
		case <-tick.C:
		}
		if pid == "" {
			pid = findWorker()
		}
		if pid == "" || !w.look(pid) {
			pid = ""
			continue
		}
		s := status()
		for _, d := range s.Disks {
			w.read = max(w.read, d.Read)
		}
		if s.Phase != "" {
			w.phases = w.phases.enter(s.Phase, w.ended)
		}
	}
}

func findWorker() string {
	names, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		// The kernel keeps 15 bytes of a name.
		if p, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(p), "virtbackup-work") {
			return filepath.Base(filepath.Dir(name))
		}
	}
	return ""
}

// look takes what the kernel tells of the process; false when it ended.
func (w *worker) look(pid string) bool {
	text, err := os.ReadFile("/proc/" + pid + "/status")
	_, peak, ok := strings.Cut(string(text), "VmHWM:")
	times, timesErr := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil || !ok || timesErr != nil {
		return false
	}
	kib, err := strconv.ParseUint(strings.Fields(peak)[0], 10, 64)
	// proc(5): utime and stime are the fields 14 and 15, in ticks of 10 ms;
	// the name, field 2, is in parentheses.
	fields := strings.Fields(string(times[strings.LastIndexByte(string(times), ')')+1:]))
	user, userErr := strconv.Atoi(fields[11])
	system, systemErr := strconv.Atoi(fields[12])
	if err != nil || userErr != nil || systemErr != nil {
		return false
	}
	w.ended, w.memory, w.cpu = time.Now(), max(w.memory, kib<<10), time.Duration(user+system)*10*time.Millisecond
	if w.started.IsZero() {
		w.started = w.ended
	}
	return true
}

// said is what the worker says of itself.
type said struct {
	Phase string
	Disks []struct{ Read uint64 }
}

func status() (s said) {
	names, _ := filepath.Glob("/run/virtbackup/jobs/*/status.json")
	for _, name := range names {
		if p, err := os.ReadFile(name); err == nil && json.Unmarshal(p, &s) == nil {
			break
		}
	}
	return s
}
