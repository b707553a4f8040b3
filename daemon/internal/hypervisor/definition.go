package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"libvirt.org/go/libvirt"
)

// Changes says how a new definition differs from the one it is made from.
type Changes struct {
	Name            string             // required
	UUID            string             // "" = libvirt makes one
	Title           string             // "" = as it was
	Description     string             // "" = as it was
	KeepMACs        bool               // otherwise libvirt makes new ones
	DropInterfaces  bool               // no network at all
	Disks           map[string]NewDisk // by target; every disk of the definition is here, unless SkipOtherDisks
	SkipOtherDisks  bool               // leave out every disk that is not in Disks (an optical or floppy drive stays, empty)
	NVRAM           string             // path of the restored variable store; "" = libvirt makes a new one
	BootDirectories []string           // kernel and initrd for direct boot may lie below these; none = direct boot is refused
	BootFiles       []string           // or be these
}

// NewDisk is where a disk's content is now.
type NewDisk struct {
	Path   string // absolute
	Format string // "qcow2" or "raw"
	Block  bool   // Path is a block device
	// Encryption of what is there; the zero value for none.
	Encryption Encryption
}

// firmwareDirectories are where distributions install firmware images.
var firmwareDirectories = []string{
	"/usr/share/OVMF", "/usr/share/ovmf", "/usr/share/AAVMF", "/usr/share/edk2", "/usr/share/edk2-ovmf",
	"/usr/share/qemu", "/usr/share/qemu-kvm", "/usr/share/qemu-efi-aarch64", "/usr/share/seabios",
}

// rebuild is one run of NewDefinition.
type rebuild struct {
	changes Changes
	dropped []string
	used    map[string]bool // targets that the definition has
}

// NewDefinition makes a definition to define from one that may come from an
// untrusted repository. It is rebuilt from an allow-list (rules.go): nothing in
// it makes the host run a program, open a file other than those in changes, or
// connect anywhere. It returns what was left out, as paths of elements.
// Changes that do not fit (a disk without a place, a kernel that is not
// allowed) are errors.
func NewDefinition(doc []byte, changes Changes) (definition string, dropped []string, err error) {
	out, dropped, err := newDefinition(doc, changes)
	if err != nil {
		return "", nil, err
	}
	definition, err = out.marshal()
	return definition, dropped, err
}

func newDefinition(doc []byte, changes Changes) (out *element, dropped []string, err error) {
	if err := changes.check(); err != nil {
		return nil, nil, fmt.Errorf("cannot make a definition: %w", err)
	}
	root, err := parseTree(doc)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a definition: %w", err)
	}
	if root.name != "domain" {
		return nil, nil, fmt.Errorf("cannot make a definition: the root element is %q, not domain", root.name)
	}
	r := &rebuild{changes: changes, used: make(map[string]bool)}
	out, err = r.filter("domain", root, definitionRules())
	if err == nil {
		err = r.allUsed()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a definition: %w", err)
	}
	return out, r.dropped, nil
}

func (c Changes) check() error {
	if err := checkName(c.Name); err != nil {
		return err
	}
	if c.UUID != "" && !uuidPattern.MatchString(c.UUID) {
		return fmt.Errorf("%q is not a UUID", c.UUID)
	}
	for target, k := range c.Disks {
		if !filepath.IsAbs(k.Path) || filepath.Clean(k.Path) != k.Path {
			return fmt.Errorf("disk %s: %q is not an absolute, clean path", target, k.Path)
		}
		if k.Format != "qcow2" && k.Format != "raw" {
			return fmt.Errorf("disk %s: unknown format %q", target, k.Format)
		}
	}
	if c.NVRAM != "" && !filepath.IsAbs(c.NVRAM) {
		return fmt.Errorf("%q is not an absolute path", c.NVRAM)
	}
	return nil
}

// checkName refuses names that libvirt refuses, and those that cannot be a
// part of a file's name, as libvirt uses them.
func checkName(name string) error {
	switch {
	case name == "", name == ".", name == "..":
		return fmt.Errorf("%q cannot be a domain's name", name)
	case !utf8.ValidString(name), strings.ContainsFunc(name, unicode.IsControl), strings.Contains(name, "/"):
		return fmt.Errorf("the name %q has a slash or a control character", name)
	}
	return nil
}

func (r *rebuild) allUsed() error {
	for target := range r.changes.Disks {
		if !r.used[target] {
			return fmt.Errorf("the definition has no disk %s", target)
		}
	}
	return nil
}

func (r *rebuild) drop(path string) {
	if !slices.Contains(r.dropped, path) {
		r.dropped = append(r.dropped, path)
	}
}

