package hypervisor

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"libvirt.org/go/libvirt"
	"libvirt.org/go/libvirtxml"
)

const minimal = `<domain type="qemu"><name>a</name><memory unit="MiB">64</memory><vcpu>1</vcpu>` +
	`<os><type arch="x86_64" machine="q35">hvm</type>OS</os><devices>DEVICES</devices></domain>`

// small is a minimal definition with these elements below os and devices.
func small(os, devices string) []byte {
	return []byte(strings.NewReplacer("OS", os, "DEVICES", devices).Replace(minimal))
}

func hostile(t testing.TB) []byte {
	t.Helper()
	doc, err := os.ReadFile("testdata/hostile.xml")
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// hostileChanges fit testdata/hostile.xml.
func hostileChanges() Changes {
	return Changes{
		Name: "new<name>\"'&", UUID: "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee",
		Disks: map[string]NewDisk{
			"vda": {Path: "/srv/images/a <b>&'\".qcow2", Format: "qcow2"},
			"vdb": {Path: "/dev/vg/lv", Format: "raw", Block: true},
		},
		SkipOtherDisks: true,
		NVRAM:          "/var/lib/libvirt/qemu/nvram/new_VARS.fd",
	}
}

func parsed(t *testing.T, doc string) libvirtxml.Domain {
	t.Helper()
	var d libvirtxml.Domain
	if err := d.Unmarshal(doc); err != nil {
		t.Fatalf("%v in\n%s", err, doc)
	}
	return d
}

func TestNewDefinitionDropsAllThatIsNotAllowed(t *testing.T) {
	out, dropped, err := NewDefinition(hostile(t), hostileChanges())
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{
		"evil", "/etc/", "/tmp/", "/dev/sda", "/dev/mem", "/dev/tpm0", "/dev/pts", "/dev/dri", "docker", "canary", "0.0.0.0",
		"hostdev", "filesystem", "qemu:", "commandline", "emulator<", "<emulator", "LD_PRELOAD", "shmem", "nvdimm", "egd",
		"type=\"passthrough", "seclabel", "idmap", "bootloader", "dtb", "slic", "old", "11111111", "52:54", "secret", "shareable",
		"sgio", "rawio", "encryption", "crypto", "lease", "dump", "sdl", "vhostuser", "ethernet", "metadata", "5900",
	} {
		if strings.Contains(out, bad) {
			t.Errorf("%q is still there", bad)
		}
	}
	want := []string{
		"domain/metadata", "domain/sysinfo[@type!='smbios']", "domain/bootloader", "domain/os/loader", "domain/os/nvram/@template",
		"domain/devices/filesystem", "domain/devices/hostdev", "domain/devices/shmem", "domain/seclabel", "domain/idmap",
		"domain/http://libvirt.org/schemas/domain/qemu/1.0:commandline", "domain/devices/graphics/listen",
		`domain/devices/serial[@type="file"]`, `domain/devices/interface[@type="ethernet"]`, `domain/devices/graphics/@passwd`,
		"domain/devices/disk/encryption",
	}
	for _, w := range want {
		if !slices.Contains(dropped, w) {
			t.Errorf("dropping %s was not told", w)
		}
	}
	for _, d := range dropped {
		if strings.Contains(d, "emulator") && !strings.Contains(d, "tpm") || strings.Contains(d, "resource") || d == "domain/@id" {
			t.Errorf("%s is not worth telling", d)
		}
	}
	if t.Failed() {
		t.Log(out, strings.Join(dropped, "\n"))
	}
}

func TestNewDefinitionKeepsTheMachine(t *testing.T) {
	out, _, err := NewDefinition(hostile(t), hostileChanges())
	if err != nil {
		t.Fatal(err)
	}
	d := parsed(t, out)
	if d.Name != "new<name>\"'&" || d.UUID != "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee" || d.Title != "A title with </name> & more" {
		t.Errorf("name %q, UUID %q, title %q", d.Name, d.UUID, d.Title)
	}
	if d.OS.Firmware != "efi" || d.OS.NVRam == nil || d.OS.NVRam.NVRam != "/var/lib/libvirt/qemu/nvram/new_VARS.fd" || d.OS.Loader != nil {
		t.Errorf("firmware: %+v", d.OS)
	}
	if d.CPU.Mode != "host-passthrough" || d.Clock.TimeZone != "Europe/Berlin" || d.VCPU.Value != 2 || d.Features.HyperV == nil {
		t.Errorf("CPU %+v, clock %+v, vcpu %+v", d.CPU, d.Clock, d.VCPU)
	}
	if d.SysInfo[0].SMBIOS.System.Entry[0].Value != "abc/1" || len(d.SysInfo) != 1 {
		t.Errorf("sysinfo %+v", d.SysInfo)
	}
	var disks []string
	for _, k := range d.Devices.Disks {
		disks = append(disks, k.Target.Dev+" "+k.Device+" "+k.Driver.Type+" "+path(k.Source))
	}
	if diff := cmp.Diff([]string{"vda disk qcow2 /srv/images/a <b>&'\".qcow2", "vdb disk raw /dev/vg/lv", "sdb cdrom raw "}, disks); diff != "" {
		t.Error(diff)
	}
	if k := d.Devices.Disks[0]; k.Driver.Cache != "none" || k.Driver.Discard != "unmap" || k.Serial != "ab/cd" || k.Address.PCI == nil || *k.Address.PCI.Bus != 4 {
		t.Errorf("disk vda lost something: %+v", k)
	}
	if i := d.Devices.Interfaces; len(i) != 1 || i[0].Source.Network.Network != "default" || i[0].MAC != nil {
		t.Errorf("interfaces %+v", i)
	}
	for _, s := range d.Devices.Serials {
		if s.Source == nil || s.Source.Pty == nil {
			t.Errorf("serial %+v is not a pty", s)
		}
	}
	if c := d.Devices.Channels[0]; c.Source.UNIX == nil || c.Source.UNIX.Path != "" || c.Target.VirtIO.Name != "org.qemu.guest_agent.0" {
		t.Errorf("agent channel %+v", c)
	}
	if len(d.Devices.TPMs) != 1 || len(d.Devices.RNGs) != 1 || len(d.Devices.Graphics) != 1 || len(d.Devices.Inputs) != 1 {
		t.Errorf("devices %+v", d.Devices)
	}
}

func path(s *libvirtxml.DomainDiskSource) string {
	switch {
	case s == nil:
		return ""
	case s.File != nil:
		return s.File.File
	case s.Block != nil:
		return s.Block.Dev
	}
	return "?"
}

func TestNewDefinitionInterfaces(t *testing.T) {
	doc := small("", `<interface type="bridge"><mac address="52:54:00:00:00:01"/><source bridge="br0"/></interface>`)
	for name, c := range map[string]struct {
		changes Changes
		want    string
	}{
		"new":  {Changes{Name: "b"}, `<source bridge="br0">`},
		"kept": {Changes{Name: "b", KeepMACs: true}, `52:54:00:00:00:01`},
		"none": {Changes{Name: "b", DropInterfaces: true}, ""},
	} {
		out, dropped, err := NewDefinition(doc, c.changes)
		if err != nil || len(dropped) != 0 {
			t.Fatalf("%s: %v, dropped %v", name, err, dropped)
		}
		if !strings.Contains(out, c.want) || strings.Contains(out, "interface") != (c.want != "") || strings.Contains(out, "52:54") != (name == "kept") {
			t.Errorf("%s: %s", name, out)
		}
	}
}

func TestNewDefinitionRefuses(t *testing.T) {
	ok := Changes{Name: "b"}
	disk := `<disk type="file" device="disk"><target dev="vda" bus="virtio"/></disk>`
	for name, c := range map[string]struct {
		doc     []byte
		changes Changes
		want    string
	}{
		"not XML":            {[]byte("<domain"), ok, "cannot parse"},
		"empty":              {nil, ok, "empty"},
		"other root":         {[]byte("<network/>"), ok, "root element"},
		"namespace":          {[]byte(`<domain xmlns="urn:x" type="kvm"/>`), ok, "root element"},
		"two roots":          {append(small("", ""), small("", "")...), ok, "more than one"},
		"doctype":            {append([]byte(`<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/shadow">]>`), small("", "")...), ok, "document type"},
		"entity":             {small("", "&x;"), ok, "cannot parse"},
		"instruction":        {append([]byte(`<?xml-stylesheet href="x"?>`), small("", "")...), ok, "processing instruction"},
		"too deep":           {small("", strings.Repeat("<a>", 40)+strings.Repeat("</a>", 40)), ok, "too deep"},
		"too many":           {small("", strings.Repeat("<a/>", 30000)), ok, "too large"},
		"too large":          {small("", strings.Repeat(" ", 5<<20)), ok, "bytes"},
		"container":          {[]byte(`<domain type="lxc"><name>a</name><os><type>hvm</type></os></domain>`), ok, "not QEMU's"},
		"not hvm":            {[]byte(`<domain type="kvm"><name>a</name><os><type>exe</type></os></domain>`), ok, "hvm"},
		"no os":              {[]byte(`<domain type="kvm"><name>a</name></domain>`), ok, "no os"},
		"firmware":           {[]byte(`<domain type="kvm"><os firmware="x"><type>hvm</type></os></domain>`), ok, "firmware"},
		"no name":            {small("", ""), Changes{}, "name"},
		"dots":               {small("", ""), Changes{Name: ".."}, "name"},
		"slash":              {small("", ""), Changes{Name: "a/b"}, "slash"},
		"newline":            {small("", ""), Changes{Name: "a\nb"}, "control"},
		"NUL":                {small("", ""), Changes{Name: "a\x00b"}, "control"},
		"not UTF-8":          {small("", ""), Changes{Name: "a\xff"}, "control"},
		"UUID":               {small("", ""), Changes{Name: "b", UUID: "x"}, "UUID"},
		"disk without place": {small("", disk), ok, `no place for disk "vda"`},
		"place without disk": {small("", ""), Changes{Name: "b", Disks: map[string]NewDisk{"vdz": {Path: "/a", Format: "raw"}}}, "no disk vdz"},
		"relative path":      {small("", disk), Changes{Name: "b", Disks: map[string]NewDisk{"vda": {Path: "a", Format: "raw"}}}, "absolute"},
		"json path":          {small("", disk), Changes{Name: "b", Disks: map[string]NewDisk{"vda": {Path: "json:{}", Format: "raw"}}}, "absolute"},
		"unclean path":       {small("", disk), Changes{Name: "b", Disks: map[string]NewDisk{"vda": {Path: "/a/../b", Format: "raw"}}}, "clean"},
		"format":             {small("", disk), Changes{Name: "b", Disks: map[string]NewDisk{"vda": {Path: "/a", Format: "vmdk"}}}, "format"},
		"NVRAM format":       {small("<nvram format='qcow2'>/x</nvram>", ""), Changes{Name: "b", NVRAM: "/a"}, "UEFI variables"},
		"no NVRAM, format":   {small("<nvram format=' raw'/>", ""), ok, "UEFI variables"},
		"kernel":             {small("<kernel>/etc/passwd</kernel>", ""), ok, "not allowed here"},
	} {
		t.Run(name, func(t *testing.T) {
			out, _, err := NewDefinition(c.doc, c.changes)
			if err == nil || !strings.Contains(err.Error(), c.want) || out != "" {
				t.Fatalf("got %q, error %v, want %q", out, err, c.want)
			}
		})
	}
}

func TestNewDefinitionDirectBoot(t *testing.T) {
	allowed, other := t.TempDir(), t.TempDir()
	file := func(dir, name string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("k"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(p, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	link := filepath.Join(allowed, "link")
	if err := os.Symlink(file(other, "secret", 0o600), link); err != nil {
		t.Fatal(err)
	}
	good := file(allowed, "vmlinuz", 0o644)
	kernel := append(make([]byte, 0x202), "HdrS"...)
	if err := os.WriteFile(good, kernel, 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ path, want string }{
		"good":      {good, ""},
		"outside":   {filepath.Join(other, "secret"), "no directory"},
		"dots":      {allowed + "/../" + filepath.Base(other) + "/secret", "no directory"},
		"link":      {link, "no directory"},
		"missing":   {filepath.Join(allowed, "none"), "not here"},
		"elsewhere": {filepath.Join(other, "none"), "no directory"}, // not looked at
		"unclean":   {allowed + "//vmlinuz", "no directory"},
		"directory": {allowed + "/.", "no directory"},
		"no kernel": {file(allowed, "other-guest.raw", 0o600), "does not look like"},
		"writable":  {file(allowed, "writable", 0o666), "only its owner"},
	} {
		doc := small("<kernel>"+c.path+"</kernel><cmdline>console=ttyS0 x=/y</cmdline>", "")
		out, _, err := NewDefinition(doc, Changes{Name: "b", BootDirectories: []string{allowed}})
		switch {
		case c.want != "":
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "kernel") {
				t.Errorf("%s: error %v, want %q", name, err, c.want)
			}
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case parsed(t, out).OS.Kernel != c.path || parsed(t, out).OS.Cmdline != "console=ttyS0 x=/y":
			t.Errorf("%s: %s", name, out)
		}
	}
}

// TestNewDefinitionSaysTheFormatOfNVRAM has no libvirt guess it, whose guess a
// loader in qcow2 would make wrong.
func TestNewDefinitionSaysTheFormatOfNVRAM(t *testing.T) {
	const loader = "<loader readonly='yes' type='pflash' format='qcow2'>/usr/share/edk2/ovmf/OVMF_CODE_4M.qcow2</loader>"
	for _, doc := range [][]byte{
		small(loader, ""), small(loader+"<nvram>/old</nvram>", ""), small(loader+"<nvram format='raw'>/old</nvram>", ""),
		small(loader+"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>/old</nvram>", ""),
	} {
		out, _, err := NewDefinition(doc, Changes{Name: "b", NVRAM: "/var/lib/v/nvram"})
		if err != nil {
			t.Fatal(err)
		}
		root, err := parseTree([]byte(out))
		if err != nil {
			t.Fatal(err)
		}
		if n := root.child("os").child("nvram"); n == nil || n.attr("format") != "raw" || n.text != "/var/lib/v/nvram" {
			t.Errorf("%s: %s", doc, out)
		}
	}
}

func FuzzNewDefinition(f *testing.F) {
	f.Add(small("<nvram format='qcow2'>/x</nvram>", ""))
	f.Add(hostile(f))
	f.Add(small("<loader type='pflash'>/usr/share/OVMF/../x</loader>", "<disk type='file' device='disk'><target dev='vda'/></disk>"))
	f.Add(small("<nvram template='x'/>", "<channel type='unix'/><tpm/><rng/><vsock/><graphics/><interface/>"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		c := hostileChanges()
		out, _, err := NewDefinition(doc, c)
		if err != nil {
			return
		}
		root, err := parseTree([]byte(out))
		if err != nil {
			t.Fatalf("cannot parse our own: %v\n%s", err, out)
		}
		noPaths(t, root, c)
		again, dropped, err := NewDefinition([]byte(out), c)
		if err != nil {
			t.Fatalf("our own is refused: %v\n%s", err, out)
		}
		if again != out || len(dropped) != 0 {
			t.Fatalf("it changes again (dropped %v):\n%s\n%s", dropped, out, again)
		}
	})
}

// noPaths fails for a slash where none was put by us.
func noPaths(t *testing.T, e *element, c Changes) {
	t.Helper()
	switch e.name {
	case "name", "title", "description", "entry", "serial", "vendor", "product":
		return
	case "loader", "backend":
		if !below(e.text, firmwareDirectories) && !contains([]string{"", "/dev/random", "/dev/urandom"}, e.text) {
			t.Fatalf("%s is %q", e.name, e.text)
		}
		e.text = ""
	case "nvram":
		if e.text != c.NVRAM || e.text != "" && e.attr("format") != "raw" || e.attr("template") != "" && !below(e.attr("template"), firmwareDirectories) {
			t.Fatalf("nvram is %+v", e)
		}
		return
	case "source":
		for _, k := range c.Disks {
			if e.attr("file") == k.Path || e.attr("dev") == k.Path {
				return
			}
		}
	case "clock":
		e.unset("timezone")
	}
	if strings.Contains(e.text, "/") {
		t.Fatalf("text of %s: %q", e.name, e.text)
	}
	for _, a := range e.attrs {
		if strings.Contains(a.value, "/") || strings.Contains(a.name, ":") {
			t.Fatalf("attribute of %s: %+v", e.name, a)
		}
	}
	for _, k := range e.children {
		noPaths(t, k, c)
	}
}

// testDriver connects to libvirt's test driver, which lives in this process.
func testDriver(t *testing.T) *Hypervisor {
	t.Helper()
	h, err := Connect(t.Context(), "test:///default", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

func TestDefineWhatWasRebuilt(t *testing.T) {
	h := testDriver(t)
	c := hostileChanges()
	c.NVRAM = ""
	out, _, err := NewDefinition(hostile(t), c)
	if err != nil {
		t.Fatal(err)
	}
	// The test driver knows only its own type of domain, and no firmware.
	out = strings.Replace(out, `type="kvm"`, `type="test"`, 1)
	out = strings.Replace(out, ` firmware="efi"`, "", 1)
	uuid, err := h.Define(t.Context(), out)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	d, err := h.Lookup(t.Context(), "new<name>\"'&")
	if err != nil || d.UUID != uuid || d.State != StateShutoff || !d.Persistent {
		t.Fatalf("found %+v, error %v", d, err)
	}
	k, ok := d.Disk("vda")
	if !ok || k.Source != "/srv/images/a <b>&'\".qcow2" || k.Format != "qcow2" || k.SourceType != "file" {
		t.Errorf("disk %+v", k)
	}
	if _, err := h.Define(t.Context(), out); !errors.Is(err, ErrDomainExists) {
		t.Errorf("defined again: %v", err)
	}
	// Undefine's flags are not known to the test driver.
	if err := h.onDomain(t.Context(), uuid, "undefine", (*libvirt.Domain).Undefine); err != nil {
		t.Error(err)
	}
	if _, err := h.Lookup(t.Context(), uuid); !errors.Is(err, ErrNoDomain) {
		t.Errorf("after undefine: %v", err)
	}
}
