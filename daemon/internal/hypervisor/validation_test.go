package hypervisor

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const testJob = "01KB5W3V9M8Q4T2R7XYZ0A1B2C"

// hostileValidation fits testdata/hostile.xml.
func hostileValidation() ValidationDomain {
	return ValidationDomain{
		Job: testJob, Backup: "01KB5W3V9M8Q4T2R7XYZ0A1B2D", UUID: "aaaaaaaa-bbbb-8ccc-8ddd-eeeeeeeeeeee", NVRAM: "/var/lib/v/nvram",
		Memory: 128 << 20, CPUs: 1,
		Disks: map[string]ValidationDisk{
			"vda": {Overlay: "/var/lib/v/vda.qcow2", Socket: "/run/v/vda.sock"},
			"vdb": {Overlay: "/var/lib/v/vdb.qcow2", Socket: "/run/v/vdb.sock"},
		},
	}
}

func TestValidationDefinitionDropsAllThatConnects(t *testing.T) {
	v := hostileValidation()
	out, err := ValidationDefinition(hostile(t), v)
	if err != nil {
		t.Fatal(err)
	}
	if problem := exposed(out, v); problem != "" {
		t.Errorf("%s in\n%s", problem, out)
	}
	for _, bad := range []string{
		"evil", "/etc/", "/tmp/", "/dev/sda", "docker", "canary", "qemu:", "hostdev", "filesystem", "emulator<", "old", "secret", "11111111",
		"graphics", "interface", "sound", "watchdog", "vsock", "spice", "qxl", "cdrom\"><source", "iothread", "loader>",
	} {
		if strings.Contains(out, bad) {
			t.Errorf("%q is still there:\n%s", bad, out)
		}
	}
	d := parsed(t, out)
	if d.Memory.Value != 128<<10 || d.Memory.Unit != "KiB" || d.VCPU.Value != 1 || d.OnReboot != "restart" || d.OnCrash != "destroy" {
		t.Errorf("it takes %+v, %+v, on reboot %s", d.Memory, d.VCPU, d.OnReboot)
	}
	if d.OS.Firmware != "efi" || d.OS.NVRam == nil || d.OS.NVRam.NVRam != v.NVRAM {
		t.Errorf("it boots with %+v", d.OS)
	}
}

// TestValidationDefinitionKnowsAllDevices has somebody who allows one more device
// in a definition think of what it connects a temporary domain to.
func TestValidationDefinitionKnowsAllDevices(t *testing.T) {
	taken := []string{"emulator", "interface", "graphics", "sound", "audio", "watchdog", "iommu", "vsock", "redirdev", "memory"}
	for name := range deviceRules() {
		if slices.Contains(taken, name) == slices.Contains(isolated(), name) {
			t.Errorf("is a temporary domain to have a %s?", name)
		}
	}
}

func TestValidationDefinitionFirmware(t *testing.T) {
	const nvram = "<nvram>/var/lib/v/nvram</nvram>"
	for name, c := range map[string]struct {
		os   string
		want bool
	}{
		"BIOS":             {"", false},
		"BIOS with a file": {"<loader>/usr/share/seabios/bios.bin</loader><nvram>/x</nvram>", false},
		"chosen":           {"<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>", true},
		"never started":    {"<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>", true},
		"stateless":        {"<loader readonly='yes' type='pflash' stateless='yes'>/usr/share/OVMF/OVMF.fd</loader>", false},
	} {
		out, err := ValidationDefinition(small(c.os, ""), ValidationDomain{Job: testJob, NVRAM: "/var/lib/v/nvram"})
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(out, "<nvram"); got != c.want || got && parsed(t, out).OS.NVRam.NVRam != "/var/lib/v/nvram" {
			t.Errorf("%s: want %s %v:\n%s", name, nvram, c.want, out)
		}
	}
}

