package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// waitGo waits for go.json to appear in the job directory.
func waitGo(ctx context.Context, directory string) (Go, error) {
	var g Go
	return g, waitFor(ctx, directory, GoFile, &g)
}

// waitConfirm waits for confirm.json to appear in the job directory.
func waitConfirm(ctx context.Context, directory string) error {
	return waitFor(ctx, directory, ConfirmFile, &struct{}{})
}

// waitStop waits for stop.json to appear in the job directory.
func waitStop(ctx context.Context, directory string) error {
	return waitFor(ctx, directory, StopFile, &struct{}{})
}

// waitFor waits for a file of the daemon to appear in the job directory, and
// reads it.
func waitFor(ctx context.Context, directory, name string, v any) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("cannot watch the job directory: %w", err)
	}
	events := os.NewFile(uintptr(fd), "inotify")
	stop := context.AfterFunc(ctx, func() { events.Close() }) // ends a Read
	defer func() {
		if stop() {
			events.Close()
		}
	}()
	if _, err := unix.InotifyAddWatch(fd, directory, unix.IN_MOVED_TO|unix.IN_CLOSE_WRITE); err != nil {
		return fmt.Errorf("cannot watch the job directory: %w", err)
	}
	buf := make([]byte, 4096)
	for {
		// Looked for after the watch is set, so that it can't be missed.
		err := readJSON(filepath.Join(directory, name), v)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if _, err := events.Read(buf); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("cannot wait for %s: %w", name, err)
		}
	}
}
