package transfer

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/repository"
)

const testDomain = "6c1fc1a8-7c3f-4a0e-9a39-0f0c2a1f6b11"

// host is a directory with a repository, disks made by qemu-img, and jobs.
type host struct {
	testing.TB
	dir   string
	repo  string
	key   string
	jobs  int
	clock uint64
}

func newHost(t testing.TB) *host {
	t.Helper()
	// A unix socket's path may have 107 bytes: t.TempDir is too long for some.
	dir, err := os.MkdirTemp("", "vbt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := &host{TB: t, dir: dir, repo: filepath.Join(dir, "repo"), key: filepath.Join(dir, "key"), clock: ulid.Now()}
	key := make([]byte, 32)
	rand.Read(key)
	h.write(h.key, hex.EncodeToString(key)+"\n")
	if err := os.Mkdir(h.repo, 0o700); err != nil {
		t.Fatal(err)
	}
	if r := h.run(Spec{Operation: OperationInit}); r.Error != nil {
		t.Fatal(r.Error)
	}
	return h
}

func (h *host) write(name, content string) {
	h.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		h.Fatal(err)
	}
}

// id returns ids that ascend.
func (h *host) id() string {
	h.clock++
	return ulid.MustNew(h.clock, rand.Reader).String()
}

// job makes the directory of a job.
func (h *host) job(s Spec) string {
	h.Helper()
	h.jobs++
	dir := filepath.Join(h.dir, fmt.Sprintf("job%d", h.jobs))
	if err := os.Mkdir(dir, 0o700); err != nil {
		h.Fatal(err)
	}
	s.Version, s.Job = SpecVersion, h.id()
	s.Repository.Path, s.Repository.Name, s.Repository.KeyFile = h.repo, "test", h.key
	if s.Domain == "" && s.Operation != OperationList {
		s.Domain = testDomain
	}
	if err := WriteSpec(dir, &s); err != nil {
		h.Fatal(err)
	}
	return dir
}

// run runs an operation in this process and returns its result. A backup is
// let go at once.
func (h *host) run(s Spec) *Result {
	h.Helper()
	dir := h.job(s)
	if s.Backup != nil {
		h.letGo(dir)
	}
	return h.runJob(context.Background(), dir)
}

func (h *host) letGo(dir string) {
	h.Helper()
	err := WriteGo(dir, Go{Created: time.Now().UnixMicro(), Consistency: repository.ConsistencyCrash, Thawed: true})
	if err != nil {
		h.Fatal(err)
	}
}

func (h *host) runJob(ctx context.Context, dir string) *Result {
	h.Helper()
	var log bytes.Buffer
	err := Run(ctx, dir, slog.New(slog.NewTextHandler(&log, nil)))
	r, readErr := ReadResult(dir)
	if readErr != nil {
		h.Fatalf("no result: %v\n%s", readErr, log.String())
	}
	if (r.Error == nil) != (err == nil) {
		h.Fatalf("Run returned %v, the result says %v", err, r.Error)
	}
	return r
}

