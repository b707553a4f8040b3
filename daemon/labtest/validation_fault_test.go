//go:build lab

package labtest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

const validationDirectory = "/var/lib/virtbackup/validation"

// validationSteps are those of a validation, in their order. "scratch" is where
// the overlays are.
var validationSteps = []step{
	{name: "opening", in: theWorker, op: "read", path: `/domain\.xml$`},
	{name: "preparing", in: theDaemon, scratch: true, op: "create", path: `^` + ulid + `/vda\.qcow2$`},
	{name: "starting", in: qemu, scratch: true, op: "open", path: `^` + ulid + `/vda\.qcow2$`},
	{name: "running", in: qemu, scratch: true, op: "write", path: `^` + ulid + `/vda\.qcow2$`},
	{name: "ending", in: theDaemon, scratch: true, op: "unlink", path: `^` + ulid + `/vda\.qcow2$`},
}

// validationFaults are what comes at each step, and those at which it comes
// unless TEST_FAULTS is "all".
var validationFaults = []struct {
	fault
	at []string
}{
	{fault{"daemon-kill", (*killer).killDaemon, (*killer).awaitDaemon, []string{theDaemon}, succeeds}, []string{"running"}},
	{fault{"daemon-restart", (*killer).restartDaemon, (*killer).awaitDaemon, []string{theDaemon, qemu}, succeeds}, nil},
	{fault{"worker-kill", (*killer).killWorker, nil, nil, nil}, []string{"opening", "running"}},
	{fault{"cancel", (*killer).cancel, nil, nil, nil}, []string{"starting"}},
	{fault{"qemu-kill", (*killer).killValidation, nil, nil, nil}, []string{"running"}},
	{fault{"destroy", (*killer).destroyValidation, nil, nil, nil}, nil},
	{fault{"libvirtd-restart", (*killer).restartLibvirtd, (*killer).awaitLibvirtd, []string{qemu}, nil}, []string{"starting", "running"}},
}

// validationName is the temporary domain of a job.
func validationName(job string) string { return "virtbackup-validation-" + strings.ToLower(job) }

// killValidation kills the QEMU of a job's temporary domain.
func (k *killer) killValidation(job string) {
	pid, err := os.ReadFile(filepath.Join("/run/libvirt/qemu", validationName(job)+".pid"))
	if err != nil {
		k.t.Error(err)
	}
	command(k.t, "", "kill", "-KILL", strings.TrimSpace(string(pid)))
}

// destroyValidation has an admin take it for something left over.
func (k *killer) destroyValidation(job string) {
	killed := make(chan struct{})
	go func() { // it waits for QEMU
		defer close(killed)
		_, _ = tryVirsh("destroy", validationName(job))
	}()
	k.t.Cleanup(func() { <-killed })
}

// newValidationKiller has a chain of two backups, of a domain that is off since.
func newValidationKiller(t *testing.T) (*killer, dbus.BackupProperties, snapshot) {
	k := &killer{t: t, storage: mountRepository(t)}
	if err := os.MkdirAll(validationDirectory, 0o711); err != nil {
		t.Fatal(err)
	}
	directory := fresh(t, "/var/tmp")
	if err := os.Chmod(directory, 0o711); err != nil {
		t.Fatal(err)
	}
	k.scratch = mountFaults(t, directory, validationDirectory)
	k.host = newHostAt(t, k.storage.point)
	k.g = newGuest(t, "qcow2:32M:fs")
	k.backup(k.g, dbus.BackupOptions{})
	k.g.run("sh", "-c", "echo hello >/mnt/vda/hello && sync")
	b := k.backup(k.g, dbus.BackupOptions{})
	held := k.g.snapshot()
	command(t, "", "virsh", "-q", "destroy", k.g.name)
	return k, b, held
}

// startValidation starts to try a backup by waiting for its agent.
func (k *killer) startValidation(id string) (job string) {
	k.t.Helper()
	job, err := k.ValidateBackup(k.t.Context(), id, dbus.ValidateOptions{Steps: []string{"wait_for_boot"}})
	if err != nil {
		k.t.Fatal(err)
	}
	return job
}

