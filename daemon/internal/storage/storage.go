// Package storage knows the kinds of storage that a repository may lie on: what
// their addresses look like, which options a mount of them may have, and what
// credentials they take. It is pure: it says what is to be mounted, and mounts
// nothing.
//
// Whoever may add a repository must not thereby become root. So an option is
// refused unless it is listed here with the values that it may have, no value
// can hold a comma, and nosuid, nodev and noexec are always set.
package storage

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Types of storage.
const (
	Directory = "dir"    // a directory of the host; whoever mounts what is below it is not us
	NFS       = "nfs"    // host:/export
	CIFS      = "cifs"   // //host/share
	CephFS    = "cephfs" // monitors:/path
	Mount     = "mount"  // a block device, or what else the kernel has a file system for
)

// Types returns all of them.
func Types() []string { return []string{Directory, NFS, CIFS, CephFS, Mount} }

// Mounted tells whether storage of a type is mounted by virtbackup.
func Mounted(typ string) bool { return typ != Directory }

// Place is where a repository is, for a type that is mounted.
type Place struct {
	Type       string
	Address    string
	FileSystem string   // of type mount
	Options    []string // each as "name" or "name=value"
}

// Spec is what mount(8) is told.
type Spec struct {
	What, Type, Options string
	Force               bool // an unmount need not wait for a server that does not answer
}

var (
	host      = `(\[[0-9a-fA-F:]+(%[a-z0-9]+)?\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)`
	directory = `(/[A-Za-z0-9_@+~][A-Za-z0-9._@+~-]*)`
	word      = `[A-Za-z0-9_][A-Za-z0-9._-]*`

	nfsAddress  = regexp.MustCompile(`^` + host + `:(/|` + directory + `+)$`)
	cifsAddress = regexp.MustCompile(`^//` + host + `(/[A-Za-z0-9_][A-Za-z0-9._$-]*)` + directory + `*$`)
	// Monitors with their ports, or user@fsid.name= with the monitors of the configuration.
	cephAddress = regexp.MustCompile(`^((` + host + `(:[0-9]{1,5})?)(,` + host + `(:[0-9]{1,5})?)*:|` + word + `@([0-9a-f-]{36})?\.` + word + `=)(/|` + directory + `+)$`)
	device      = regexp.MustCompile(`^(/dev` + directory + `+|(UUID|LABEL|PARTUUID|PARTLABEL)=` + word + `)$`)
	tag         = regexp.MustCompile(`^` + word + `$`)
)

// address is what the addresses of one type look like.
type address struct {
	pattern *regexp.Regexp
	like    string
}

const addressLimit = 1024

// fileSystems are those that may be mounted as type mount, and their addresses.
// None has a helper that runs a program of somebody's choice, as fuse.* has.
func fileSystems() map[string]address {
	block := address{device, "/dev/disk/by-id/…, UUID=… or LABEL=…"}
	return map[string]address{
		"ext4": block, "xfs": block, "btrfs": block, "gfs2": block, "ocfs2": block,
		"virtiofs": {tag, "the tag of the share"},
	}
}