func (h *host) command(name string, args ...string) string {
	h.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		h.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// disk is a source disk.
type disk struct {
	target string
	path   string
	format string
	size   uint64
}

func (h *host) disk(target, format string, size uint64) disk {
	h.Helper()
	d := disk{target, filepath.Join(h.dir, target+"."+format), format, size}
	h.command("qemu-img", "create", "-q", "-f", format, d.path, fmt.Sprint(size))
	return d
}

// write runs qemu-io commands on a disk.
func (d disk) io(h *host, commands ...string) {
	h.Helper()
	args := []string{"-f", d.format, d.path}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out := h.command("qemu-io", args...); strings.Contains(out, "failed") {
		h.Fatalf("qemu-io %v: %s", commands, out)
	}
}

func (d disk) bitmap(h *host, name string) {
	h.Helper()
	h.command("qemu-img", "bitmap", "--add", d.path, name)
}

// export serves the disk until the returned function is called; bitmap may be "".
func (d disk) export(h *host, bitmap string) (socket string, stop func()) {
	h.Helper()
	socket = filepath.Join(h.dir, d.target+".sock")
	pid := filepath.Join(h.dir, d.target+".pid")
	args := []string{"--read-only", "--persistent", "--shared=4", "--fork", "--pid-file=" + pid, "--socket=" + socket,
		"--export-name=" + d.target, "--format=" + d.format, "--allocation-depth"}
	if bitmap != "" {
		args = append(args, "--bitmap="+bitmap)
	}
	h.command("qemu-nbd", append(args, d.path)...)
	return socket, func() {
		h.Helper()
		b, err := os.ReadFile(pid)
		if err != nil {
			h.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			h.Fatal(err)
		}
		if err := endProcess(n); err != nil {
			h.Fatal(err)
		}
		os.Remove(socket)
	}
}

// endProcess ends a process that is no child of ours and waits until it is gone.
func endProcess(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0); err != nil {
		return err
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if err != unix.EINTR {
			return err
		}
	}
}

// backupSpec is a backup of these disks as qcow2 exports; parent may be "".
func (h *host) backupSpec(id, parent, chain string, disks ...disk) *BackupSpec {
	b := &BackupSpec{
		Compression: "zstd",
		Manifest: repository.Manifest{
			Domain: repository.Domain{UUID: testDomain, Name: "guest"}, Backup: id, Parent: parent, Chain: chain,
			Kind: repository.KindFull, Version: "test", Quiesce: "none",
		},
		Files: []FileSpec{{Name: "domain.xml", Content: []byte("<domain/>")}},
	}
	if parent != "" {
		b.Manifest.Kind = repository.KindIncremental
	}
	for _, d := range disks {
		entry := repository.Disk{Target: d.target, Size: d.size, Kind: b.Manifest.Kind, Tracking: "cbt", Format: d.format, Source: d.path}
		export := BackupDisk{Target: d.target, Export: d.target, Size: d.size}
		if parent != "" && d.format == "qcow2" {
			export.Bitmap = "qemu:dirty-bitmap:" + bitmapName(parent)
		} else {
			entry.Kind = repository.KindFull
		}
		b.Manifest.Disks = append(b.Manifest.Disks, entry)
		b.Disks = append(b.Disks, export)
	}
	return b
}

// find sets how the changes of the disk with this index are found; "" makes its
// image a full one.
func (b *BackupSpec) find(i int, changes string) {
	entry, export := &b.Manifest.Disks[i], &b.Disks[i]
	entry.Kind = repository.KindIncremental
	export.Bitmap, export.Layer, export.Compare = "", changes == repository.ChangesSnapshot, changes == repository.ChangesDigest
	switch changes {
	case "":
		entry.Kind = repository.KindFull
	case repository.ChangesCBT:
		export.Bitmap = "qemu:dirty-bitmap:" + bitmapName(b.Manifest.Parent)
	}
}

// overlay puts an empty image upon a disk, which it becomes the layer of. What
// is written from then on is in it, until it is committed.
func (d disk) overlay(h *host, options string) disk {
	h.Helper()
	top := d
	top.path, top.format = filepath.Join(h.dir, d.target+".overlay."+h.id()), "qcow2"
	h.command("qemu-img", "create", "-q", "-f", top.format, "-o", options, "-b", d.path, "-F", d.format, top.path)
	return top
}

// commit brings what an overlay holds into the disk below, and removes it.
func (d disk) commit(h *host) {
	h.Helper()
	h.command("qemu-img", "commit", "-q", "-f", d.format, d.path)
	if err := os.Remove(d.path); err != nil {
		h.Fatal(err)
	}
}

func bitmapName(backup string) string { return "virtbackup-" + backup }

