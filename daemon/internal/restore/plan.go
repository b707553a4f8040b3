package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/daemon/internal/catalog"
	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
	"github.com/virtbackup/virtbackup/daemon/internal/repository"
	"github.com/virtbackup/virtbackup/daemon/internal/transfer"
	"github.com/virtbackup/virtbackup/dbus"
)

// Names of files of a backup that a restore uses.
const (
	definitionName = "domain.xml"
	nvramName      = "nvram"
)

// Plan says what a restore does.
type Plan struct {
	Backup     string     `json:"backup"`
	InPlace    bool       `json:"in_place"`
	DomainName string     `json:"domain_name"`
	DomainUUID string     `json:"domain_uuid"` // of a new domain: made when it runs
	Disks      []Disk     `json:"disks"`
	Files      []OnlyFile `json:"files"`
	Skipped    []string   `json:"skipped"` // targets of the definition that the new domain goes without
	Interfaces []string   `json:"interfaces"`
	Warnings   []string   `json:"warnings"`
	Secrets    []string   `json:"secrets"` // those of the warnings that say which secrets are needed
}

// Disk is one disk of a Plan.
type Disk struct {
	Target      string         `json:"target"`
	Destination string         `json:"destination"`
	Format      string         `json:"format"`
	Size        uint64         `json:"size"`
	StoredBytes uint64         `json:"stored_bytes"`
	Backups     []string       `json:"backups"` // whose images make it up, newest first
	Staging     string         `json:"staging"` // directory of the job, beside the destination
	Owner       transfer.Owner `json:"owner"`
	// Of an encrypted image that is restored as it is, with Format "raw".
	Container  string                `json:"container,omitempty"` // its own format
	Encryption hypervisor.Encryption `json:"encryption,omitzero"`
}

// OnlyFile is a file of a backup that is no disk. With no Destination of its
// own it is only needed while the job runs.
type OnlyFile struct {
	Name        string         `json:"name"`
	Destination string         `json:"destination"`
	Staging     string         `json:"staging"`
	Placed      bool           `json:"placed"` // whether it stays
	Fresh       bool           `json:"fresh"`  // in place: there is none that it takes the place of
	Owner       transfer.Owner `json:"owner"`
}

// RefusedError says all that stands against a restore.
type RefusedError struct {
	Backup  string
	Reasons []string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("cannot restore backup %s: %s", e.Backup, strings.Join(e.Reasons, "; "))
}

// Unwrap gives the error's name on the bus.
func (e *RefusedError) Unwrap() error { return dbus.ErrInvalidArgument }

// refusals collects reasons.
type refusals []string

func (r *refusals) add(format string, args ...any) { *r = append(*r, fmt.Sprintf(format, args...)) }

// Plan decides what a restore would do. A *RefusedError says why it would do
// nothing; the plan then holds what could be told.
func (k *Kind) Plan(ctx context.Context, r Request) (Plan, error) {
	b, err := k.Catalog.Backup(ctx, r.Backup)
	if err != nil {
		return Plan{}, err
	}
	var m repository.Manifest
	if b.Manifest != nil {
		if err := json.Unmarshal(b.Manifest, &m); err != nil {
			return Plan{}, fmt.Errorf("cannot read the manifest of backup %s: %w", b.ID, err)
		}
	}
	p := Plan{Backup: b.ID, InPlace: r.InPlace}
	var no refusals
	if err := k.planDisks(ctx, b, r, &p, &no); err != nil {
		return p, err
	}
	p.planContainers(m)
	if r.InPlace {
		err = k.planInPlace(ctx, b, m, &p, &no)
	} else {
		err = k.planNew(ctx, r, m, &p, &no)
	}
	if err == nil {
		err = k.planSecrets(ctx, m, &p)
	}
	if err == nil && len(no) > 0 {
		err = &RefusedError{b.ID, no}
	}
	return p, err
}

// planDisks finds the images of the disks that are asked for.
func (k *Kind) planDisks(ctx context.Context, b catalog.Backup, r Request, p *Plan, no *refusals) error {
	line, err := k.Catalog.ChainBackups(ctx, b.Chain)
	if err != nil {
		return err
	}
	var links []chain.Backup
	for _, l := range line {
		links = append(links, l.Link())
	}
	disks, err := chain.PlanRestore(links, b.ID)
	if err != nil {
		no.add("%v", err)
		return nil
	}
	for _, target := range r.Disks {
		if !slices.ContainsFunc(disks, func(d chain.DiskChain) bool { return d.Target == target }) {
			no.add("it has no disk %q", target)
		}
	}
	for _, d := range disks {
		if len(r.Disks) > 0 && !slices.Contains(r.Disks, d.Target) {
			p.Skipped = append(p.Skipped, d.Target)
			continue
		}
		one := Disk{Target: d.Target, Size: d.Size, Backups: d.Backups}
		for _, l := range line {
			i := slices.IndexFunc(l.Images, func(i catalog.Image) bool { return i.Target == d.Target })
			if i >= 0 && slices.Contains(d.Backups, l.ID) {
				one.StoredBytes += l.Images[i].StoredBytes
			}
			if i >= 0 && l.ID == b.ID {
				one.Format = formatFor(l.Images[i].Format)
			}
		}
		p.Disks = append(p.Disks, one)
	}
	return nil
}

