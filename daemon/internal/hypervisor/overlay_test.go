package hypervisor

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const overlaidDomain = `<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/d/a.raw.overlay' index='5'/>
      <backingStore type='file' index='2'>
        <format type='raw'/>
        <source file='/d/a.raw'/>
      </backingStore>
      <target dev='vda' bus='virtio'/>
      <serial>one &amp; only</serial>
    </disk>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/d/b.overlay'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <source dev='/dev/c'/>
      <target dev='vdc' bus='virtio'/>
    </disk>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-S'/>
  </qemu:commandline>
</domain>`

func TestWithoutOverlays(t *testing.T) {
	got, err := WithoutOverlays(overlaidDomain, map[string]Stacked{"vda": {Path: "/d/a.raw", Format: "raw"}, "vdb": {Path: "/d/b", Format: "qcow2"}})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(got, "overlay") || strings.Contains(got, "backingStore") || !strings.Contains(got, "<qemu:arg value='-S'/>") {
		t.Errorf("got %s", got)
	}
	var x struct {
		Disks []struct {
			Driver struct {
				Type    string `xml:"type,attr"`
				Discard string `xml:"discard,attr"`
			} `xml:"driver"`
			Source struct {
				File string `xml:"file,attr"`
				Dev  string `xml:"dev,attr"`
			} `xml:"source"`
			Serial string `xml:"serial"`
		} `xml:"devices>disk"`
	}
	if err := unmarshal(got, &x); err != nil {
		t.Fatal(err)
	}
	if len(x.Disks) != 3 || x.Disks[0].Source.File != "/d/a.raw" || x.Disks[0].Driver.Type != "raw" || x.Disks[0].Driver.Discard != "unmap" ||
		x.Disks[0].Serial != "one & only" || x.Disks[1].Source.File != "/d/b" || x.Disks[1].Driver.Type != "qcow2" || x.Disks[2].Source.Dev != "/dev/c" {
		t.Errorf("got %+v", x.Disks)
	}
	for _, target := range []string{"vdc", "vdx"} {
		if got, err := WithoutOverlays(overlaidDomain, map[string]Stacked{target: {Path: "/d/x", Format: "raw"}}); err == nil {
			t.Errorf("%s: got %s", target, got)
		}
	}
}

// TestCommitImage commits two layers at once, and has the one above name the base.
func TestCommitImage(t *testing.T) {
	directory, ctx := t.TempDir(), t.Context()
	at := func(name, format string) Stacked {
		return Stacked{Path: filepath.Join(directory, name), Type: "file", Format: format}
	}
	base, one, two, top := at("base", "raw"), at("one", "qcow2"), at("two", "qcow2"), at("a top, with a comma", "qcow2")
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	run("qemu-img", "create", "-q", "-f", "raw", base.Path, "1M")
	run("qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", base.Path)
	for i, l := range []Stacked{one, two, top} {
		below := []Stacked{base, one, two}[i]
		run("qemu-img", "create", "-q", "-f", "qcow2", "-F", below.Format, "-b", below.Path, l.Path)
		if empty, err := EmptyImage(ctx, l.Path); err != nil || !empty {
			t.Errorf("%s is empty: %v, %v", l.Path, empty, err)
		}
	}
	run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 128k", one.Path)
	run("qemu-io", "-f", "qcow2", "-c", "write -z 64k 128k", two.Path)
	if empty, err := EmptyImage(ctx, two.Path); err != nil || empty {
		t.Errorf("zeroes are nothing: %v, %v", empty, err)
	}
	run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top.Path, filepath.Join(directory, "want"))

	if err := CommitImage(ctx, base, two); err != nil {
		t.Fatal(err)
	}
	run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", two.Path, filepath.Join(directory, "want")) // it stays as it is
	if err := SetBacking(ctx, top, base); err != nil {
		t.Fatal(err)
	}
	layers, err := Layers(ctx, Disk{Target: "vda", Source: top.Path, Format: "qcow2"})
	if err != nil || len(layers) != 2 || layers[1].Path != base.Path || layers[1].Format != "raw" {
		t.Errorf("the layers are %+v, %v", layers, err)
	}
	run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", top.Path, filepath.Join(directory, "want"))
	run("qemu-img", "compare", "-f", "raw", "-F", "raw", base.Path, filepath.Join(directory, "want"))
	run("qemu-img", "snapshot", "-c", "s", two.Path)
	if i, err := ReadImage(ctx, two.Path, "qcow2"); err != nil || !i.InternalSnapshots || i.Size != 1<<20 {
		t.Errorf("got %+v, %v", i, err)
	}
}