// take makes a backup of the disks as they are now and returns its result.
func (h *host) take(b *BackupSpec, disks ...disk) *Result {
	h.Helper()
	defer h.serve(b, disks...)()
	return h.run(Spec{Operation: OperationBackup, Backup: b})
}

// serve exports the disks for a backup.
func (h *host) serve(b *BackupSpec, disks ...disk) (stop func()) {
	h.Helper()
	var stops []func()
	for i, d := range disks {
		bitmap := ""
		if d.format == "qcow2" {
			d.bitmap(h, bitmapName(b.Manifest.Backup))
			if b.Disks[i].Bitmap != "" {
				bitmap = bitmapName(b.Manifest.Parent)
			}
		}
		var stop func()
		b.Disks[i].Socket, stop = d.export(h, bitmap)
		stops = append(stops, stop)
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}

// mustTake makes a backup, or ends the test.
func (h *host) mustTake(parent, chain string, disks ...disk) string {
	h.Helper()
	id := h.id()
	if chain == "" {
		chain = id
	}
	if r := h.take(h.backupSpec(id, parent, chain, disks...), disks...); r.Error != nil {
		h.Fatal(r.Error)
	}
	return id
}

// raw converts a disk as it is now.
func (d disk) raw(h *host) string {
	h.Helper()
	out := filepath.Join(h.dir, fmt.Sprintf("%s.%s.raw", d.target, h.id()))
	h.command("qemu-img", "convert", "-f", d.format, "-O", "raw", d.path, out)
	return out
}

// image is the path of a disk's image in a backup.
func (h *host) image(backup, target string) string {
	return filepath.Join(h.repo, testDomain, backup, repository.ImageName(target))
}

// restore restores the disks of a backup as new files in a directory.
func (h *host) restore(backup, format, dir string, targets ...string) *Result {
	h.Helper()
	s := &RestoreSpec{Backup: backup}
	for _, t := range targets {
		s.Disks = append(s.Disks, RestoreDisk{Target: t, Directory: dir, Destination: t + "." + format, Format: format})
	}
	return h.run(Spec{Operation: OperationRestore, Restore: s})
}

// checkRestored restores a backup both ways and compares it bit by bit with
// what the disks held, and lets QEMU say the same about the chain.
func (h *host) checkRestored(backup string, want map[string]string) {
	h.Helper()
	dir, err := os.MkdirTemp(h.dir, "restored")
	if err != nil {
		h.Fatal(err)
	}
	defer os.RemoveAll(dir)
	var targets []string
	for target := range want {
		targets = append(targets, target)
	}
	for _, format := range []string{FormatRaw, FormatQcow2} {
		if r := h.restore(backup, format, dir, targets...); r.Error != nil {
			h.Fatal(r.Error)
		}
	}
	for target, reference := range want {
		h.command("cmp", reference, filepath.Join(dir, target+".raw"))
		h.command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference, filepath.Join(dir, target+".qcow2"))
		h.command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", reference, h.image(backup, target))
		h.command("qemu-img", "check", "-q", "-f", "qcow2", filepath.Join(dir, target+".qcow2"))
		h.command("qemu-img", "check", "-q", "-f", "qcow2", h.image(backup, target))
	}
}

// checkClean checks that no job left anything in the repository.
func (h *host) checkClean() {
	h.Helper()
	err := filepath.WalkDir(h.repo, func(p string, d fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(h.repo, p)
		switch {
		case err != nil:
			return err
		case strings.HasPrefix(rel, ".staging/"), strings.Contains(rel, "owner"), strings.Contains(rel, "pending"):
			return errors.New(rel + " is left")
		case d.IsDir() && strings.Count(rel, "/") == 1:
			if _, err := os.Stat(filepath.Join(p, "manifest.json")); err != nil {
				return errors.New(rel + " is left without a manifest")
			}
		}
		return nil
	})
	if err != nil {
		h.Fatal(err)
	}
}
