package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
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
			{"BLAKE3 of its files, in the process", b.hash(hashFile)},
			{"BLAKE3 of each 64 KiB of them, a thread for each CPU", b.hash(hashBlocks)},
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
func (b *host) hash(one func(name string) error) func(ctx context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) { return b.hashFiles(ctx, one) }
}

func (b *host) hashFiles(ctx context.Context, one func(name string) error) (figure, error) {
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
			err = one(name)
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

// hashBlocks hashes blocks side by side.
func hashBlocks(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	var g errgroup.Group
	for first := range cpus() {
		g.Go(func() error {
			const most = 16 // at a time
			buffer := make([]byte, most*placeSize)
			for at := int64(first) * most * placeSize; ; at += int64(cpus()) * most * placeSize {
				n, err := f.ReadAt(buffer, at)
				for block := range slices.Chunk(buffer[:n], placeSize) {
					blake3.Sum256(block)
				}
				if errors.Is(err, io.EOF) {
					return nil
				} else if err != nil {
					return fmt.Errorf("cannot hash %s: %w", name, err)
				}
			}
		})
	}
	return g.Wait()
}

// self is how long this process kept CPUs busy.
func self() (time.Duration, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}
