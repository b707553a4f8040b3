package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"lukechampine.com/blake3"

	"github.com/virtbackup/virtbackup/dbus"
)

// verifications measures the job that reads a backup back, beside what hashes the
// same files and knows nothing of what is in them.
func (b *host) verifications() *group {
	return &group{
		key: "verify", title: "verify of a full backup",
		before: func(ctx context.Context) error {
			_, err := b.backup(ctx, true, dbus.CompressionNone)
			return err
		},
		rows: []measurement{
			{"virtbackup", b.verify},
			{"BLAKE3 of its files, in the process", b.hash},
		},
		after: b.deleteChain,
	}
}

// verify measures a job that compares all of the last backup with its digests.
func (b *host) verify(ctx context.Context) (figure, error) {
	_, f, _, err := b.job(ctx, func() (string, error) { return b.client.VerifyBackup(ctx, b.last.ID) })
	f.note = perGiB(f.cpu)
	return f, err
}

// hash hashes the files of the last backup, one after the other.
func (b *host) hash(ctx context.Context) (figure, error) {
	began := time.Now()
	before, err := self()
	if err != nil {
		return figure{}, err
	}
	files, err := filepath.Glob(filepath.Join(filepath.Dir(b.last.path), "*"))
	if err == nil && len(files) == 0 {
		err = errors.New("the backup has no files")
	}
	for _, name := range files {
		if err == nil {
			err = hashFile(name)
		}
	}
	f := figure{took: time.Since(began)}
	after, failed := self()
	f.note = perGiB(after - before)
	return f, errors.Join(err, failed, ctx.Err())
}

func hashFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	h := blake3.New(32, nil)
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, f, make([]byte, 1<<20)); err != nil {
		return fmt.Errorf("cannot hash %s: %w", name, err)
	}
	return nil
}

// self is how long this process kept CPUs busy.
func self() (time.Duration, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}
