package fingerprint

import (
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	file := Layer{Path: "/a", Kind: KindFile, Device: 1, Inode: 2, Size: 3, Modified: 4_000_000_001, Changed: 5_000_000_001}
	with := func(change func(*Layer)) Layer {
		l := file
		change(&l)
		return l
	}
	device := Layer{Path: "/dev/a", Kind: KindBlock, Size: 512, Identity: "wwid 1"}
	network := Layer{Path: "n", Kind: KindNetwork, Identity: "n"}
	missing, unseen := Layer{Path: "/a", Kind: KindMissing}, Layer{Path: "/a", Kind: KindUnreadable, Identity: "it hangs"}
	seconds := with(func(l *Layer) { l.Modified, l.Changed = 4_000_000_000, 5_000_000_000 })
	secondsElsewhere := seconds
	secondsElsewhere.Device = 9
	layers := func(l ...Layer) []Layer { return l }
	for _, c := range []struct {
		name        string
		before, now []Layer
		why         string // a part; "" for the same
	}{
		{"untouched", layers(file, file), layers(file, file), ""},
		{"renamed", layers(file), layers(with(func(l *Layer) { l.Path = "/b" })), ""},
		{"after a boot", layers(file), layers(with(func(l *Layer) { l.Device = 9 })), ""},
		{"after a boot, coarse stamps", layers(seconds), layers(secondsElsewhere), "replaced"},
		{"other inode", layers(file), layers(with(func(l *Layer) { l.Inode = 9 })), "replaced"},
		{"resized", layers(file), layers(with(func(l *Layer) { l.Size = 9 })), "has 9 bytes and had 3"},
		{"modified", layers(file), layers(with(func(l *Layer) { l.Modified = 9 })), "modified"},
		{"modified, and the mtime put back", layers(file), layers(with(func(l *Layer) { l.Changed = 9 })), "changed"},
		{"below", layers(file, file), layers(file, with(func(l *Layer) { l.Changed = 9 })), "changed"},
		{"an overlay more", layers(file), layers(file, file), "has 2 files and had 1"},
		{"an overlay less", layers(file, file), layers(file), "has 1 files and had 2"},
		{"gone", layers(file), layers(missing), "missing"},
		{"was not there", layers(missing), layers(missing), "missing"},
		{"not seen now", layers(file), layers(unseen), "it hangs"},
		{"not seen before", layers(unseen), layers(file), "it hangs"},
		{"file to device", layers(file), layers(device), "replaced by something else"},
		{"device", layers(device), layers(device), Opaque},
		{"another device", layers(device), layers(Layer{Path: "/dev/a", Kind: KindBlock, Size: 512, Identity: "wwid 2"}), "replaced"},
		{"resized device", layers(device), layers(Layer{Path: "/dev/a", Kind: KindBlock, Size: 513, Identity: "wwid 1"}), "513"},
		{"network", layers(network), layers(network), Opaque},
		{"network below", layers(file, network), layers(file, network), Opaque},
		{"changed above a device", layers(file, device), layers(with(func(l *Layer) { l.Changed = 9 }), device), "changed"},
		{"nothing", nil, nil, "nothing"},
	} {
		same, why := Disk{Format: "qcow2", Layers: c.before}.Compare(Disk{Format: "qcow2", Layers: c.now})
		if same != (c.why == "") || same != (why == "") || !strings.Contains(why, c.why) {
			t.Errorf("%s: %v, %q; want %q", c.name, same, why, c.why)
		}
	}
	if same, why := (Disk{Format: "raw", Layers: layers(file)}).Compare(Disk{Format: "qcow2", Layers: layers(file)}); same || !strings.Contains(why, "format") {
		t.Error(same, why)
	}
}
