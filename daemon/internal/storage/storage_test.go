package storage

import (
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestAddresses(t *testing.T) {
	for _, c := range []struct {
		typ, fs   string
		good, bad []string
	}{
		{NFS, "", []string{"nas:/", "nas:/export/backup", "10.0.0.1:/a", "[fe80::1%eth0]:/a.b/c-d", "nas.example.org:/vol_1/@x"},
			[]string{"", "nas", "nas:", "nas:export", ":/a", "-nas:/a", "nas:/a/../b", "nas:/./a", "nas:/a,b", "nas:/a b", "nas:/-o", "nas:/a\n", "nas:/a/", "nas:/a//b", "n%s:/a"}},
		{CIFS, "", []string{"//nas/share", "//10.0.0.1/backup$", "//nas.example.org/share/below/it"},
			[]string{"", "nas/share", "//nas", "//nas/", "//nas/a,b", "//u:p@nas/share", "//nas/share/..", `\\nas\share`, "//nas/-o", "//nas/a b"}},
		{CephFS, "", []string{"mon:/", "mon1,mon2:6789,[::1]:6789:/backup", "u@.fs=/", "backup@11111111-2222-3333-4444-555555555555.cephfs=/a/b"},
			[]string{"", "mon", "mon:", "u@fs=/", "mon:/a/../b", "mon;x:/", "u@.fs=/a,secret=x"}},
		{Mount, "ext4", []string{"/dev/loop0", "/dev/disk/by-id/a-b.c", "UUID=1234-ABCD", "LABEL=backup"},
			[]string{"", "/etc/passwd", "/dev/../etc/passwd", "/dev", "/dev/", "LABEL=", "LABEL=a b", "loop0", "-L x", "/dev/a,b"}},
		{Mount, "virtiofs", []string{"backup"}, []string{"", "/dev/sda", "-o", "a b"}},
		{Mount, "fuse.sshfs", nil, []string{"a:/b"}},
		{Mount, "overlay", nil, []string{"/dev/sda"}},
		{"afs", "", nil, []string{"/a"}},
		{NFS, "ext4", nil, []string{"nas:/a"}},
	} {
		for _, a := range c.good {
			if err := (Place{Type: c.typ, FileSystem: c.fs, Address: a}).Check(); err != nil {
				t.Errorf("%s %q: %v", c.typ, a, err)
			}
		}
		for _, a := range c.bad {
			if err := (Place{Type: c.typ, FileSystem: c.fs, Address: a}).Check(); err == nil {
				t.Errorf("%s %s: %q is taken for an address", c.typ, c.fs, a)
			}
		}
	}
}

func places() []Place {
	all := []Place{{Type: NFS, Address: "nas:/a"}, {Type: CIFS, Address: "//nas/a"}, {Type: CephFS, Address: "mon:/a"}}
	for _, fs := range FileSystems() {
		all = append(all, Place{Type: Mount, FileSystem: fs, Address: map[bool]string{true: "tag", false: "/dev/vda"}[fs == "virtiofs"]})
	}
	return all
}

func TestOptionsThatWouldGiveMoreAreRefused(t *testing.T) {
	for _, p := range places() {
		if err := p.Check(); err != nil {
			t.Fatal(err)
		}
		for _, o := range []string{
			"suid", "dev", "exec", "x,suid", "noatime,suid", "noatime=suid", "bind", "remount", "loop", "user", "users", "helper=x", "x-systemd.automount",
			"x-mount.mkdir", "uid=1000", "file_mode=0777", "credentials=/etc/shadow", "secretfile=/etc/shadow", "secret=a", "password=x", "guest", "context=x",
			"rsize=1,suid", "rsize=-1", "rsize=", "rsize", "vers=9", "commit=1\n", "subvol=../x", "subvol=a,suid", "name=a b", "-o", "", "=", "mfsymlinks", "ip=1.2.3.4",
		} {
			p.Options = []string{o}
			if err := p.Check(); err == nil {
				t.Errorf("%s %s: option %q is allowed", p.Type, p.FileSystem, o)
			}
		}
		p.Options = []string{"noatime", "noatime"}
		if err := p.Check(); err == nil {
			t.Error("an option may be given twice")
		}
	}
	for _, p := range []Place{
		{Type: NFS, Address: "nas:/a", Options: []string{"vers=4.2", "hard", "timeo=600", "sec=krb5p", "nconnect=4"}},
		{Type: CIFS, Address: "//nas/a", Options: []string{"vers=3.1.1", "seal", "cache=none"}},
		{Type: CephFS, Address: "mon:/a", Options: []string{"name=backup", "ms_mode=secure"}},
		{Type: Mount, FileSystem: "btrfs", Address: "LABEL=x", Options: []string{"subvol=/backup/one", "compress=zstd"}},
	} {
		if err := p.Check(); err != nil {
			t.Error(err)
		}
	}
}

// Whatever passes is mounted without set-uid programs, devices and programs, and
// with no option that nobody asked for.
func TestEveryMountIsHarmless(t *testing.T) {
	pieces := []string{"noatime", "rsize", "vers", "=", "1", "4.2", ",", "suid", "dev", "exec", "a", "/", "..", " ", "\n", "hard", "-", "%h"}
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom(places()).Draw(t, "place")
		p.Options = rapid.SliceOfN(rapid.Map(rapid.SliceOfN(rapid.SampledFrom(pieces), 1, 4),
			func(s []string) string { return strings.Join(s, "") }), 0, 3).Draw(t, "options")
		if p.Check() != nil {
			return
		}
		got := strings.Split(p.Spec("/var/lib/virtbackup/credentials/x").Options, ",")
		for _, o := range []string{"nosuid", "nodev", "noexec"} {
			if !slices.Contains(got, o) {
				t.Fatalf("%v has no %s", got, o)
			}
		}
		for _, o := range []string{"suid", "dev", "exec"} {
			if slices.Contains(got, o) {
				t.Fatalf("%v has %s", got, o)
			}
		}
	})
}

