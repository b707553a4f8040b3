package validation

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/oklog/ulid/v2"
	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/failure"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// place is where a job has what it makes. All of it follows from the job's id:
// whoever clears up needs to know nothing else.
type place struct {
	uuid      string // of the temporary domain
	directory string // overlays, definition and NVRAM
	sockets   string
}

func (k *Kind) place(jobID string) place {
	return place{uuidOf(jobID), filepath.Join(k.Directory, jobID), filepath.Join(k.RuntimeDirectory, jobID)}
}

// uuidOf is the UUID of a job's domain (RFC 9562, version 8).
func uuidOf(jobID string) string {
	sum := sha256.Sum256([]byte("virtbackup validation " + jobID))
	u := sum[:16]
	u[6], u[8] = u[6]&0x0f|0x80, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

func (p place) overlay(target string) string { return filepath.Join(p.directory, target+".qcow2") }
func (p place) socket(target string) string  { return filepath.Join(p.sockets, target+".sock") }

// tpm is the directory in which libvirt looks for the state of the domain's TPM.
func (p place) tpm() string { return filepath.Join(hypervisor.TPMDirectory, p.uuid) }

// logs are patterns of what libvirt and swtpm write about a domain, and leave.
func logs(jobID string) []string {
	name := hypervisor.ValidationName(jobID)
	return []string{"/var/log/libvirt/qemu/" + name + ".log*", "/var/log/swtpm/libvirt/qemu/" + name + "-swtpm.log*"}
}

// passable: QEMU, under its own user, has to come to its files and sockets.
const passable = 0o711

// make makes the directories.
func (t *trial) make() error {
	for _, d := range []string{t.Directory, t.directory, t.RuntimeDirectory, t.sockets} {
		if err := os.MkdirAll(d, passable); err != nil {
			return fmt.Errorf("cannot make a directory for a validation: %w", err)
		}
		if err := os.Chmod(d, passable); err != nil { // the umask took bits away
			return fmt.Errorf("cannot make a directory for a validation: %w", err)
		}
	}
	if state := t.tpmState(); state != "" {
		if err := os.MkdirAll(filepath.Dir(state), 0o700); err != nil {
			return fmt.Errorf("cannot make a directory for the TPM's state: %w", err)
		}
	}
	return nil
}

// spaceEvery is how often it is looked how much is free while the guest writes.
const spaceEvery = 250 * time.Millisecond

// watchSpace ends the guest before it takes what must stay free, which backups
// and the catalog live on.
func (t *trial) watchSpace(ctx context.Context, g *guest, end context.CancelCauseFunc) {
	tick := time.NewTicker(spaceEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := t.free(t.settings.MinimumFree / 2); err != nil {
				g.impede(err)
				end(err)
				return
			}
		}
	}
}

// free refuses to begin, or to go on, when so little is free for what the guest writes.
func (t *trial) free(least uint64) error {
	if err := os.MkdirAll(t.Directory, passable); err != nil {
		return fmt.Errorf("cannot make a directory for a validation: %w", err)
	}
	var s unix.Statfs_t
	if err := unix.Statfs(t.Directory, &s); err != nil {
		return fmt.Errorf("cannot ask for the free space below %s: %w", t.Directory, err)
	}
	if free := s.Bavail * uint64(s.Bsize); free < least {
		return failure.Errorf(dbus.ErrUnable, "only %d MiB are free below %s for what the guest writes, and limits.minimum_free_scratch is %d MiB: make space there", free>>20, t.Directory, least>>20)
	}
	return nil
}

// has tells whether the backup has such a file.
func (t *trial) has(name string) bool {
	for _, f := range t.manifest.Files {
		if f.Name == name {
			return true
		}
	}
	return false
}

// tpmFile is the name of the file with the state of the TPM; "" for none.
func (t *trial) tpmFile() string {
	for _, f := range t.manifest.Files {
		if strings.HasPrefix(f.Name, "tpm/") && hypervisor.TPMVersion(path.Base(f.Name)) != "" {
			return f.Name
		}
	}
	return ""
}