// nothingLeftOfValidation waits until there is nothing of one, and holds that
// the backup is not said to be bad.
func (k *killer) nothingLeftOfValidation(b dbus.BackupProperties) {
	k.t.Helper()
	eventually(k.t, "nothing is left of the validation", func() error { return errors.Join(k.noJob(), noFiles(), noUnits()) })
	noValidation(k.t)
	now := k.validated(b.ID)
	if now.ValidationResult == dbus.ValidationNotValid || now.State != dbus.BackupComplete {
		k.t.Errorf("a good backup is %s and %s: %s: %s", now.State, now.ValidationResult, now.ValidationStep, now.ValidationCause)
	}
	if c, err := dbus.Get[dbus.ChainProperties](k.t.Context(), k.Client, now.Chain); err != nil || c.State != dbus.ChainOpen {
		k.t.Errorf("the chain of a good backup is %s (%s), %v", c.State, c.Cause, err)
	}
}

// TestValidationKilled has a fault come at each step of a validation. Whatever
// happens: a host that fails says nothing about the backup, nothing is left, and
// another try goes well.
func TestValidationKilled(t *testing.T) {
	k, b, held := newValidationKiller(t)
	for _, f := range validationFaults {
		for _, s := range validationSteps {
			if os.Getenv("TEST_FAULTS") != "all" && !slices.Contains(f.at, s.name) ||
				f.name == "worker-kill" && s.name == "ending" ||
				(f.name == "qemu-kill" || f.name == "destroy") && s.in != qemu {
				continue
			}
			t.Run(f.name+"/"+s.name, func(t *testing.T) { k.tryValidation(t, f.fault, s, b) })
		}
	}
	k.validationFails(t, b)
	t.Run("nobody's domain", func(t *testing.T) { k.nobodysDomain(t, b) }) // another try, too
	k.retarget(t)
	k.chainIsExact(b, held)
	t.Run("gives way", k.validationYields)
}

func (k *killer) tryValidation(t *testing.T, f fault, s step, b dbus.BackupProperties) {
	k.retarget(t)
	before := k.validated(b.ID)
	at := k.trap(s)
	job := k.startValidation(b.ID)
	at.wait()
	k.daemon = daemonPID(t)
	f.do(k, job)
	if f.settled != nil && !slices.Contains(f.needs, s.in) {
		f.settled(k)
	}
	at.letGo()
	if f.settled != nil {
		f.settled(k)
	}
	j := k.end(job)
	now := k.validated(b.ID)
	t.Logf("%s: %s; it is %q: %s", j.State, j.ErrorMessage, now.ValidationResult, now.ValidationCause)
	switch {
	case f.name == "daemon-kill", f.name == "daemon-restart":
		if j.State != dbus.JobSucceeded || now.ValidationResult != dbus.ValidationValid {
			t.Errorf("it is not begun again: %s, %v", j.State, j.Err())
		}
	case f.name == "cancel":
		if j.State != dbus.JobCancelled && s.name != "ending" {
			t.Errorf("it is %s", j.State)
		}
	case f.name == "libvirtd-restart" || s.name == "ending": // whether it can go on is for libvirt to say
	case j.State != dbus.JobFailed || errors.Is(j.Err(), dbus.ErrNotValid) || now.ValidationResult != dbus.ValidationUnable || now.Validated.Equal(before.Validated):
		t.Errorf("it is %s, and the backup %q: %v", j.State, now.ValidationResult, j.Err())
	}
	k.nothingLeftOfValidation(b)
}

// validationFails has what a validation needs fail while its guest runs: the
// space for its overlays, and the repository, which answers with errors, or not
// at all.
func (k *killer) validationFails(t *testing.T, b dbus.BackupProperties) {
	for name, c := range map[string]struct {
		in       *faultFS
		op, says string
		errno    syscall.Errno
	}{
		"full scratch":    {k.scratch, "write", "cannot write to an overlay", syscall.ENOSPC},
		"repository away": {k.storage, "read", "repository", syscall.EIO},
		"repository hung": {k.storage, "read", "repository", 0},
	} {
		if c.errno == 0 && os.Getenv("TEST_FAULTS") != "all" {
			continue // it takes as long as a guest has to wait at most
		}
		t.Run(name, func(t *testing.T) {
			k.retarget(t)
			starting := k.trap(validationSteps[slices.IndexFunc(validationSteps, func(s step) bool { return s.name == "starting" })])
			job := k.startValidation(b.ID)
			starting.wait()
			var fails *trap
			if c.errno == 0 {
				fails = c.in.stop(theWorker, c.op, `/vda\.qcow2$`)
			} else {
				fails = c.in.fail(c.op, `/vda\.qcow2$`, c.errno)
			}
			starting.letGo()
			fails.wait()
			if c.errno == 0 { // it is ended before the repository is back
				eventually(t, "it is given up", func() error {
					j, err := dbus.Get[dbus.JobProperties](t.Context(), k.Client, job)
					if err == nil && j.Phase != "ending" {
						err = fmt.Errorf("it is in phase %q", j.Phase)
					}
					return err
				})
				fails.letGo()
			}
			j := k.end(job)
			fails.letGo()
			now := k.validated(b.ID)
			t.Logf("%s", j.ErrorMessage)
			if j.State != dbus.JobFailed || errors.Is(j.Err(), dbus.ErrNotValid) || now.ValidationResult != dbus.ValidationUnable || !strings.Contains(j.ErrorMessage, c.says) {
				t.Errorf("it is %s, and the backup %q: %v", j.State, now.ValidationResult, j.Err())
			}
			k.nothingLeftOfValidation(b)
		})
	}
}

