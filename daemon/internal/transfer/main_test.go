package transfer

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"testing"
)

func TestMain(m *testing.M) {
	if job := os.Getenv(workerJob); job != "" { // a worker that is killed
		runtime.LockOSThread() // strace counts the calls of each thread
		if err := Run(context.Background(), job, slog.New(slog.DiscardHandler)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	flag.Parse()
	// Each check runs dozens of QEMU's tools; more are asked for by the flag.
	if f := flag.Lookup("rapid.checks"); f.Value.String() == f.DefValue {
		_ = f.Value.Set("6")
	}
	os.Exit(m.Run())
}
