// Package export shows the disks of a stopped domain to a worker: as an NBD
// server with an export for each, by a qemu-storage-daemon in a transient unit
// of its own, so that it outlives a restart of the daemon.
//
// It opens the images read-only and without QEMU's locks (locking=off): the
// domain can be started at any moment, as if nobody looked. So what it shows is
// right only if nobody wrote meanwhile, which is for the caller to find out.
// Formats are given for each layer, never guessed: a guest may have written the
// header of another format onto a raw disk.
//
// The unit sees nothing of the host but these images, and cannot write to them.
// It runs as root, because the images of a stopped domain belong to root, but
// with no capability other than to read any file, and without any network.
package export

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/nbd"
	"github.com/virtbackup/virtbackup/systemd/jobunit"
)

const (
	program    = "qemu-storage-daemon"
	unitPrefix = "virtbackup-export-"
	unitSuffix = ".service"
	rootName   = "root" // the unit's /, in its directory
	socketName = "nbd.sock"
	stopAfter  = 10 * time.Second // it has nothing to write, and may be killed
	readyPoll  = 20 * time.Millisecond
)

// Disk is one disk to be shown.
type Disk struct {
	Name   string             // of the export
	Layers []hypervisor.Layer // top first
	Bitmap string             // of the top layer, to be shown with it; "" for none
	Depth  bool               // show with it in which layer each part is (qemu:allocation-depth)
}

// Exporter runs the servers of this host. It is safe for concurrent use; one
// caller at a time per job.
type Exporter struct {
	Units     *jobunit.Manager
	Directory string // of the sockets, one directory below it per job; normally /run/virtbackup/exports
}

// Socket is the path of the job's server.
func (e *Exporter) Socket(job string) string { return filepath.Join(e.Directory, job, socketName) }

// Prepare makes the directory of the job's socket. It may be there already.
func (e *Exporter) Prepare(job string) error {
	if _, err := ulid.ParseStrict(job); err != nil { // it becomes part of a path and of the name of a unit
		return fmt.Errorf("%q is not the id of a job: %w", job, err)
	}
	if err := os.MkdirAll(filepath.Join(e.Directory, job, rootName), 0o700); err != nil {
		return fmt.Errorf("cannot make a directory for exports: %w", err)
	}
	return nil
}

// Start starts the job's server, and returns when it shows all disks. Prepare
// comes first, and there must be no server of the job yet.
func (e *Exporter) Start(ctx context.Context, job string, disks []Disk, limits jobunit.Limits) error {
	u, err := e.unit(job, disks, limits)
	if err != nil {
		return fmt.Errorf("cannot export the disks for job %s: %w", job, err)
	}
	if err := e.Units.Start(ctx, u); err != nil {
		return fmt.Errorf("cannot export the disks for job %s: %w", job, err)
	}
	for _, d := range disks {
		if err := e.await(ctx, job, d.Name); err != nil {
			return err
		}
	}
	return nil
}

func (e *Exporter) await(ctx context.Context, job, name string) error {
	for {
		c, err := nbd.Dial(ctx, e.Socket(job), nbd.Options{Export: name})
		if err == nil {
			return c.Close()
		}
		state, failed := e.Units.State(ctx, unitName(job))
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case failed != nil:
			return failed
		case state.Ended():
			return fmt.Errorf("cannot export disk %s: %s %s, see journalctl -u %s: %w", name, program, state, unitName(job), err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(readyPoll):
		}
	}
}

// Stop ends the job's server. It is fine when there is none.
func (e *Exporter) Stop(ctx context.Context, job string) error {
	return errors.Join(e.Units.Stop(ctx, unitName(job)), e.Units.Forget(ctx, unitName(job)))
}

// Remove removes the job's directory, if it is there. The server has ended.
func (e *Exporter) Remove(job string) error {
	if _, err := ulid.ParseStrict(job); err != nil {
		return fmt.Errorf("%q is not the id of a job: %w", job, err)
	}
	if err := os.RemoveAll(filepath.Join(e.Directory, job)); err != nil {
		return fmt.Errorf("cannot remove a directory for exports: %w", err)
	}
	return nil
}

// Jobs lists the jobs that something is left of, a server or its directory.
func (e *Exporter) Jobs(ctx context.Context) ([]string, error) {
	entries, err := os.ReadDir(e.Directory)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot list exports: %w", err)
	}
	var all []string
	for _, f := range entries {
		all = append(all, f.Name())
	}
	states, err := e.Units.List(ctx, unitPrefix+"*"+unitSuffix)
	if err != nil {
		return nil, err
	}
	for _, s := range states {
		all = append(all, strings.TrimSuffix(strings.TrimPrefix(s.Name, unitPrefix), unitSuffix))
	}
	all = slices.DeleteFunc(all, func(job string) bool {
		_, err := ulid.ParseStrict(job)
		return err != nil
	})
	slices.Sort(all)
	return slices.Compact(all), nil
}

func unitName(job string) string { return unitPrefix + job + unitSuffix }

func (e *Exporter) unit(job string, disks []Disk, limits jobunit.Limits) (jobunit.Unit, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return jobunit.Unit{}, err
	}
	directory := filepath.Join(e.Directory, job)
	u := jobunit.Unit{
		Name: unitName(job), Description: "virtbackup export of disks, job " + job,
		Command: []string{path, "--nbd-server", "addr.type=unix,addr.path=" + e.Socket(job)},
		Root:    filepath.Join(directory, rootName), ReadWrite: []string{directory},
		Capabilities: 1 << unix.CAP_DAC_READ_SEARCH, StopAfter: stopAfter, Limits: limits,
	}
	for i, d := range disks {
		node := fmt.Sprintf("disk%d", i) // a name may be too long for one
		block, err := blockdev(d.Layers, &u)
		if err != nil {
			return u, err
		}
		block["node-name"] = node
		server := options{"type": "nbd", "id": node, "node-name": node, "name": d.Name, "writable": false}
		if d.Depth {
			server["allocation-depth"] = true
		}
		if d.Bitmap != "" {
			server["bitmaps"] = []string{d.Bitmap}
		}
		nodeText, err := json.Marshal(block)
		if err != nil {
			return u, err
		}
		serverText, err := json.Marshal(server)
		if err != nil {
			return u, err
		}
		u.Command = append(u.Command, "--blockdev", string(nodeText), "--export", string(serverText))
	}
	return u, nil
}

// options are those of a block node or an export, as QMP has them.
type options map[string]any

// blockdev describes a backing chain, and shows its images to the unit.
func blockdev(layers []hypervisor.Layer, u *jobunit.Unit) (options, error) {
	var below options // of the lowest: none, and that is said, or it would be looked for
	for _, l := range slices.Backward(layers) {
		file, err := fileNode(l.Path, u)
		if err != nil {
			return nil, err
		}
		node := options{"driver": l.Format, "read-only": true, "file": file}
		if l.Format == "qcow2" {
			node["backing"] = below
		}
		below = node
	}
	if below == nil {
		return nil, errors.New("a disk has no image")
	}
	return below, nil
}

func fileNode(path string, u *jobunit.Unit) (options, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot look at an image: %w", err)
	}
	node := options{"driver": "file", "filename": path, "locking": "off", "read-only": true, "auto-read-only": false}
	if info.Mode()&fs.ModeDevice != 0 {
		node["driver"] = "host_device"
		u.ReadOnlyDevices = append(u.ReadOnlyDevices, path)
	} else {
		u.ReadOnly = append(u.ReadOnly, path)
	}
	return node, nil
}