// nobodysDomain looks at the host while a temporary domain runs: it has no network
// and no display, and nobody takes it for a domain to be backed up.
func (k *killer) nobodysDomain(t *testing.T, b dbus.BackupProperties) {
	k.retarget(t)
	running := k.trap(validationSteps[3])
	job := k.startValidation(b.ID)
	running.wait()
	name := validationName(job)
	definition := virsh(t, "dumpxml", name)
	for _, bad := range []string{"<interface", "<graphics", "<hostdev", k.g.uuid, k.storage.point} {
		if strings.Contains(definition, bad) {
			t.Errorf("it has %s: %s", bad, definition)
		}
	}
	if !strings.Contains(definition, b.ID) || !strings.Contains(virsh(t, "list", "--title"), "virtbackup: validation of backup "+b.ID) {
		t.Errorf("nobody can tell what it is: %s", definition)
	}
	uuid := virsh(t, "domuuid", name)
	for _, verb := range [][]string{{"domain", "list"}, {"status"}} {
		if out := command(t, "", "virtbackupctl", verb...); strings.Contains(out, uuid) || strings.Contains(out, "validation-01") {
			t.Errorf("%v shows it: %s", verb, out)
		}
	}
	for _, by := range []string{name, uuid} {
		_, err := k.BackupDomain(t.Context(), by, dbus.BackupOptions{Offering: k.offering})
		refuses(t, "a backup of "+by, err, dbus.ErrNotFound)
	}
	running.letGo()
	if err := k.end(job).Err(); err != nil {
		t.Error(err)
	}
	k.nothingLeftOfValidation(b)
	// The hook told of each of its steps, and nobody keeps them.
	if left, err := filepath.Glob("/var/lib/virtbackup/hooks/*"); err != nil || len(left) > 0 {
		for _, file := range left {
			if text, _ := os.ReadFile(file); strings.Contains(string(text), uuid) {
				t.Errorf("the spool tells of it: %s", fmt.Sprint(left))
			}
		}
	}
	if out := command(t, "", "sh", "-c", "strings -n 36 /var/lib/virtbackup/catalog.sqlite* | grep -c "+uuid+" || :"); out != "0" {
		t.Errorf("the catalog tells of it: %s", out)
	}
}

// validationYields has a backup come while one before it is tried because its
// offering says so: nobody waits for that, so it gives way, and is begun again.
func (k *killer) validationYields(t *testing.T) {
	k.retarget(t)
	validate := func(yes bool) {
		k.set(dbus.OfferingOptions{Overrides: dbus.Overrides{Validation: dbus.Validation{Validate: &yes, ValidationSteps: &[]string{"wait_for_boot"}}}})
	}
	validate(true)
	assign(t, k.host, k.g)
	running := k.trap(validationSteps[3])
	b := k.backup(k.g, dbus.BackupOptions{})
	running.wait()
	operation := dbus.OperationValidate
	find := func() (found dbus.JobProperties) {
		for j, err := range k.Jobs(t.Context(), dbus.JobFilter{Domain: k.g.uuid, Operation: &operation}) {
			if err != nil {
				t.Fatal(err)
			}
			if j.Backup == b.ID {
				return j
			}
		}
		t.Fatal("no job tries it")
		return found
	}
	first := find()
	if first.State != dbus.JobRunning || first.Origin != dbus.OriginSystem {
		t.Errorf("%+v", first)
	}
	validate(false) // of the next one
	next := k.start(k.g, dbus.BackupOptions{})
	k.waits(next, first.ID) // which is asked to give way
	running.letGo()
	k.made(k.end(next))
	if again := find(); again.State != dbus.JobQueued && again.State != dbus.JobRunning {
		t.Errorf("it did not give way: %+v", again)
	}
	if j := k.end(first.ID); j.State != dbus.JobSucceeded || j.Attempt != 1 {
		t.Errorf("it is %s at attempt %d: %v", j.State, j.Attempt, j.Err())
	}
	k.nothingLeftOfValidation(b)
}

