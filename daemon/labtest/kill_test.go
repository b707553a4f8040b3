//go:build lab

package labtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

// The programs that take part in a backup.
const (
	theDaemon = "virtbackupd"
	theWorker = "virtbackup-worker"
	qemu      = "qemu-system-x86_64"
)

// step is a moment of a backup at which everything stops.
type step struct {
	name    string
	in      string // who is stopped
	scratch bool   // in the scratch directory; else in the repository
	op      string
	path    string // a regular expression
	after   bool   // when it is done
}

const (
	ulid  = `[0-9A-Z]{26}`
	stage = `^\.staging/` + ulid + `[^/]*`
)

// steps are those of a backup, in their order.
var steps = []step{
	{name: "planned", in: theDaemon, scratch: true, op: "mkdir", path: `^` + ulid + `$`},
	{name: "opening", in: theWorker, op: "mkdir", path: stage + `$`},
	{name: "begin", in: qemu, scratch: true, op: "open", path: `/vda\.qcow2$`},
	{name: "copying", in: theWorker, op: "write", path: stage + `/vda\.qcow2$`},
	{name: "flushing", in: theWorker, op: "fsync", path: stage + `/vda\.qcow2$`},
	{name: "verifying", in: theWorker, op: "read", path: stage + `/vda\.qcow2$`},
	{name: "committing", in: theWorker, op: "rename", path: `/` + ulid + `$`},
	{name: "committed", in: theWorker, op: "rename", path: `/manifest\.json$`, after: true},
	{name: "finishing", in: theDaemon, scratch: true, op: "unlink", path: `/vda\.qcow2$`},
}

func stepIndex(name string) int {
	return slices.IndexFunc(steps, func(s step) bool { return s.name == name })
}

// reached tells whether a step is not before another.
func (s step) reached(name string) bool { return stepIndex(s.name) >= stepIndex(name) }

// fault is something that goes wrong in the middle of a backup.
type fault struct {
	name string
	// do is done when it cannot be averted any more, also with a program that
	// is stopped; then settled waits for its end.
	do      func(k *killer, job string)
	settled func(k *killer)
	// needs are the programs that must go on before it is settled.
	needs []string
	// ends says how the job may end.
	ends func(s step) []dbus.JobState
}

// faults are all of them; TEST_FAULTS says which are tried ("all", or a list
// with commas).
var faults = []fault{
	{"daemon-kill", (*killer).killDaemon, (*killer).awaitDaemon, []string{theDaemon}, succeeds},
	{"daemon-restart", (*killer).restartDaemon, (*killer).awaitDaemon, []string{theDaemon, qemu}, succeeds},
	{"worker-kill", (*killer).killWorker, nil, nil, failsUntilCommit},
	{"cancel", (*killer).cancel, nil, nil, func(s step) []dbus.JobState {
		switch {
		case s.reached("committed"):
			return []dbus.JobState{dbus.JobSucceeded}
		case s.reached("copying"): // the worker is told later than we are, and may be done by then
			return []dbus.JobState{dbus.JobCancelled, dbus.JobSucceeded}
		}
		return []dbus.JobState{dbus.JobCancelled}
	}},
	{"qemu-kill", (*killer).killQEMU, (*killer).awaitOff, []string{qemu}, failsUntilCopied},
	{"destroy", (*killer).destroy, (*killer).awaitOff, []string{qemu}, func(s step) []dbus.JobState {
		if s.name == "begin" { // QEMU may come further before it is asked to end
			return []dbus.JobState{dbus.JobSucceeded, dbus.JobFailed}
		}
		return failsUntilCopied(s)
	}},
	{"libvirtd-restart", (*killer).restartLibvirtd, (*killer).awaitLibvirtd, []string{qemu}, func(s step) []dbus.JobState {
		if s.name == "begin" { // whether libvirt did begin is not known then
			return []dbus.JobState{dbus.JobSucceeded, dbus.JobFailed}
		}
		return succeeds(s)
	}},
}

const defaultFaults = "daemon-kill,worker-kill,cancel"

func succeeds(step) []dbus.JobState { return []dbus.JobState{dbus.JobSucceeded} }

