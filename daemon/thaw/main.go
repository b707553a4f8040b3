// Command virtbackup-thaw is the thaw watchdog: it lets one guest go on that
// virtbackupd holds still, if virtbackupd dies or takes too long. virtbackupd
// starts it before each freeze, in a unit of its own. See package quiesce.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/quiesce"
)

const connectLimit = 20 * time.Second

func main() {
	uri := flag.String("connect", "qemu:///system", "libvirt's URI")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "Usage: virtbackup-thaw [--connect URI] MARKER\nStarted by virtbackupd only.")
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, *uri, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "virtbackup-thaw:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, uri, marker string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: withoutTime}))
	limited, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	h, err := hypervisor.Connect(limited, uri, log)
	if err != nil {
		return err
	}
	defer h.Close()
	return quiesce.Watch(ctx, h, marker, log, notifyReady)
}

func notifyReady() error {
	sent, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	if err == nil && !sent {
		err = errors.New("there is no service manager that waits for it")
	}
	if err != nil {
		return fmt.Errorf("cannot say that the watchdog is ready: %w", err)
	}
	return nil
}

// withoutTime leaves the time to the journal.
func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}
