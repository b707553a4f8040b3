package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
)

const (
	places    = 1024
	placeSize = 64 << 10
)

func (b *host) groups() []*group {
	zstd := func(args string) string { return "-c -o compression_type=zstd -W " + args }
	return []*group{
		{
			key: "full", title: "full backup",
			rows: []measurement{
				{"virtbackup", func(ctx context.Context) (figure, error) { return b.backup(ctx, true, dbus.CompressionNone) }},
				{"`qemu-img convert`, offline", convert(offline, "")},
				{"`qemu-img convert -W -m16`, offline", convert(offline, "-W -m16")},
				{"`qemu-img convert -W -m16` of a pull-mode export", exported(toQcow2("-W -m16"))},
				{"push-mode `backup-begin`", push},
				{"pull-mode `backup-begin` and `nbdcopy` to raw", exported("nbdcopy " + uri + " " + outputs + "/raw")},
				{"`virtnbdbackup -l full`", virtnbdbackupFull()},
			},
			after: b.deleteChain,
		},
		{
			key: "zstd", title: "full backup with zstd",
			rows: []measurement{
				{"virtbackup", func(ctx context.Context) (figure, error) { return b.backup(ctx, true, dbus.CompressionZstd) }},
				{"`qemu-img convert -c` zstd `-W -m8`, offline", convert(offline, zstd("-m8"))},
				{"`qemu-img convert -c` zstd `-W -m16`, offline", convert(offline, zstd("-m16"))},
				{"`qemu-img convert -c` zstd `-W -m8` of a pull-mode export", exported(toQcow2(zstd("-m8")))},
				{"`qemu-img convert -c` zstd `-W -m16` of a pull-mode export", exported(toQcow2(zstd("-m16")))},
				{"`virtnbdbackup -l full -z` (lz4)", virtnbdbackupFull("-z")},
			},
			after: b.deleteChain,
		},
		b.compressions(), b.verifications(),
		{
			key: "increment", title: fmt.Sprintf("increment of %d MiB in %d places", places*placeSize>>20, places),
			before: b.beginIncrements,
			rows: []measurement{
				{"virtbackup", func(ctx context.Context) (figure, error) { return b.backup(ctx, false, dbus.CompressionNone) }},
				{"`virtnbdbackup -l inc`", virtnbdbackupIncrement},
			},
		},
		b.restores(),
	}
}

// restores is the group that restores the chain that increments were measured with.
func (b *host) restores() *group {
	return &group{
		key: "restore", title: "restore of full and increment",
		before: func(ctx context.Context) error {
			if wanted("increment") {
				return nil
			}
			if err := b.beginIncrements(ctx); err != nil {
				return err
			}
			_, err := b.backup(ctx, false, dbus.CompressionNone)
			if err == nil {
				_, err = virtnbdbackupIncrement(ctx)
			}
			return err
		},
		rows: []measurement{
			{"virtbackup, as a new domain", b.restore},
			{"`qemu-img convert` of the same chain", b.convertChain("")},
			{"`qemu-img convert -W -m16` of the same chain", b.convertChain("-W -m16")},
			{"`virtnbdrestore` of its own chain", b.virtnbdrestore},
		},
		after: b.deleteChain,
	}
}

func toQcow2(args string) string {
	return "qemu-img convert " + args + " -f raw -O qcow2 " + uri + " " + outputs + "/image"
}

func convert(from, args string) func(context.Context) (figure, error) {
	line := "qemu-img convert " + args + " -f qcow2 -O qcow2 " + from + " " + outputs + "/image"
	return func(ctx context.Context) (figure, error) {
		return measure(ctx, func(ctx context.Context) error { return command(ctx, strings.Fields(line)...) })
	}
}

// domainBackup begins a backup of libvirt's own.
func domainBackup(ctx context.Context, mode, inner string) error {
	xml := outputs + "/../backup.xml"
	text := fmt.Sprintf("<domainbackup mode='%s'>%s</domainbackup>", mode, inner)
	if err := os.WriteFile(xml, []byte(text), 0o600); err != nil {
		return err
	}
	return command(ctx, "virsh", "-q", "backup-begin", domain, xml)
}

const uri = "nbd+unix:///vda?socket=" + socket

// exported runs a command on the guest's disk as libvirt exports it.
func exported(line string) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		scratch := socket + "-scratch"
		return measure(ctx, func(ctx context.Context) error {
			err := domainBackup(ctx, "pull", fmt.Sprintf("<server transport='unix' socket='%s'/><disks><disk name='vda' backup='yes' type='file'>"+
				"<scratch file='%s'/></disk></disks>", socket, scratch))
			if err != nil {
				return err
			}
			return errors.Join(command(ctx, strings.Fields(line)...), command(ctx, "virsh", "-q", "domjobabort", domain))
		})
	}
}

// push has QEMU write the image.
func push(ctx context.Context) (figure, error) {
	ended, err := jobEnd(ctx)
	if err != nil {
		return figure{}, err
	}
	return measure(ctx, func(ctx context.Context) error {
		err := domainBackup(ctx, "push", fmt.Sprintf("<disks><disk name='vda' backup='yes' type='file'><target file='%s/image'/>"+
			"<driver type='qcow2'/></disk></disks>", outputs))
		return errors.Join(err, ended())
	})
}

