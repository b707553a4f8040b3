package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

// servings are the groups that read backups that are served.
func (b *host) servings() []*group {
	return []*group{
		b.serving("many requests at once (`nbdcopy`)", "nbdcopy URI null:"),
		b.serving("128 KiB at a time, as a guest does", "nbdcopy --synchronous --request-size=131072 URI null:"),
	}
}

// serving is a group that reads a chain as those who boot from it do.
func (b *host) serving(title, reader string) *group {
	return &group{
		key: "serve", title: "reading full and increment over NBD, " + title,
		before: func(ctx context.Context) error {
			_, err := b.backup(ctx, true, dbus.CompressionNone)
			if err == nil {
				err = b.scatter(ctx)
			}
			if err == nil {
				_, err = b.backup(ctx, false, dbus.CompressionZstd)
			}
			return err
		},
		rows: []measurement{
			{"virtbackup, which compares every block with its digest", b.served(b.worker, reader)},
			{"`qemu-nbd -r`", b.served(b.qemuNBD, reader)},
		},
		after: b.deleteChain,
	}
}

const served = "/run/bench-serve" // directory of a server

// served times how long a reader takes, once a server is there.
func (b *host) served(serve func(ctx context.Context) (stop func() error, err error), reader string) func(context.Context) (figure, error) {
	line := strings.ReplaceAll(reader, "URI", "nbd+unix:///vda?socket="+served+"/vda")
	return func(ctx context.Context) (f figure, err error) {
		if err := os.Mkdir(served, 0o700); err != nil {
			return f, err
		}
		defer os.RemoveAll(served)
		stop, err := serve(ctx)
		if err != nil {
			return f, err
		}
		start := time.Now()
		err = command(ctx, strings.Fields(line)...)
		f.took = time.Since(start)
		return f, errors.Join(err, stop())
	}
}

// start starts a server and waits until it is ready.
func start(ctx context.Context, ready func() bool, args ...string) (*exec.Cmd, error) {
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Stderr = os.Stderr
	if err := c.Start(); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(commandLimit); !ready(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			_ = c.Process.Kill()
			return nil, fmt.Errorf("%s does not serve", args[0])
		}
	}
	return c, nil
}

// worker serves the last backup by our worker, outside of its sandbox.
func (b *host) worker(ctx context.Context) (func() error, error) {
	// See package transfer.
	spec, err := json.Marshal(map[string]any{
		"version": 1, "job": b.last.ID, "operation": "serve", "domain": b.uuid,
		"repository": map[string]any{"path": plain, "name": "plain", "key_file": "/var/lib/virtbackup/manifest.key"},
		"serve":      map[string]any{"backup": b.last.ID, "disks": []any{map[string]any{"target": "vda", "socket": served + "/vda"}}},
	})
	if err == nil {
		err = os.WriteFile(filepath.Join(served, "spec.json"), spec, 0o600)
	}
	if err != nil {
		return nil, err
	}
	ready := func() bool {
		text, _ := os.ReadFile(filepath.Join(served, "status.json"))
		return strings.Contains(string(text), `"serving"`)
	}
	c, err := start(ctx, ready, "/usr/libexec/virtbackup/virtbackup-worker", served)
	return func() error {
		return errors.Join(os.WriteFile(filepath.Join(served, "stop.json"), []byte("{}"), 0o600), c.Wait())
	}, err
}

func (b *host) qemuNBD(ctx context.Context) (func() error, error) {
	ready := func() bool {
		_, err := os.Stat(served + "/pid")
		return err == nil
	}
	c, err := start(ctx, ready, "qemu-nbd", "-r", "-t", "-e", "8", "-x", "vda", "-f", "qcow2", "-k", served+"/vda", "--pid-file", served+"/pid", b.last.path)
	return func() error {
		err := c.Process.Signal(os.Interrupt)
		_ = c.Wait() // by the signal
		return err
	}, err
}
