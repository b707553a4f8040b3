package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/dbus"
)

const (
	domain  = "bench"
	disk    = "/var/lib/libvirt/images/bench-vda.qcow2"
	offline = "/srv/bench/offline.qcow2" // a copy that nobody has open
	outputs = "/srv/bench/outputs"       // what a measurement writes; emptied after it
	images  = "/var/lib/libvirt/images"  // where the daemon restores to
	plain   = "/srv/bench/plain"         // repository
	socket  = "/srv/bench/socket/nbd"
	chainVN = "/srv/bench/virtnbdbackup" // its chain of increments

	diskSize = 2 << 30
	dataSize = 1 << 30

	commandLimit = 3 * time.Minute
)

// host is the lab host with the guest that is backed up.
type host struct {
	client *dbus.Client
	uuid   string
	random *rand.Rand

	last backup // the newest of the chain in the repository
}

// newHost makes the guest, and the daemon ready.
func newHost(ctx context.Context) (*host, error) {
	b := &host{random: rand.New(rand.NewPCG(1, 2))}
	for _, dir := range []string{outputs, plain, filepath.Dir(socket)} {
		// QEMU runs as somebody else.
		if err := errors.Join(os.MkdirAll(dir, 0o777), os.Chmod(dir, 0o777)); err != nil {
			return nil, err
		}
	}
	if err := b.makeGuest(ctx); err != nil {
		return nil, err
	}
	var err error
	if b.client, err = dbus.ConnectSystem(ctx); err != nil {
		return nil, err
	}
	if b.uuid, err = b.client.FindDomain(ctx, domain); err != nil {
		return nil, err
	}
	_, job, err := b.client.CreateRepository(ctx, "plain", "dir", plain, dbus.CreateRepositoryOptions{})
	if err != nil {
		return nil, err
	}
	_, err = b.wait(ctx, job)
	return b, err
}

func (b *host) makeGuest(ctx context.Context) error {
	if err := command(ctx, "lab-domain", "create", domain, "--disk", "qcow2:2G"); err != nil {
		return err
	}
	raw := outputs + "/raw"
	if err := b.mixed(raw, dataSize); err != nil {
		return err
	}
	for _, line := range []string{
		"qemu-img convert -S 0 -f raw -O qcow2 " + raw + " " + disk,
		fmt.Sprintf("qemu-img resize -q %s %d", disk, diskSize),
		"cp --sparse=always " + disk + " " + offline,
		"rm " + raw,
		"lab-domain start " + domain,
	} {
		if err := command(ctx, strings.Fields(line)...); err != nil {
			return err
		}
	}
	return nil
}

// mixed writes text, noise and zeros, in runs of 192 KiB: 45, 45 and 10 of 100.
func (b *host) mixed(path string, size int) error {
	words := make([][]byte, 4096)
	for i := range words {
		words[i] = make([]byte, 2+b.random.IntN(10), 16)
		for j := range words[i] {
			words[i][j] = byte('a' + b.random.IntN(26))
		}
		words[i] = append(words[i], ' ')
	}
	zipf := rand.NewZipf(b.random, 1.2, 4, uint64(len(words)-1))
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	run := make([]byte, 192<<10)
	for at := 0; at < size; at += len(run) {
		clear(run)
		switch k := b.random.IntN(100); {
		case k < 45:
			for n := 0; n < len(run); {
				n += copy(run[n:], words[zipf.Uint64()])
			}
		case k < 90:
			b.noise(run)
		}
		if _, err := f.Write(run[:min(len(run), size-at)]); err != nil {
			return err
		}
	}
	return nil
}

func (b *host) noise(p []byte) {
	for i := 0; i+8 <= len(p); i += 8 {
		v := b.random.Uint64()
		for j := range 8 {
			p[i+j] = byte(v >> (8 * j))
		}
	}
}

func (b *host) describe() string {
	kind := "files in memory"
	var s unix.Statfs_t
	if unix.Statfs("/srv", &s) == nil && os.Getenv("LAB_DISK") != "" {
		kind = "files on the disk"
	}
	return fmt.Sprintf("%d CPUs, %s, a running guest (TCG, idle) with 1 GiB of text, noise and zeros (45:45:10) in a disk of 2 GiB", cpus(), kind)
}

func cpus() int {
	var set unix.CPUSet
	_ = unix.SchedGetaffinity(0, &set)
	return set.Count()
}

// command runs a command, and tells what it said if it fails.
func command(ctx context.Context, args ...string) error {
	_, err := output(ctx, args...)
	return err
}

func output(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.WaitDelay = time.Second
	out, err := c.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), nil
}

// measure times what writes into the outputs, syncs and removes that.
func measure(ctx context.Context, run func(ctx context.Context) error) (f figure, err error) {
	start := time.Now()
	if err := run(ctx); err != nil {
		return f, err
	}
	f.stored, err = syncAll(outputs)
	f.took = time.Since(start)
	return f, errors.Join(err, empty(outputs))
}

// syncAll syncs the files of a directory and returns how much they take.
func syncAll(dir string) (bytes int64, err error) {
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		var s unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &s); err != nil {
			return err
		}
		bytes += s.Blocks * 512
		return f.Sync()
	})
	return bytes, err
}

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return err
}

// warm takes as much memory as a measurement writes, and gives it back. A
// virtual machine's host may have taken free memory away: who is the first to
// write to it would wait for it, and the next one find it there.
func warm() error {
	p, err := unix.Mmap(-1, 0, dataSize*5/4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return err
	}
	return unix.Munmap(p)
}