// jobEnd listens for the end of a job of the guest's; the function that it
// returns waits for it.
func jobEnd(ctx context.Context) (func() error, error) {
	limit := fmt.Sprint(int(commandLimit.Seconds()))
	c := exec.CommandContext(ctx, "stdbuf", "-oL", "virsh", "event", "--domain", domain, "--event", "job-completed", "--timeout", limit)
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		return nil, err
	}
	// It does not say when it has begun to listen.
	time.Sleep(200 * time.Millisecond)
	return func() error {
		text, _ := bufio.NewReader(out).ReadString('\n')
		err := c.Wait()
		if err == nil && !strings.Contains(text, "job-completed") {
			err = fmt.Errorf("the job did not end: %q", text)
		}
		return err
	}, nil
}

func virtnbdbackupFull(args ...string) func(context.Context) (figure, error) {
	line := append([]string{"virtnbdbackup", "-d", domain, "-l", "full", "-n", "-o", outputs + "/full"}, args...)
	return func(ctx context.Context) (figure, error) {
		f, err := measure(ctx, func(ctx context.Context) error { return command(ctx, line...) })
		return f, errors.Join(err, forgetCheckpoints(ctx))
	}
}

// forgetCheckpoints deletes those of virtnbdbackup.
func forgetCheckpoints(ctx context.Context) error {
	names, err := output(ctx, "virsh", "-q", "checkpoint-list", domain, "--name")
	for name := range strings.FieldsSeq(names) {
		if strings.HasPrefix(name, "virtnbdbackup") {
			err = errors.Join(err, command(ctx, "virsh", "-q", "checkpoint-delete", domain, name))
		}
	}
	return err
}

// beginIncrements makes a full backup with either tool, and changes the disk.
func (b *host) beginIncrements(ctx context.Context) error {
	if _, err := b.backup(ctx, true, dbus.CompressionNone); err != nil {
		return err
	}
	err := errors.Join(os.RemoveAll(chainVN), forgetCheckpoints(ctx))
	if err == nil {
		err = command(ctx, "virtnbdbackup", "-d", domain, "-l", "full", "-n", "-o", chainVN)
	}
	if err == nil {
		err = b.scatter(ctx)
	}
	return err
}

// scatter writes noise to as many places of the guest's disk, through QEMU:
// the emulated guest would take long.
func (b *host) scatter(ctx context.Context) error {
	noise := "/srv/bench/socket/noise"
	p := make([]byte, placeSize)
	var script strings.Builder
	const stride = diskSize / places / placeSize
	for place := range places {
		at := (place*stride + b.random.IntN(stride)) * placeSize
		fmt.Fprintf(&script, "qemu-monitor-command %s --hmp 'qemu-io -d /machine/peripheral/virtio-disk0/virtio-backend \"write -s %s %d %d\"'\n",
			domain, noise, at, placeSize)
	}
	b.noise(p)
	if err := os.WriteFile(noise, p, 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	c := exec.CommandContext(ctx, "virsh", "-q")
	c.Stdin = strings.NewReader(script.String())
	out, err := c.CombinedOutput()
	if n := strings.Count(string(out), fmt.Sprintf("wrote %d/%d", placeSize, placeSize)); err == nil && n != places && n != 0 {
		err = fmt.Errorf("wrote to %d places", n)
	}
	if err == nil && (strings.Contains(string(out), "error:") || strings.Contains(string(out), "rror")) {
		err = fmt.Errorf("cannot write to the guest's disk: %.300s", out)
	}
	return err
}

func virtnbdbackupIncrement(ctx context.Context) (figure, error) {
	before, err := syncAll(chainVN)
	if err != nil {
		return figure{}, err
	}
	start := time.Now()
	err = command(ctx, "virtnbdbackup", "-d", domain, "-l", "inc", "-n", "-o", chainVN)
	after, syncErr := syncAll(chainVN)
	return figure{took: time.Since(start), stored: after - before}, errors.Join(err, syncErr)
}

// convertChain is what qemu-img makes of our backup.
func (b *host) convertChain(args string) func(context.Context) (figure, error) {
	return func(ctx context.Context) (figure, error) {
		dir := fmt.Sprintf("%s/convert%d", outputs, len(args))
		line := "qemu-img convert " + args + " -f qcow2 -O qcow2 " + b.last.path + " " + dir + "/vda.qcow2"
		return b.restoreBy(ctx, dir, strings.Fields(line)...)
	}
}

func (b *host) virtnbdrestore(ctx context.Context) (figure, error) {
	dir := outputs + "/virtnbdrestore"
	f, err := b.restoreBy(ctx, dir, "virtnbdrestore", "-i", chainVN, "-o", dir, "-n", "-L", outputs+"/log")
	return f, errors.Join(err, empty(outputs))
}

func (b *host) restoreBy(ctx context.Context, dir string, args ...string) (f figure, err error) {
	if err := os.Mkdir(dir, 0o777); err != nil {
		return f, err
	}
	start := time.Now()
	if err := command(ctx, args...); err != nil {
		return f, err
	}
	f.stored, err = syncAll(dir)
	f.took = time.Since(start)
	return f, errors.Join(err, b.compare(ctx, dir))
}