// TestValidationOfUnusedFirmware tries a backup of a domain with UEFI and a TPM that
// was never started, and so has neither variables nor a state yet: libvirt makes
// both for the temporary one, in places that are removed.
func TestValidationOfUnusedFirmware(t *testing.T) {
	h := newHost(t)
	g := &guest{t: t, name: filepath.Base(fresh(t, "/run/lab"))}
	command(t, "", "lab-domain", "create", g.name, "--uefi", "--disk", "qcow2:32M:fs")
	t.Cleanup(func() { command(t, "", "lab-domain", "remove", g.name) })
	definition := virsh(t, "dumpxml", "--inactive", g.name)
	command(t, strings.Replace(definition, "</devices>", fmt.Sprintf(tpmXML, "")+"</devices>", 1), "virsh", "-q", "define", "/dev/stdin")
	g.uuid = virsh(t, "domuuid", g.name)
	awaitDomain(t, g.name)
	b := h.backup(g, dbus.BackupOptions{})
	if files, err := filepath.Glob(filepath.Join(h.path, g.uuid, b.ID, "[nt][vp]*")); err != nil || len(files) > 0 {
		t.Errorf("the backup has %v, %v", files, err)
	}
	if err := h.validate(b.ID, "wait_for_boot").Err(); err != nil {
		t.Error(err)
	}
	noValidation(t)
	if _, err := os.Stat(tpmState(g.uuid)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the domain itself has a TPM's state now: %v", err)
	}
}

// TestValidationLeftOver finds what validations left that nobody knows any more, as
// when the host went down and the catalog was lost. A domain that somebody has
// made by a copy of such a one is somebody's.
func TestValidationLeftOver(t *testing.T) {
	configure(t, "")
	const job, another = "01KB5W3V9M8Q4T2R7XYZ0A1B2C", "01KB5W3V9M8Q4T2R7XYZ0A1B2D"
	domain := func(name string) {
		command(t, fmt.Sprintf(`<domain type='qemu'><name>%s</name>
			<metadata><v:validation xmlns:v='https://virtbackup.org/xmlns/validation/1' job='%s' backup='x'/></metadata>
			<memory unit='MiB'>16</memory><os><type arch='x86_64' machine='q35'>hvm</type></os><devices><memballoon model='none'/></devices></domain>`,
			name, job), "virsh", "-q", "create", "/dev/stdin", "--paused")
	}
	copied := filepath.Base(fresh(t, "/run/lab"))
	command(t, "", "systemctl", "stop", "virtbackupd.service")
	domain(validationName(job))
	domain(copied)
	t.Cleanup(func() { virsh(t, "destroy", copied) })
	for _, directory := range []string{validationDirectory, "/run/virtbackup/validation"} {
		for _, id := range []string{job, another} {
			if err := os.MkdirAll(filepath.Join(directory, id), 0o711); err != nil {
				t.Fatal(err)
			}
		}
	}
	overlay := filepath.Join(validationDirectory, another, "vda.qcow2")
	command(t, "", "qemu-img", "create", "-q", "-f", "qcow2", overlay, "1M")
	startDaemon(t)
	eventually(t, "it is removed", func() error {
		domains, err := tryVirsh("list", "--all", "--name")
		if err == nil && strings.Contains(domains, validationName(job)) {
			err = fmt.Errorf("domains: %s", domains)
		}
		left, _ := filepath.Glob(validationDirectory + "/*")
		more, _ := filepath.Glob("/run/virtbackup/validation/*")
		if left = append(left, more...); err == nil && len(left) > 0 {
			err = fmt.Errorf("%v", left)
		}
		return err
	})
	noValidation(t)
	awaitDomain(t, copied) // virtbackup shows it
	if state := virsh(t, "domstate", copied); state != "paused" {
		t.Errorf("the copy is %s", state)
	}
}