func TestValidationDefinitionScreen(t *testing.T) {
	for have, want := range map[string]string{
		"":                                     "vga",
		`<video><model type="none"/></video>`:  "vga",
		`<video><model type="qxl"/></video>`:   "vga",
		`<video><model type="bochs"/></video>`: "bochs",
		`<video><model type="virtio" blob="on"><acceleration accel3d="yes"/></model></video>`: "virtio",
		`<video><model type="vga" ram="1048576" vram="1048576" vram64="1048576" vgamem="524288" heads="16"><resolution x="16384" y="16384"/></model></video>` +
			`<video><model type="virtio" vram="1048576"/></video>`: "vga",
		`<video><model type="vga"/><model type="virtio" heads="16"/></video>`: "vga",
	} {
		out, err := ValidationDefinition(small("", have), ValidationDomain{Job: testJob})
		if err != nil {
			t.Fatal(err)
		}
		videos := parsed(t, out).Devices.Videos
		if len(videos) != 1 || videos[0].Model.Type != want || videos[0].Model.Accel != nil || videos[0].Model.Blob != "" ||
			videos[0].Model.VRam+videos[0].Model.VGAMem+videos[0].Model.Ram+videos[0].Model.VRam64+videos[0].Model.Heads != 0 || videos[0].Model.Resolution != nil {
			t.Errorf("%s: %s", have, out)
		}
	}
}

func TestValidationDefinitionCaps(t *testing.T) {
	big := func(memory, vcpu, more string) []byte {
		return []byte(fmt.Sprintf(`<domain type="qemu"><name>a</name>%s%s%s<os><type arch="x86_64">hvm</type></os><devices/></domain>`, memory, vcpu, more))
	}
	limits := ValidationDomain{Job: testJob, Memory: 1 << 30, CPUs: 2}
	for name, c := range map[string]struct {
		doc    []byte
		limits ValidationDomain
		memory uint // KiB
		cpus   uint
	}{
		"less":       {big("<memory unit='MiB'>64</memory>", "<vcpu>1</vcpu>", ""), limits, 64 << 10, 1},
		"more":       {big("<memory unit='TiB'>4</memory>", "<vcpu current='3'>512</vcpu>", "<cpu mode='maximum'><topology sockets='512' cores='1' threads='1'/><numa><cell id='0' cpus='0-511' memory='4' unit='TiB'/></numa></cpu>"), limits, 1 << 20, 2},
		"no limits":  {big("<memory>65536</memory>", "", ""), ValidationDomain{Job: testJob}, 64 << 10, 1},
		"huge pages": {big("<memory unit='b'>1073741824</memory>", "<vcpu>1</vcpu>", "<memoryBacking><hugepages/><locked/></memoryBacking><features><tcg><tb-cache unit='GiB'>512</tb-cache></tcg></features>"), limits, 1 << 20, 1},
	} {
		out, err := ValidationDefinition(c.doc, c.limits)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		d := parsed(t, out)
		if d.Memory.Value != c.memory || d.VCPU.Value != c.cpus || d.VCPU.Current != 0 || d.MemoryBacking != nil || strings.Contains(out, "tb-cache") ||
			strings.Contains(out, "topology") || strings.Contains(out, "numa") {
			t.Errorf("%s: %s", name, out)
		}
	}
	for name, doc := range map[string][]byte{
		"none": big("", "", ""), "zero": big("<memory>0</memory>", "", ""), "unit": big("<memory unit='PB'>1</memory>", "", ""),
		"overflow":      big(fmt.Sprintf("<memory unit='TiB'>%d</memory>", uint64(math.MaxUint64)), "", ""),
		"devices twice": []byte(strings.Replace(string(small("", "")), "<devices>", "<devices/><devices><graphics type='vnc'/>", 1)),
		"no CPU":        big("<memory>1</memory>", "<vcpu>0</vcpu>", ""),
	} {
		if out, err := ValidationDefinition(doc, limits); err == nil {
			t.Errorf("%s: %s", name, out)
		}
	}
}

// TestValidationMark has only a domain that is ours taken for ours.
func TestValidationMark(t *testing.T) {
	out, err := ValidationDefinition(small("", ""), ValidationDomain{Job: testJob, Backup: "b"})
	if err != nil {
		t.Fatal(err)
	}
	d := parsed(t, out)
	if got := validationOf(d.Name, d.Metadata.XML); got != testJob {
		t.Errorf("our own is of job %q: %+v", got, d.Metadata)
	}
	for name, metadata := range map[string]string{
		"copy-of-it": d.Metadata.XML, // virsh dumpxml | sed | virsh define
		d.Name:       `<x:validation xmlns:x="urn:other" job="` + testJob + `"/>`,
		"virtbackup-validation-" + strings.ToLower(testJob): "",
		"web": `<note>` + validationNamespace + ` :validation job="` + testJob + `"</note>`,
	} {
		if got := validationOf(name, metadata); got != "" {
			t.Errorf("%s with %s is taken for the domain of job %s", name, metadata, got)
		}
	}
}