// FileSystems returns the names of those.
func FileSystems() []string {
	var names []string
	for name := range fileSystems() {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (p Place) address() (address, error) {
	switch p.Type {
	case NFS:
		return address{nfsAddress, "nas.example.org:/export/backup"}, nil
	case CIFS:
		return address{cifsAddress, "//nas.example.org/backup"}, nil
	case CephFS:
		return address{cephAddress, "mon1.example.org,mon2.example.org:/backup, or user@.name=/backup"}, nil
	case Mount:
		if a, ok := fileSystems()[p.FileSystem]; ok {
			return a, nil
		}
		return address{}, fmt.Errorf("%q is no file system that is mounted: use one of %s", clip(p.FileSystem), strings.Join(FileSystems(), ", "))
	}
	return address{}, fmt.Errorf("storage of type %q is not known: use one of %s", clip(p.Type), strings.Join(Types(), ", "))
}

// Check says what is wrong with a place.
func (p Place) Check() error {
	a, err := p.address()
	if err != nil {
		return err
	}
	if p.Type != Mount && p.FileSystem != "" {
		return fmt.Errorf("only storage of type %q is given a file system", Mount)
	}
	if len(p.Address) > addressLimit || !a.pattern.MatchString(p.Address) || upwards(p.Address) {
		return fmt.Errorf("%q is no address of storage of type %q: it has to be like %s", clip(p.Address), p.Type, a.like)
	}
	return p.checkOptions()
}

// upwards tells whether a path leads out of where it begins, or through it.
func upwards(address string) bool {
	return slices.ContainsFunc(strings.Split(address, "/"), func(part string) bool { return part == "." || part == ".." })
}

func (p Place) checkOptions() error {
	known, seen := p.options(), map[string]bool{}
	for _, o := range p.Options {
		name, value, valued := strings.Cut(o, "=")
		allowed, ok := known[name]
		if !ok {
			return fmt.Errorf("%q is no option that storage of type %q may have: use %s", clip(name), p.Type, strings.Join(names(known), ", "))
		}
		if valued != allowed.valued() || valued && !allowed.pattern.MatchString(value) {
			return fmt.Errorf("%q is not what option %q may be: use %s", clip(o), name, allowed.help(name))
		}
		if seen[name] {
			return fmt.Errorf("option %q is given twice", name)
		}
		seen[name] = true
	}
	return nil
}

func names(known map[string]option) []string {
	var all []string
	for name := range known {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// Spec says how a place is mounted. credentials is the path of the file with
// them, "" if there are none.
func (p Place) Spec(credentials string) Spec {
	s := Spec{What: p.Address, Type: p.Type}
	options := append([]string{"nosuid", "nodev", "noexec"}, p.Options...)
	switch p.Type {
	case NFS:
		// Whether nfs4 or nfs, the helper is the same; a server may forget who we
		// are without our waiting for ever at an unmount.
		s.Force = true
	case CIFS:
		// Root's alone, whatever the server says.
		options = append(options, "uid=0", "gid=0", "file_mode=0600", "dir_mode=0700")
		switch {
		case credentials != "":
			options = append(options, "credentials="+credentials)
		case !slices.ContainsFunc(p.Options, func(o string) bool { return strings.HasPrefix(o, "sec=krb5") }):
			options = append(options, "guest") // or the helper asks for a password
		}
	case CephFS:
		s.Type = "ceph"
		if credentials != "" {
			options = append(options, "secretfile="+credentials)
		}
	case Mount:
		s.Type = p.FileSystem
	}
	s.Options = strings.Join(options, ",")
	return s
}

const credentialsLimit = 4096

var cephSecret = regexp.MustCompile(`^[A-Za-z0-9+/]{16,200}={0,2}$`)

// Credentials checks what somebody gave as credentials of a type, and returns
// what is to stand in their file. No error tells any of it.
func Credentials(typ, content string) (string, error) {
	if len(content) > credentialsLimit {
		return "", fmt.Errorf("credentials have at most %d bytes", credentialsLimit)
	}
	switch typ {
	case CIFS:
		return cifsCredentials(content)
	case CephFS:
		secret := strings.TrimSpace(content)
		if !cephSecret.MatchString(secret) {
			return "", errors.New("the credentials are no secret of Ceph: give what \"ceph auth print-key\" prints")
		}
		return secret + "\n", nil
	}
	return "", fmt.Errorf("storage of type %q takes no credentials", clip(typ))
}

func cifsCredentials(content string) (string, error) {
	var b strings.Builder
	seen := map[string]bool{}
	for line := range strings.Lines(content) {
		line = strings.TrimRight(line, "\r\n")
		if line == "" {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || !slices.Contains([]string{"username", "password", "domain"}, key) || seen[key] || strings.ContainsFunc(value, control) {
			return "", errors.New("the credentials are not as those of mount.cifs(8): give lines username=…, password=… and, where needed, domain=…")
		}
		seen[key] = true
		fmt.Fprintf(&b, "%s=%s\n", key, value)
	}
	if !seen["username"] {
		return "", errors.New("the credentials have no line username=…")
	}
	return b.String(), nil
}

func control(r rune) bool { return r < ' ' || r == 0x7f }

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
