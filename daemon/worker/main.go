// Command virtbackup-worker carries out one operation on a repository for
// virtbackupd: see package transfer. It runs in a transient unit of its own,
// virtbackup-job-ID.service, and outlives a restart of the daemon.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
)

// memoryLimit is what the Go runtime tries to stay under, in bytes; the unit's
// MemoryMax is above it.
const memoryLimit = 96 << 20

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: virtbackup-worker JOB-DIRECTORY")
		os.Exit(2)
	}
	debug.SetMemoryLimit(memoryLimit)
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	go func() {
		<-signals
		cancel(transfer.ErrCancelled)
	}()
	// A closed pipe or terminal must not end a backup.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := transfer.Run(ctx, os.Args[1], log); err != nil {
		os.Exit(1)
	}
}