func failsUntilCommit(s step) []dbus.JobState {
	if s.reached("committed") {
		return []dbus.JobState{dbus.JobSucceeded}
	}
	return []dbus.JobState{dbus.JobFailed}
}

func failsUntilCopied(s step) []dbus.JobState {
	switch {
	case s.reached("flushing"):
		return []dbus.JobState{dbus.JobSucceeded}
	case s.name == "copying": // all may have been read
		return []dbus.JobState{dbus.JobSucceeded, dbus.JobFailed}
	}
	return []dbus.JobState{dbus.JobFailed}
}

// TestKill lets each fault come at each step of an incremental backup. Whatever
// happens: the job ends once and as it should, nothing is left of it, the guest
// runs on, and the next backup is exact.
func TestKill(t *testing.T) {
	k := newKiller(t)
	chosen := os.Getenv("TEST_FAULTS")
	if chosen == "" {
		chosen = defaultFaults
	}
	if chosen == "all" {
		var all []string
		for _, f := range faults {
			all = append(all, f.name)
		}
		chosen = strings.Join(all, ",")
	}
	for name := range strings.SplitSeq(chosen, ",") {
		i := slices.IndexFunc(faults, func(f fault) bool { return f.name == name })
		if i < 0 {
			t.Fatalf("TEST_FAULTS: there is no fault %q", name)
		}
		for _, s := range steps {
			if name == "worker-kill" && s.in == theDaemon {
				continue // there is no worker then
			}
			if !t.Run(name+"/"+s.name, func(t *testing.T) { k.try(t, faults[i], s) }) {
				t.FailNow() // what it left would disturb the others
			}
		}
	}
}

// killer is a host and a guest for all tries.
type killer struct {
	*host
	t                *testing.T
	g                *guest
	storage, scratch *faultFS
	seed             int
	daemon           string // its process before the fault
	tracking         *dbus.Tracking
}

const scratchDirectory = "/var/lib/virtbackup/scratch"

func newKiller(t *testing.T) *killer {
	k := &killer{t: t}
	k.storage, k.scratch = mountRepository(t), mountScratch(t)
	k.host = newHostAt(t, k.storage.point)
	k.g = newGuest(t, "qcow2:16M", "qcow2:64M:fs")
	k.write("vda", 0, 256)
	k.backup(k.g, k.options())
	return k
}

// mountRepository mounts a fresh directory for a repository.
func mountRepository(t *testing.T) *faultFS {
	point := fresh(t, "/srv")
	return mountFaults(t, fresh(t, "/var/tmp"), point)
}

// mountScratch mounts a fresh directory as the daemon's scratch directory.
func mountScratch(t *testing.T) *faultFS {
	if err := os.MkdirAll(scratchDirectory, 0o711); err != nil {
		t.Fatal(err)
	}
	directory := fresh(t, "/var/tmp")
	if err := os.Chmod(directory, 0o711); err != nil {
		t.Fatal(err)
	}
	return mountFaults(t, directory, scratchDirectory)
}

func (k *killer) options() dbus.BackupOptions {
	// A daemon that dies at the point in time does not know whether the guest was
	// held still: that is no backup where it is required.
	quiesce, policy := dbus.QuiesceAgent, dbus.QuiescePrefer
	return dbus.BackupOptions{Settings: dbus.Settings{Quiesce: &quiesce, QuiescePolicy: &policy, Tracking: k.tracking}}
}

// write writes what was never written before over some clusters of a disk.
func (k *killer) write(target string, from, clusters int) {
	k.seed++
	k.g.io(target, fmt.Sprintf("write -P %d %dk %dk", k.seed%251+1, from*64, clusters*64))
}

func (k *killer) trap(s step) *trap {
	f := k.storage
	if s.scratch {
		f = k.scratch
	}
	if s.after {
		return f.stopAfter(s.in, s.op, s.path)
	}
	return f.stop(s.in, s.op, s.path)
}

// startAndStop starts a backup and waits until it has come to a step.
func (k *killer) startAndStop(s step) (job string, at *trap) {
	at = k.trap(s)
	job = k.start(k.g, k.options())
	at.wait()
	return job, at
}

