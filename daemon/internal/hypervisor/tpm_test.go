package hypervisor

import (
	"strings"
	"testing"

	"libvirt.org/go/libvirtxml"
)

func TestTPM(t *testing.T) {
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	for xml, want := range map[string]TPM{
		``: {},
		`<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>`: {},
		`<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>`:                         {Version: "2.0", State: TPMDirectory + "/" + uuid + "/tpm2/tpm2-00.permall"},
		`<tpm model='tpm-tis'><backend type='emulator' version='1.2'><encryption secret='S'/></backend></tpm>`: {
			Version: "1.2", State: TPMDirectory + "/" + uuid + "/tpm1.2/tpm-00.permall", Secret: "S"},
		`<tpm><backend type='emulator' version='2.0'><source type='dir' path='/srv/tpm'/></backend></tpm>`:  {Version: "2.0", State: "/srv/tpm/tpm2-00.permall"},
		`<tpm><backend type='emulator' version='2.0'><source type='file' path='/srv/tpm'/></backend></tpm>`: {Version: "2.0"},
		`<tpm><backend type='emulator' version='9'/></tpm>`:                                                 {Version: "9"},
		`<tpm><backend type='emulator' version='9'><source type='dir' path='/srv/tpm'/></backend></tpm>`:    {Version: "9"},
		`<tpm><backend type='emulator' version='../..'><source type='dir' path='/srv'/></backend></tpm>`:    {Version: "../.."},
	} {
		var def libvirtxml.Domain
		if err := def.Unmarshal(`<domain><uuid>` + uuid + `</uuid><devices>` + xml + `</devices></domain>`); err != nil {
			t.Fatal(err)
		}
		if got := tpm(&def); got != want {
			t.Errorf("%s: %+v", xml, got)
		}
	}
	if v := TPMVersion("tpm2-00.permall"); v != "2.0" {
		t.Error(v)
	}
	if v := TPMVersion("tpm2-00.volatilestate"); v != "" {
		t.Error(v)
	}
}

func TestQEMUUser(t *testing.T) {
	for settings, want := range map[string][2]int{
		"user = \"root\"\ngroup = \"root\"\n": {0, 0},
		"#user = \"nobody\"\n user='+7'\ngroup=\"12\"\nswtpm_user = \"root\"\nswtpm_group = \"root\"\n": {7, 12},
	} {
		if uid, gid, err := qemuUser([]byte(settings)); err != nil || uid != want[0] || gid != want[1] {
			t.Errorf("%q: %d, %d, %v", settings, uid, gid, err)
		}
	}
	if _, _, err := qemuUser([]byte("user = \"no such user\"\ngroup = \"root\"\n")); err == nil || !strings.Contains(err.Error(), "no such user") {
		t.Errorf("somebody who is not there: %v", err)
	}
	// What is not said is the distribution's.
	uid, gid, usual := usualUser()
	for _, settings := range []string{"", "#user = \"root\"\n", "swtpm_user = \"root\"\n"} {
		if u, g, err := qemuUser([]byte(settings)); u != uid || g != gid || (err == nil) != (usual == nil) {
			t.Errorf("%q: %d, %d, %v, not %d, %d, %v", settings, u, g, err, uid, gid, usual)
		}
	}
	if u, g, err := qemuUser([]byte("user = \"+9\"\n")); usual == nil && (u != 9 || g != gid || err != nil) {
		t.Errorf("only the user is said: %d, %d, %v", u, g, err)
	}
}

func TestTPMOwner(t *testing.T) {
	for settings, want := range map[string][2]int{
		"swtpm_user = \"root\"\nswtpm_group = \"root\"\n":                   {0, 0},
		"# swtpm_user = \"nobody\"\n swtpm_user='+7'\nswtpm_group=\"12\"\n": {7, 12},
	} {
		if uid, gid, err := tpmOwner([]byte(settings)); err != nil || uid != want[0] || gid != want[1] {
			t.Errorf("%q: %d, %d, %v", settings, uid, gid, err)
		}
	}
	for _, name := range []string{"no such user", "+", "+no", "-1", "99999999999"} {
		if _, _, err := tpmOwner([]byte(`swtpm_user = "` + name + `"`)); err == nil {
			t.Errorf("%q is somebody", name)
		}
	}
}