func FuzzValidationDefinition(f *testing.F) {
	f.Add(hostile(f))
	f.Add(small("<loader type='pflash'>/usr/share/OVMF/../x</loader>", "<disk type='file' device='disk'><driver copy_on_read='on'/><target dev='vda'/></disk>"))
	f.Add(small("<nvram format='qcow2'>/x</nvram>", "<video><model type='vga' vgamem='524288'/></video><video><model type='virtio'/></video>"))
	f.Add(small("<nvram template='x'/>", "<channel type='spicevmc'/><tpm/><rng/><vsock/><graphics/><interface/><video/><hub type='usb'/>"))
	f.Add([]byte(strings.Replace(minimal, "MiB", "TiB", 1)))
	f.Fuzz(func(t *testing.T, doc []byte) {
		v := hostileValidation()
		if !strings.Contains(string(doc), "vdb") {
			v.Disks = nil
		}
		out, err := ValidationDefinition(doc, v)
		if err != nil {
			return
		}
		if problem := exposed(out, v); problem != "" {
			t.Fatalf("%s in\n%s", problem, out)
		}
	})
}

// exposed says what in a definition of ours connects the guest to anything, or
// takes more than it may; "" if it is as it should be.
func exposed(out string, v ValidationDomain) string {
	root, err := parseTree([]byte(out))
	if err != nil || !utf8.ValidString(out) {
		return fmt.Sprintf("cannot parse our own: %v", err)
	}
	if got := root.child("name").text; got != ValidationName(v.Job) {
		return "its name is " + got
	}
	if kib, err := strconv.ParseUint(root.child("memory").text, 10, 64); err != nil || kib > v.Memory>>10 {
		return "it has too much memory"
	}
	if n, err := strconv.Atoi(root.child("vcpu").text); err != nil || n > v.CPUs {
		return "it has too many CPUs"
	}
	seen := map[string]bool{}
	for _, e := range root.children {
		if seen[e.name] && e.name != "sysinfo" {
			return "it has more than one " + e.name
		}
		seen[e.name] = true
		if !contains([]string{
			"name", "uuid", "title", "description", "metadata", "genid", "memory", "vcpu", "sysinfo", "os", "features", "cpu", "clock", "devices",
			"on_poweroff", "on_reboot", "on_crash",
		}, e.name) {
			return "it has a " + e.name
		}
	}
	if n := root.child("os").child("nvram"); n != nil && (n.text != v.NVRAM || n.attr("format") != "raw") {
		return "its variables are in " + n.text + " of format " + n.attr("format")
	}
	if devices := root.child("devices"); devices != nil {
		screens := 0
		for _, d := range devices.children {
			if d.name == "video" {
				screens++
			}
			if screens > 1 {
				return "it has more than one screen"
			}
			if problem := exposedDevice(d, v); problem != "" {
				return problem
			}
		}
	}
	return ""
}

func exposedDevice(d *element, v ValidationDomain) string {
	if !contains([]string{
		"disk", "controller", "hub", "input", "video", "serial", "console", "parallel", "channel", "tpm", "rng", "panic", "memballoon",
	}, d.name) || d.attr("type") == "spicevmc" {
		return fmt.Sprintf("it has a %s (%s)", d.name, d.attr("type"))
	}
	if d.name == "video" {
		for _, a := range d.child("model").attrs {
			if a.name != "type" && a.name != "primary" {
				return "its screen has " + a.name
			}
		}
	}
	source := d.child("source")
	if d.name != "disk" {
		if source != nil {
			return d.name + " has a source"
		}
		return ""
	}
	if source == nil { // an empty drive
		if d.child("backingStore") != nil {
			return "a drive has a backing store"
		}
		return ""
	}
	ours, known := v.Disks[d.child("target").attr("dev")]
	if !known || source.attr("file") != ours.Overlay || d.child("driver").attr("type") != "qcow2" {
		return "a disk is no overlay of ours"
	}
	below := d.child("backingStore")
	if below == nil || below.child("format").attr("type") != "raw" || below.child("source").attr("protocol") != "nbd" ||
		below.child("source").child("host").attr("socket") != ours.Socket || below.child("backingStore") == nil {
		return "a disk is not based on what is served"
	}
	return ""
}