// interrupted makes a backup that a fault befalls at a step, and brings back
// what that ended. It returns what the disk held at the point in time.
func (k *killer) interrupted(t *testing.T, f fault, s step) (j dbus.JobProperties, want snapshot) {
	k.retarget(t)
	k.write("vda", 3, 7)
	want = k.g.snapshot("vda")
	job, at := k.startAndStop(s)
	if s.reached("copying") {
		k.write("vda", 5, 9) // after the point in time
	}
	k.daemon = daemonPID(t)
	f.do(k, job)
	if f.settled != nil && !slices.Contains(f.needs, s.in) {
		f.settled(k)
	}
	at.letGo()
	if f.settled != nil {
		f.settled(k)
	}
	j = k.end(job)
	if k.g.state() == "shut off" {
		k.g.boot()
	}
	k.nothingLeft(k.g)
	return j, want
}

func (k *killer) try(t *testing.T, f fault, s step) {
	j, want := k.interrupted(t, f, s)
	if !slices.Contains(f.ends(s), j.State) {
		t.Errorf("the job is %s and not %v: %v", j.State, f.ends(s), j.Err())
	}
	if j.State == dbus.JobSucceeded {
		k.chainIsExact(k.made(j), want)
	} else if _, err := dbus.Get[dbus.BackupProperties](t.Context(), k.Client, j.Backup); err == nil {
		t.Errorf("the job is %s, and there is a backup of it", j.State)
	}
	k.write("vda", 200, 3)
	want = k.g.snapshot("vda")
	next := k.backup(k.g, k.options())
	t.Logf("%s; the next backup is %s %v", j.State, next.Kind, next.Causes)
	k.chainIsExact(next, want)
	k.nothingLeft(k.g)
}

// retarget makes all that reports to a test report to this one.
func (k *killer) retarget(t *testing.T) {
	k.t, k.host.t, k.g.t, k.storage.t, k.scratch.t = t, t, t, t, t
}

func (k *killer) cancel(job string) {
	if err := k.CancelJob(k.t.Context(), job); err != nil {
		k.t.Errorf("cannot cancel: %v", err)
	}
}

func (k *killer) killDaemon(string) {
	command(k.t, "", "systemctl", "reset-failed", "virtbackupd.service") // many of these are no reason to give up
	command(k.t, "", "kill", "-KILL", k.daemon)
}

func (k *killer) restartDaemon(string) {
	command(k.t, "", "systemctl", "reset-failed", "virtbackupd.service")
	command(k.t, "", "systemctl", "restart", "--no-block", "virtbackupd.service")
}

func (k *killer) awaitDaemon() {
	eventually(k.t, "virtbackupd is started again", func() error {
		if now := daemonPID(k.t); now == k.daemon || now == "0" {
			return fmt.Errorf("its process is %s", now)
		}
		return nil
	})
}

func daemonPID(t *testing.T) string {
	return command(t, "", "systemctl", "show", "--property=MainPID", "--value", "virtbackupd.service")
}

func (k *killer) killWorker(job string) {
	command(k.t, "", "systemctl", "kill", "--signal=KILL", "virtbackup-job-"+job+".service")
}

func (k *killer) killQEMU(string) {
	pid, err := os.ReadFile(filepath.Join("/run/libvirt/qemu", k.g.name+".pid"))
	if err != nil {
		k.t.Error(err)
	}
	command(k.t, "", "kill", "-KILL", strings.TrimSpace(string(pid)))
}

func (k *killer) destroy(string) {
	// It waits until QEMU is gone; awaitOff sees to that.
	cmd := exec.Command("virsh", "-q", "destroy", k.g.name)
	if err := cmd.Start(); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = cmd.Wait() })
}

func (k *killer) awaitOff() {
	eventually(k.t, "the guest is off", func() error {
		if state := k.g.state(); state != "shut off" {
			return fmt.Errorf("it is %s", state)
		}
		return nil
	})
}

func (k *killer) restartLibvirtd(string) {
	command(k.t, "", "systemctl", "restart", "--no-block", "libvirtd.service")
}

func (k *killer) awaitLibvirtd() { command(k.t, "", "virsh", "-q", "list") }