// tpmState is where the state of the TPM goes; "" if there is none.
func (t *trial) tpmState() string {
	name := t.tpmFile()
	if name == "" {
		return ""
	}
	return hypervisor.TPMStateFile(t.uuid, hypervisor.TPMVersion(path.Base(name)))
}

// files are those of the backup that the domain needs.
func (t *trial) files(qemu transfer.Owner) []transfer.RestoreFile {
	all := []transfer.RestoreFile{{Name: definitionName, Directory: t.directory, Destination: definitionName}}
	if t.has(nvramName) {
		all = append(all, transfer.RestoreFile{Name: nvramName, Directory: t.directory, Destination: nvramName, Owner: qemu})
	}
	if state := t.tpmState(); state != "" {
		all = append(all, transfer.RestoreFile{Name: t.tpmFile(), Directory: filepath.Dir(state), Destination: filepath.Base(state)})
	}
	return all
}

// giveTPM gives the state of the TPM to swtpm, which was nobody else's until then.
func (t *trial) giveTPM() error {
	state := t.tpmState()
	if state == "" {
		return nil
	}
	uid, gid, err := hypervisor.TPMOwner()
	if err == nil {
		err = errors.Join(os.Chown(state, uid, gid), os.Chown(filepath.Dir(state), uid, gid), os.Chmod(t.tpm(), passable))
	}
	if err != nil {
		return fmt.Errorf("cannot give the TPM's state to swtpm: %w", err)
	}
	return nil
}

// clear ends and removes whatever there is of a job.
func (k *Kind) clear(ctx context.Context, jobID, uuid string) error {
	// First who reads, then who serves, then what both have open.
	if err := k.endDomain(ctx, uuid); err != nil {
		return err
	}
	if err := k.Errand.End(ctx, jobID); err != nil {
		return err
	}
	return k.removeFiles(jobID)
}

// endDomain ends a temporary domain. A libvirt that is restarted just then is
// asked again: what came of the validation must not depend on that.
func (k *Kind) endDomain(ctx context.Context, uuid string) error {
	limited, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	for {
		err := k.Hypervisor.EndValidation(limited, uuid)
		if err == nil {
			return nil
		}
		select {
		case <-limited.Done():
			return err
		case <-time.After(endAgain):
		}
	}
}

func (k *Kind) removeFiles(jobID string) error {
	p := k.place(jobID)
	errs := []error{os.RemoveAll(p.sockets), os.RemoveAll(p.tpm())}
	for _, pattern := range logs(jobID) {
		files, _ := filepath.Glob(pattern) // it is a good pattern
		for _, file := range files {
			if err := os.Remove(file); !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	err := errors.Join(errs...)
	if err == nil { // last: by this the rest is found again
		err = os.RemoveAll(p.directory)
	}
	if err != nil {
		return fmt.Errorf("cannot remove what a validation left: %w", err)
	}
	return nil
}

// Reconcile removes what is there of jobs that have ended: of a daemon that was
// killed, or a host that went down. Call it before the engine starts, and every
// now and then.
func (k *Kind) Reconcile(ctx context.Context) error {
	// What is there first: a job that begins after this is in no list of the jobs.
	domains, err := k.Hypervisor.Validations(ctx)
	if err != nil {
		return err
	}
	left := map[string]string{}
	for _, d := range domains {
		left[d.Job] = d.UUID
	}
	for _, parent := range []string{k.Directory, k.RuntimeDirectory} {
		entries, err := os.ReadDir(parent)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot look for what validations left: %w", err)
		}
		for _, e := range entries {
			if _, err := ulid.ParseStrict(e.Name()); err == nil && left[e.Name()] == "" {
				left[e.Name()] = uuidOf(e.Name())
			}
		}
	}
	jobs, err := k.Catalog.UnfinishedJobs(ctx)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		delete(left, j.ID)
	}
	var errs []error
	for id, uuid := range left {
		k.Log.WarnContext(ctx, "removing what a validation left", "job", id)
		errs = append(errs, k.clear(ctx, id, uuid))
	}
	return errors.Join(errs...)
}
