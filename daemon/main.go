// Command virtbackupd is the daemon: it backs up and restores the libvirt
// domains of its host, and speaks org.virtbackup1 on the system bus.
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

	"github.com/virtbackup/virtbackup/daemon/internal/config"
	"github.com/virtbackup/virtbackup/daemon/internal/journal"
)

// exitConfiguration is EX_CONFIG of sysexits.h: systemd does not start us again.
const exitConfiguration = 78

// version is set by the linker.
var version = "development"

func main() {
	path := flag.String("config", config.DefaultPath, "path of the configuration")
	check := flag.Bool("check", false, "read the configuration, say what is wrong with it, and exit")
	show := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *show {
		fmt.Println("virtbackupd", version)
		return
	}
	os.Exit(run(*path, *check))
}

func run(path string, check bool) int {
	level := new(slog.LevelVar)
	log := slog.New(journal.NewHandler(os.Stderr, level))
	settings, err := config.Load(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitConfiguration
	}
	if check {
		return 0
	}
	level.Set(settings.Daemon.LogLevel.Slog())
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	a := &app{path: path, log: log, level: level}
	a.settings.Store(settings)
	if err := a.run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		log.Error("virtbackupd ends", "error", err)
		return 1
	}
	return 0
}