// formatFor is what a disk is restored as: as it was, or as qcow2.
func formatFor(source string) string {
	if source == transfer.FormatRaw {
		return transfer.FormatRaw
	}
	return transfer.FormatQcow2
}

var domainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$`)

// planNew plans a new domain.
func (k *Kind) planNew(ctx context.Context, r Request, m repository.Manifest, p *Plan, no *refusals) error {
	p.DomainName = r.Name
	if !domainName.MatchString(r.Name) {
		no.add("%q cannot be the name of the new domain: use 1 to 64 letters, digits, dots, underscores, dashes and plus signs", r.Name)
		return nil
	}
	_, err := k.Hypervisor.Lookup(ctx, r.Name)
	if err == nil {
		no.add("there is a domain %q already: choose another name", r.Name)
	} else if !errors.Is(err, hypervisor.ErrNoDomain) {
		return err
	}
	directory, err := k.destination(r.Destination)
	if err != nil {
		no.add("%v", err)
		return nil
	}
	free := func(path string) string {
		if _, err := os.Lstat(path); err == nil {
			no.add("%s is there already: choose another name or destination", path)
		}
		return path
	}
	for i := range p.Disks {
		d := &p.Disks[i]
		d.Destination = free(filepath.Join(directory, r.Name+"-"+d.Target+"."+d.opened()))
	}
	p.Files = append(p.Files, OnlyFile{Name: definitionName, Destination: filepath.Join(directory, definitionName)})
	if hasFile(m, nvramName) {
		p.Files = append(p.Files, OnlyFile{Name: nvramName, Destination: free(filepath.Join(directory, r.Name+"-nvram.fd")), Placed: true})
	}
	planNewTPM(m, p, no)
	switch {
	case r.DropInterfaces:
		p.Interfaces = []string{"no network interface is kept"}
	case r.KeepMACs:
		p.Interfaces = []string{"every network interface keeps its MAC address"}
		p.Warnings = append(p.Warnings, "two domains with the same MAC addresses disturb each other while both run")
	default:
		p.Interfaces = []string{"every network interface gets a new MAC address"}
	}
	return nil
}

// destination returns the directory for a new domain's disks, without links.
func (k *Kind) destination(asked string) (string, error) {
	allowed := k.Destinations()
	if asked == "" {
		if len(allowed) == 0 {
			return "", errors.New("no destination is allowed: set restore.destinations in the configuration")
		}
		asked = allowed[0]
	}
	refused := fmt.Errorf("destination %q is not below one of %s: choose one of these, or have it added to restore.destinations", asked, strings.Join(allowed, ", "))
	asked = filepath.Clean(asked)
	for _, root := range allowed {
		realRoot, err := filepath.EvalSymlinks(root)
		if err != nil {
			continue
		}
		// Before a look at it: what there is elsewhere is not told.
		if !beneath(root, asked) && !beneath(realRoot, asked) {
			continue
		}
		real, err := filepath.EvalSymlinks(asked)
		if err != nil {
			return "", fmt.Errorf("destination %q: %w", asked, err)
		}
		if beneath(realRoot, real) {
			return real, nil
		}
	}
	return "", refused
}

// beneath tells whether path is directory or lies in it, by name.
func beneath(directory, path string) bool {
	return path == directory || strings.HasPrefix(path, strings.TrimSuffix(directory, "/")+"/")
}

// planInPlace plans the exchange of a domain's disks.
func (k *Kind) planInPlace(ctx context.Context, b catalog.Backup, m repository.Manifest, p *Plan, no *refusals) error {
	d, err := k.Hypervisor.ByUUID(ctx, b.Domain)
	if errors.Is(err, hypervisor.ErrNoDomain) {
		p.DomainName, p.DomainUUID = b.DomainName, b.Domain
		no.add("domain %q is not defined any more: restore it as a new domain", b.DomainName)
		return nil
	} else if err != nil {
		return err
	}
	p.DomainName, p.DomainUUID = d.Name, d.UUID
	if reason := occupied(d); reason != "" {
		no.add("%s", reason)
	}
	for i := range p.Disks {
		if err := p.Disks[i].replace(d); err != nil {
			no.add("%v", err)
		}
	}
	if hasFile(m, nvramName) && d.Firmware.NVRAM != "" && len(p.Skipped) == 0 {
		f := OnlyFile{Name: nvramName, Placed: true}
		if f.Destination, f.Owner, err = existing(d.Firmware.NVRAM); err == nil {
			p.Files = append(p.Files, f)
		} else {
			p.Warnings = append(p.Warnings, fmt.Sprintf("the firmware's variables are not restored: %v", err))
		}
	}
	planTPMInPlace(m, d, p)
	p.Interfaces = []string{"network interfaces stay as they are"}
	p.Warnings = append(p.Warnings, fmt.Sprintf("what the disks of %q hold now is given up; its next backup is full", d.Name))
	return nil
}

// occupied says why the disks of a domain cannot be exchanged.
func occupied(d hypervisor.Domain) string {
	switch {
	case d.Active:
		return fmt.Sprintf("domain %q is %s: shut it off first", d.Name, d.State)
	case d.HasManagedSave:
		return fmt.Sprintf("domain %q has a saved state, which fits only its present disks: start it, or remove it with virsh managedsave-remove", d.Name)
	case len(d.Snapshots) > 0:
		return fmt.Sprintf("domain %q has snapshots, as %q, which would be lost or left without their disks: delete them, or restore as a new domain", d.Name, d.Snapshots[0].Name)
	}
	return ""
}

// replace says which disk of the domain the image takes the place of.
func (d *Disk) replace(of hypervisor.Domain) error {
	now, ok := of.Disk(d.Target)
	switch {
	case !ok:
		return fmt.Errorf("domain %q has no disk %s any more: restore only the others, or as a new domain", of.Name, d.Target)
	case now.SourceType != "file":
		return fmt.Errorf("disk %s of domain %q is no file: restore as a new domain", d.Target, of.Name)
	case now.Format != transfer.FormatRaw && now.Format != transfer.FormatQcow2:
		return fmt.Errorf("disk %s of domain %q has format %q: restore as a new domain", d.Target, of.Name, now.Format)
	}
	if now.Encrypted != (d.Container != "") || d.Container != "" && now.Format != d.Container {
		return fmt.Errorf("disk %s of domain %q is not encrypted as the backup is: restore as a new domain", d.Target, of.Name)
	}
	var err error
	if d.Container == "" {
		d.Format = now.Format
	}
	if d.Destination, d.Owner, err = existing(now.Source); err != nil {
		return fmt.Errorf("disk %s of domain %q: %w", d.Target, of.Name, err)
	}
	return nil
}

// existing returns where a file really is, and whose.
func existing(path string) (string, transfer.Owner, error) {
	real, err := resolve(path)
	if err != nil {
		return "", transfer.Owner{}, err
	}
	owner, err := ownerOf(real)
	return real, owner, err
}

// maxLinks is how many links the kernel follows in one path (MAXSYMLINKS).
const maxLinks = 40

// resolve follows the links in a path, if they are root's. QEMU's user may put
// one in the place of its NVRAM, and who has disks in a directory of their own
// in the place of one, to have any other file replaced.
func resolve(path string) (string, error) {
	real, links := "/", 0
	for left := strings.Split(path, "/"); len(left) > 0; {
		next := filepath.Join(real, left[0])
		left = left[1:]
		var st unix.Stat_t
		if err := unix.Lstat(next, &st); err != nil {
			return "", fmt.Errorf("cannot look at %s: %w", next, err)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFLNK {
			real = next
			continue
		}
		if links++; st.Uid != 0 || links > maxLinks {
			return "", fmt.Errorf("%s is a symbolic link that is not root's, or one of too many", next)
		}
		to, err := os.Readlink(next)
		if err != nil {
			return "", fmt.Errorf("cannot look at %s: %w", next, err)
		}
		if filepath.IsAbs(to) {
			real = "/"
		}
		left = append(strings.Split(to, "/"), left...)
	}
	return real, nil
}

// ownerOf returns whose a file is, which must be one with a single name.
func ownerOf(path string) (transfer.Owner, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return transfer.Owner{}, fmt.Errorf("cannot look at %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink > 1 {
		return transfer.Owner{}, fmt.Errorf("%s is no file with a single name", path)
	}
	uid, gid := int(st.Uid), int(st.Gid)
	return transfer.Owner{UID: &uid, GID: &gid, Mode: st.Mode & 0o777}, nil
}

func hasFile(m repository.Manifest, name string) bool {
	return slices.ContainsFunc(m.Files, func(f repository.File) bool { return f.Name == name })
}

// settle fixes what is only known when the job runs.
func (p *Plan) settle(jobID string) {
	if !p.InPlace {
		p.DomainUUID = uuid.NewString()
	}
	name := ".virtbackup-" + jobID
	for i := range p.Disks {
		p.Disks[i].Staging = filepath.Join(filepath.Dir(p.Disks[i].Destination), name)
	}
	for i := range p.Files {
		f := &p.Files[i]
		if f.isTPM() && !p.InPlace {
			f.Destination = hypervisor.TPMStateFile(p.DomainUUID, f.tpmVersion())
		}
		f.Staging = filepath.Join(filepath.Dir(f.Destination), name)
		if f.isTPM() {
			f.Staging = tpmStaging(f.Destination, name)
		}
	}
}