func TestSpec(t *testing.T) {
	for _, c := range []struct {
		place       Place
		credentials string
		want        Spec
	}{
		{Place{Type: NFS, Address: "nas:/a", Options: []string{"vers=4.2"}}, "", Spec{"nas:/a", "nfs", "nosuid,nodev,noexec,vers=4.2", true}},
		{Place{Type: CIFS, Address: "//nas/a"}, "/c", Spec{"//nas/a", "cifs", "nosuid,nodev,noexec,uid=0,gid=0,file_mode=0600,dir_mode=0700,credentials=/c", false}},
		{Place{Type: CIFS, Address: "//nas/a"}, "", Spec{"//nas/a", "cifs", "nosuid,nodev,noexec,uid=0,gid=0,file_mode=0600,dir_mode=0700,guest", false}},
		{Place{Type: CIFS, Address: "//nas/a", Options: []string{"sec=krb5i"}}, "", Spec{"//nas/a", "cifs", "nosuid,nodev,noexec,sec=krb5i,uid=0,gid=0,file_mode=0600,dir_mode=0700", false}},
		{Place{Type: CephFS, Address: "mon:/", Options: []string{"name=b"}}, "/c", Spec{"mon:/", "ceph", "nosuid,nodev,noexec,name=b,secretfile=/c", false}},
		{Place{Type: Mount, FileSystem: "xfs", Address: "LABEL=b"}, "", Spec{"LABEL=b", "xfs", "nosuid,nodev,noexec", false}},
	} {
		if got := c.place.Spec(c.credentials); got != c.want {
			t.Errorf("%+v: %+v, and %+v is expected", c.place, got, c.want)
		}
	}
}

func TestCredentials(t *testing.T) {
	const canary = "c4nary,x y"
	for _, c := range []struct{ typ, content, want string }{
		{CIFS, "username=u\r\npassword=" + canary + "\n\ndomain=D", "username=u\npassword=" + canary + "\ndomain=D\n"},
		{CIFS, "password=" + canary, ""},
		{CIFS, "username=u\npassword=" + canary + "\nmode=0777", ""},
		{CIFS, "username=u\nusername=" + canary, ""},
		{CIFS, "username=u\npassword=" + canary + "\x00", ""},
		{CephFS, " AQC" + strings.Repeat("a", 37) + "==\n", "AQC" + strings.Repeat("a", 37) + "==\n"},
		{CephFS, canary, ""},
		{NFS, canary, ""},
		{CIFS, strings.Repeat(canary, 1000), ""},
	} {
		got, err := Credentials(c.typ, c.content)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s: %q, %v", c.typ, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "c4nary") {
			t.Errorf("the error tells the credentials: %v", err)
		}
	}
}