// filter copies what the rule allows of e, which is at path. It returns nil
// when all of it is dropped.
func (r *rebuild) filter(path string, e *element, allowed *rule) (*element, error) {
	out := &element{name: e.name}
	names := strings.Fields(allowed.attrs)
	for _, a := range e.attrs {
		switch {
		case !allowed.any && !contains(names, a.name), !plain(a.value), !plain(a.name):
			if path != "domain" || a.name != "id" { // a running domain's number
				r.drop(path + "/@" + a.name)
			}
		default:
			out.attrs = append(out.attrs, a)
		}
	}
	if text := strings.TrimSpace(e.text); text != "" {
		switch {
		case allowed.text == textFree:
			out.text = text
		case (allowed.text == textPlain || allowed.any) && plain(text):
			out.text = text
		default:
			r.drop(path + "/text()")
		}
	}
	for _, c := range e.children {
		sub, below := allowed.children[c.name], path+"/"+c.name
		if sub == nil && allowed.any && plain(c.name) {
			sub = anything
		}
		if sub == nil {
			r.drop(below)
			continue
		}
		if sub.silent {
			continue
		}
		kept, err := r.filter(below, c, sub)
		if err != nil {
			return nil, err
		}
		if kept == nil {
			continue
		}
		out.children = append(out.children, kept)
	}
	if allowed.fix == nil {
		return out, nil
	}
	keep, err := allowed.fix(r, e, out)
	if err != nil {
		return nil, err
	}
	if !keep {
		return nil, nil
	}
	return out, nil
}

// BackupDefinition returns the definition to store with a backup, without
// secrets: of an active domain the live one, which has the disks that were
// attached since its start, without what belongs to this run of QEMU only.
func (h *Hypervisor) BackupDefinition(ctx context.Context, uuid string) (string, error) {
	return withDomain(ctx, h, uuid, "read the definition of", func(d *libvirt.Domain) (string, error) {
		active, err := d.IsActive()
		if err != nil {
			return "", err
		}
		if active {
			doc, err := d.GetXMLDesc(libvirt.DOMAIN_XML_MIGRATABLE)
			return withoutPasswords(doc), err
		}
		return d.GetXMLDesc(libvirt.DOMAIN_XML_INACTIVE)
	})
}

// passwords are the attributes that libvirt writes for VIR_DOMAIN_XML_SECURE
// only, which VIR_DOMAIN_XML_MIGRATABLE implies. It quotes all attributes with
// apostrophes, and escapes these in any value or text.
var passwords = regexp.MustCompile(` passwd='[^']*'`)

func withoutPasswords(doc string) string { return passwords.ReplaceAllLiteralString(doc, "") }

// Define defines a new domain and returns its UUID. The error is
// ErrDomainExists when its name or UUID is taken. libvirt has no such mode: a
// domain that appears between our look and the definition would be redefined,
// which libvirt refuses unless both name and UUID are the same.
func (h *Hypervisor) Define(ctx context.Context, definition string) (uuid string, err error) {
	root, err := parseTree([]byte(definition))
	if err != nil {
		return "", err
	}
	return withConnect(ctx, h, "define a domain", func(c *libvirt.Connect) (string, error) {
		if name := root.child("name"); name != nil {
			if err := mustNotExist(c.LookupDomainByName(name.text)); err != nil {
				return "", err
			}
		}
		if id := root.child("uuid"); id != nil {
			if err := mustNotExist(c.LookupDomainByUUIDString(id.text)); err != nil {
				return "", err
			}
		}
		d, err := c.DomainDefineXML(definition)
		if err != nil {
			return "", err
		}
		defer freeDomain(d)
		return d.GetUUIDString()
	})
}

func mustNotExist(d *libvirt.Domain, err error) error {
	if err == nil {
		freeDomain(d)
		return ErrDomainExists
	}
	if isCode(err, libvirt.ERR_NO_DOMAIN) {
		return nil
	}
	return err
}

// Undefine removes the definition of a stopped domain, and what libvirt keeps
// beside it: NVRAM when removeNVRAM says so, saved state and the metadata of
// checkpoints. Disk images stay. It is fine when there is no such domain.
func (h *Hypervisor) Undefine(ctx context.Context, uuid string, removeNVRAM bool) error {
	flags := libvirt.DOMAIN_UNDEFINE_KEEP_NVRAM
	if removeNVRAM {
		flags = libvirt.DOMAIN_UNDEFINE_NVRAM
	}
	err := h.onDomain(ctx, uuid, "undefine", func(d *libvirt.Domain) error {
		return d.UndefineFlags(flags | libvirt.DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
	})
	if errors.Is(err, ErrNoDomain) {
		return nil
	}
	return err
}

// Start starts a domain; paused starts it without letting it run.
func (h *Hypervisor) Start(ctx context.Context, uuid string, paused bool) error {
	flags := libvirt.DOMAIN_NONE
	if paused {
		flags = libvirt.DOMAIN_START_PAUSED
	}
	return h.onDomain(ctx, uuid, "start", func(d *libvirt.Domain) error { return d.CreateWithFlags(flags) })
}

// Shutdown asks the guest to shut down, and returns without waiting for it.
func (h *Hypervisor) Shutdown(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, "shut down", func(d *libvirt.Domain) error { return d.Shutdown() })
}

// Destroy ends the domain's QEMU at once. It is fine when the domain is not running.
func (h *Hypervisor) Destroy(ctx context.Context, uuid string) error {
	return h.onDomain(ctx, uuid, "destroy", func(d *libvirt.Domain) error {
		active, err := d.IsActive()
		if err != nil || !active {
			return err
		}
		return d.Destroy()
	})
}
