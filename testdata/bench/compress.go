package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/dbus"
)

// compressions measures the job that compresses a backup that was made before,
// beside what makes the same of the same disk.
func (b *host) compressions() *group {
	zstd := "-c -o compression_type=zstd -W "
	return &group{
		key: "compress", title: "compression of a full backup with zstd, after it",
		before: b.keepPlain,
		rows: []measurement{
			{"virtbackup, 1 thread", b.compress(1)},
			{"virtbackup, a thread for each CPU", b.compress(uint32(cpus()))},
			{"`qemu-img convert -c` zstd `-W -m1`", counted(convert(kept, zstd+"-m1"))},
			{"`qemu-img convert -c` zstd `-W -m8`", counted(convert(kept, zstd+"-m8"))},
			{"`qemu-img convert -c` zstd `-W -m16`", counted(convert(kept, zstd+"-m16"))},
		},
	}
}

// kept is a copy of the image that is compressed, for the others.
const kept = "/srv/bench/kept.qcow2"

func (b *host) keepPlain(ctx context.Context) error {
	if _, err := b.backup(ctx, true, dbus.CompressionNone); err != nil {
		return err
	}
	return errors.Join(command(ctx, "cp", b.last.path, kept), b.deleteChain(ctx))
}

// compress makes a full backup, and measures how it is compressed.
func (b *host) compress(threads uint32) func(context.Context) (figure, error) {
	return func(ctx context.Context) (f figure, err error) {
		if _, err = b.backupWith(ctx, true, dbus.Settings{Compression: new(dbus.CompressionNone), Threads: &threads}); err != nil {
			return f, err
		}
		o := dbus.CompressOptions{Compression: new(dbus.CompressionZstd)}
		_, f, _, err = b.job(ctx, func() (string, error) { return b.client.CompressBackup(ctx, b.last.ID, o) })
		if err != nil {
			return f, err
		}
		now, err := dbus.Get[dbus.BackupProperties](ctx, b.client, b.last.ID)
		f.stored, f.note = int64(now.StoredBytes), perGiB(f.cpu)
		return f, errors.Join(err, command(ctx, "qemu-img", "compare", "-q", kept, b.last.path), b.deleteChain(ctx))
	}
}

// counted measures the time of the CPUs, too, that commands take.
func counted(run func(context.Context) (figure, error)) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		before, err := children()
		if err != nil {
			return figure{}, err
		}
		f, err := run(ctx)
		if err != nil {
			return f, err
		}
		after, err := children()
		f.note = perGiB(after - before)
		return f, err
	}
}

// children is how long the commands that have ended kept CPUs busy.
func children() (time.Duration, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_CHILDREN, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}

func perGiB(cpu time.Duration) string {
	return fmt.Sprintf("%.1f s of CPU per GiB", cpu.Seconds()/(float64(dataSize)/(1<<30)))
}
