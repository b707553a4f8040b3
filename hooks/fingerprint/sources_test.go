package fingerprint

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSources(t *testing.T) {
	got, err := Sources([]byte(`<?xml version="1.0"?><domain type='kvm' id='7'><devices>
		<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a b&amp;c.qcow2' index='2'/><backingStore type='file'><format type='qcow2'/><source file='/b'/><backingStore type='block'><format type='raw'/><source dev='/dev/c'/><backingStore/></backingStore></backingStore><target dev='vda' bus='virtio'/></disk>
		<disk type='block'><driver name='qemu' type='raw'/><source dev='/dev/vg/lv'/><target dev='vdb'/></disk>
		<disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='sda'/></disk>
		<disk type='file' device='floppy'><source file='/floppy'/><target dev='fda'/></disk>
		<disk type='file' device='disk'><target dev='vdc'/></disk>
		<disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='pool/image' index='1'><host name='mon' port='6789'/><host name='mon2'/></source><target dev='vdd'/></disk>
		<disk type='volume' device='disk'><driver type='qcow2'/><source pool='p' volume='v'/><target dev='vde'/></disk>
		<disk type='block' device='lun'><driver type='raw'/><source dev='/dev/sdz'/><target dev='sdb'/></disk>
		</devices></domain>`))
	want := []Source{
		{Target: "vda", Type: "file", Path: "/a b&c.qcow2", Format: "qcow2", Backing: []Source{
			{Target: "vda", Type: "file", Path: "/b", Format: "qcow2"}, {Target: "vda", Type: "block", Path: "/dev/c", Format: "raw"},
		}},
		{Target: "vdb", Type: "block", Path: "/dev/vg/lv", Format: "raw"},
		{Target: "vdd", Type: "network", Format: "raw", Network: "network protocol=rbd name=pool/image host name=mon port=6789 host name=mon2"},
		{Target: "vde", Type: "volume", Format: "qcow2", Network: "volume pool=p volume=v"},
		{Target: "sdb", Type: "block", Path: "/dev/sdz", Format: "raw"},
	}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

func TestSourcesRefusesWhatIsNoDomain(t *testing.T) {
	for name, text := range map[string]string{
		"nothing": "", "no XML": "\x00\xff", "half": "<domain><devices><disk type='file'>",
		"something else": "<pool/>", "no target": "<domain><devices><disk type='file'><source file='/a'/></disk></devices></domain>",
		"entities": `<!DOCTYPE d [<!ENTITY a SYSTEM "file:///etc/passwd">]><domain><name>&a;</name></domain>`,
		"deep":     strings.Repeat("<domain>", 1<<20),
	} {
		if s, err := Sources([]byte(text)); err == nil {
			t.Errorf("%s: %v", name, s)
		}
	}
}

func TestSourcesOfManyDisks(t *testing.T) {
	var text strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&text, "<disk type='file'><driver type='raw'/><source file='/d%d'/><target dev='d%d'/></disk>", i, i)
	}
	got, err := Sources([]byte("<domain><devices>" + text.String() + "</devices></domain>"))
	if err != nil || len(got) != 1000 || got[999].Path != "/d999" {
		t.Error(len(got), err)
	}
}

// Every source has a target and is found in the text; nothing makes it panic.
func FuzzSources(f *testing.F) {
	f.Add([]byte("<domain><devices><disk type='file'><source file='/a'/><target dev='vda'/></disk></devices></domain>"))
	f.Add([]byte("<domain><devices><disk type='network'><source protocol='nbd'><host name='h'/></source><target dev='vda'/></disk></devices></domain>"))
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := Sources(text)
		if err != nil && all != nil {
			t.Error("sources beside an error")
		}
		for _, s := range all {
			if s.Target == "" || s.Path != "" && s.Network != "" {
				t.Errorf("%+v", s)
			}
		}
	})
}
