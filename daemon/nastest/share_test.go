//go:build nas

package nastest

import (
	"path/filepath"
	"strings"
	"testing"
)

// serveNFS exports a directory with the kernel's server.
func serveNFS(t *testing.T, directory string) (address string) {
	t.Helper()
	write(t, filepath.Join("/etc/exports.d", filepath.Base(directory)+".exports"), directory+" localhost(rw,no_root_squash,no_subtree_check,sync)\n")
	command(t, "", "systemctl", "start", "rpcbind.service", "nfs-server.service")
	command(t, "", "exportfs", "-ra") //nolint:misspell // its name
	return "localhost:" + directory
}

const password = "c4nary-of-a-share"

// serveCIFS shares a directory with Samba, and makes a file with what a client needs.
func serveCIFS(t *testing.T, directory string) (address, credentials string) {
	t.Helper()
	name := filepath.Base(directory)
	write(t, "/etc/samba/smb.conf", "[global]\nserver role = standalone server\nserver min protocol = SMB3_11\nload printers = no\ndisable spoolss = yes\n"+
		"interfaces = lo\nbind interfaces only = yes\n["+name+"]\npath = "+directory+"\nread only = no\nforce user = root\nvalid users = root\n")
	command(t, password+"\n"+password+"\n", "smbpasswd", "-s", "-a", "root")
	command(t, "", "systemctl", "restart", "smbd.service")
	credentials = filepath.Join(t.TempDir(), "credentials")
	write(t, credentials, "username=root\npassword="+password+"\n")
	return "//localhost/" + name, credentials
}

// comesBack makes a full backup and an increment on a share, restores both, and
// looks at the mount.
func (r *repository) comesBack(domain, fileSystem, option string) {
	r.t.Helper()
	newDomain(r.t, domain, "8M")
	first := change(r.t, domain, "write -q -P 1 0 1M")
	a := r.backUp(domain)
	if mount := command(r.t, "", "findmnt", "-no", "FSTYPE,OPTIONS", r.point()); !strings.HasPrefix(mount, fileSystem) ||
		!strings.Contains(mount, "nosuid,nodev,noexec") || !strings.Contains(mount, option) {
		r.t.Errorf("it is mounted as %s", mount)
	}
	second := change(r.t, domain, "write -q -P 2 512k 1M")
	b := r.backUp(domain)
	r.restoresTo(a, first)
	r.restoresTo(b, second)
	r.ctl("verify", b)
	r.isUnmounted()
}

func TestNFS(t *testing.T) {
	address := serveNFS(t, volume(t, "nfs", 64))
	add(t, "nfs", address, "--type", "nfs", "-o", "vers=4.2").comesBack("on-nfs", "nfs4", "vers=4.2")
}

func TestCIFS(t *testing.T) {
	address, credentials := serveCIFS(t, volume(t, "cifs", 64))
	r := add(t, "cifs", address, "--type", "cifs", "--credentials", credentials, "-o", "vers=3.1.1,seal")
	r.comesBack("on-cifs", "cifs", "vers=3.1.1")
	for _, place := range []string{"/proc/self/mountinfo", "/run/systemd", "/etc/systemd", "/var/lib/virtbackup/catalog.db"} {
		if out := command(t, "", "sh", "-c", `grep -rls "$1" "$2" || true`, "sh", password, place); out != "" {
			t.Errorf("the password is in %s", out)
		}
	}
}
