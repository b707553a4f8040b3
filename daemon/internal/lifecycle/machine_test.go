package lifecycle

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// stamped is a disk in a file with a time of its last change.
func stamped(target string, at int64) fingerprint.Disk {
	return fingerprint.Disk{Target: target, Format: "qcow2", Layers: []fingerprint.Layer{
		{Path: "/images/" + target, Kind: fingerprint.KindFile, Device: 1, Inode: uint64(target[2]), Size: 1 << 20, Modified: at, Changed: at},
	}}
}

func moved(d fingerprint.Disk, path string) fingerprint.Disk {
	d.Layers = slices.Clone(d.Layers)
	d.Layers[0].Path = path
	return d
}

func volume(target string) fingerprint.Disk {
	return fingerprint.Disk{Target: target, Format: "raw", Layers: []fingerprint.Layer{{Path: "/dev/vg/" + target, Kind: fingerprint.KindBlock, Identity: "dm/uuid x"}}}
}

// domainXML is what libvirt shows of disks in a run, each as its target and the
// indexes of its layers.
func domainXML(disks ...Node) string {
	var b strings.Builder
	b.WriteString("<domain type='qemu' id='3'><devices>")
	for _, d := range disks {
		b.WriteString("<disk type='file' device='disk'><source file='/images/x'")
		for i, index := range d.Indexes {
			if i > 0 {
				b.WriteString("<backingStore type='file'")
			}
			fmt.Fprintf(&b, " index='%d'>", index)
			if i > 0 {
				b.WriteString("<format type='qcow2'/><source file='/images/y'/>")
			} else {
				b.WriteString("</source>")
			}
		}
		if len(d.Indexes) == 0 { // no start has come so far
			b.WriteString("></source>")
		}
		b.WriteString("<backingStore/>" + strings.Repeat("</backingStore>", max(len(d.Indexes)-1, 0)) + "<target dev='" + d.Target + "' bus='virtio'/></disk>")
	}
	b.WriteString("<disk type='file' device='cdrom'><source file='/images/cd.iso' index='99'/><target dev='sda'/></disk></devices></domain>")
	return b.String()
}

// told makes a record.
func told(operation string, run Run, xml string, disks ...fingerprint.Disk) spool.Record {
	return spool.Record{Operation: operation, Boot: run.Boot, Libvirt: run.Libvirt, DomainID: run.ID, XML: xml, Disks: disks}
}

var (
	first    = Run{Boot: "b1", Libvirt: "1@1", ID: 3}
	ended    = Run{Boot: "b1", Libvirt: "1@1"} // libvirt does not tell the number any more
	second   = Run{Boot: "b1", Libvirt: "1@1", ID: 4}
	watched  = Known{Phase: Running, Run: first, Nodes: Nodes{{"vda", []int{2}}, {"vdb", []int{1}}}}
	located2 = domainXML(Node{"vda", []int{2}}, Node{"vdb", []int{1}})
	halted   = Known{Phase: Stopped, Run: watched.Run, Nodes: watched.Nodes}
	stopped  = Known{Phase: Off, Disks: []fingerprint.Disk{stamped("vda", 1), stamped("vdb", 1)}}
)

// TestNext has each kind of record come to each state that it may find.
func TestNext(t *testing.T) {
	disks := stopped.Disks
	prepared := Known{Phase: Running, Run: second}
	restarted := Run{Boot: "b1", Libvirt: "9@9", ID: 3}
	rebooted := Run{Boot: "b2", Libvirt: "1@1", ID: 1}
	for name, c := range map[string]struct {
		known Known
		told  spool.Record
		want  Known
		found []Finding // without their details
	}{
		"start of an untouched one":              {stopped, told("prepare", second, "", disks...), prepared, nil},
		"restore before a start":                 {stopped, told("restore", ended, ""), stopped, nil},
		"start after an edit":                    {stopped, told("prepare", second, "", stamped("vda", 1), stamped("vdb", 2)), prepared, []Finding{{Target: "vdb", Cause: chain.ChangedWhileOff}}},
		"start with another image":               {stopped, told("prepare", second, "", moved(disks[0], "/other"), disks[1]), prepared, []Finding{{Target: "vda", Cause: chain.DiskReplaced}}},
		"start with one disk more":               {stopped, told("prepare", second, "", append(slices.Clone(disks), stamped("vdc", 1))...), prepared, []Finding{{Target: "vdc", Cause: chain.DiskReplaced}}},
		"start with one disk less":               {stopped, told("prepare", second, "", disks[0]), prepared, nil},
		"start of a volume":                      {Known{Phase: Off, Disks: []fingerprint.Disk{volume("vda"), disks[1]}}, told("prepare", second, "", volume("vda"), disks[1]), prepared, []Finding{{Target: "vda", Cause: chain.Unseen}}},
		"start of an unknown one":                {Known{}, told("prepare", second, "", disks...), prepared, []Finding{{Cause: chain.Unseen}}},
		"start without a stop":                   {watched, told("prepare", second, "", disks...), prepared, []Finding{{Cause: chain.Unseen}}},
		"start after a boot":                     {watched, told("prepare", rebooted, "", disks...), Known{Phase: Running, Run: rebooted}, []Finding{{Cause: chain.HostRestarted}}},
		"start of an untouched one after a boot": {stopped, told("prepare", rebooted, "", disks...), Known{Phase: Running, Run: rebooted}, nil},

		"started":                       {Known{Phase: Running, Run: first}, told("started", first, located2), watched, nil},
		"started twice told":            {watched, told("started", first, located2), watched, nil},
		"started, but never prepared":   {stopped, told("started", first, located2), watched, []Finding{{Cause: chain.Unseen}}},
		"started, another run is known": {watched, told("start", second, located2), Known{Phase: Running, Run: second, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},

		"stopped":                           {watched, told("stopped", ended, located2), halted, nil},
		"stopped, a disk is new":            {watched, told("stopped", ended, domainXML(append(slices.Clone(watched.Nodes), Node{"vdc", []int{3}})...)), Known{Phase: Stopped, Run: first, Nodes: append(slices.Clone(watched.Nodes), Node{"vdc", []int{3}})}, []Finding{{Target: "vdc", Cause: chain.DiskReplaced}}},
		"stopped, a disk was attached anew": {watched, told("stopped", ended, domainXML(Node{"vda", []int{2}}, Node{"vdb", []int{7}})), Known{Phase: Stopped, Run: first, Nodes: Nodes{{"vda", []int{2}}, {"vdb", []int{7}}}}, []Finding{{Target: "vdb", Cause: chain.DiskReplaced}}},
		"stopped, a snapshot was made":      {watched, told("stopped", ended, domainXML(Node{"vda", []int{5, 2}}, Node{"vdb", []int{1}})), Known{Phase: Stopped, Run: first, Nodes: Nodes{{"vda", []int{5, 2}}, {"vdb", []int{1}}}}, nil},
		"stopped, a disk is gone":           {watched, told("stopped", ended, domainXML(Node{"vda", []int{2}})), Known{Phase: Stopped, Run: first, Nodes: Nodes{{"vda", []int{2}}}}, nil},
		"stopped by another libvirtd":       {watched, told("stopped", Run{Boot: "b1", Libvirt: "9@9"}, located2), Known{Phase: Stopped, Run: restarted, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},

		"stopped in another run":       {watched, told("stopped", second, located2), Known{Phase: Stopped, Run: second, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},
		"stopped after a failed start": {prepared, told("stopped", ended, ""), Known{Phase: Stopped, Run: second}, nil},
		"stopped twice":                {halted, told("stopped", ended, located2), Known{Phase: Stopped, Run: ended, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},
		"started after it was stopped": {halted, told("started", first, located2), watched, []Finding{{Cause: chain.Unseen}}},
		"start after it was stopped":   {halted, told("prepare", second, "", disks...), prepared, []Finding{{Cause: chain.Unseen}}},

		"release":                     {halted, told("release", ended, located2, disks...), stopped, nil},
		"release alone":               {watched, told("release", ended, located2, disks...), stopped, []Finding{{Cause: chain.Unseen}}},
		"release, a disk is new":      {halted, told("release", ended, domainXML(append(slices.Clone(watched.Nodes), Node{"vdc", []int{3}})...), disks...), stopped, []Finding{{Target: "vdc", Cause: chain.DiskReplaced}}},
		"release by another libvirtd": {watched, told("release", Run{Boot: "b1", Libvirt: "9@9"}, located2, disks...), stopped, []Finding{{Cause: chain.Unseen}}},
		"release after a boot":        {watched, told("release", rebooted, located2, disks...), stopped, []Finding{{Cause: chain.HostRestarted}}},
		"release of one that was off": {stopped, told("release", ended, located2, disks...), stopped, []Finding{{Cause: chain.Unseen}}},
		"release of an unknown one":   {Known{}, told("release", ended, located2, disks...), stopped, []Finding{{Cause: chain.Unseen}}},

		"reconnect":                           {watched, told("reconnect", restarted, located2), Known{Phase: Running, Run: restarted, Nodes: watched.Nodes}, nil},
		"reconnect, a disk was attached anew": {watched, told("reconnect", restarted, domainXML(Node{"vda", []int{8}}, Node{"vdb", []int{1}})), Known{Phase: Running, Run: restarted, Nodes: Nodes{{"vda", []int{8}}, {"vdb", []int{1}}}}, []Finding{{Target: "vda", Cause: chain.DiskReplaced}}},
		"reconnect of another run":            {watched, told("reconnect", Run{Boot: "b1", Libvirt: "9@9", ID: 5}, located2), Known{Phase: Running, Run: Run{Boot: "b1", Libvirt: "9@9", ID: 5}, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},
		"reconnect of one that was off":       {stopped, told("reconnect", restarted, located2), Known{Phase: Running, Run: restarted, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},

		"migration to this host":          {stopped, told("migrate", ended, ""), stopped, []Finding{{Cause: chain.Unseen}}},
		"attach":                          {Known{}, told("attach", first, located2), watched, []Finding{{Cause: chain.Unseen}}},
		"an operation of a later libvirt": {watched, told("levitate", first, ""), watched, nil},
	} {
		t.Run(name, func(t *testing.T) {
			checkVerdict(t, c.want, c.found)(Next(c.known, c.told))
		})
	}
}

// TestObserved has domains looked at, in each state that they may be known to be in.
func TestObserved(t *testing.T) {
	on := func(r Run, nodes ...Node) Observation {
		return Observation{Active: true, Run: Run{Boot: r.Boot, ID: r.ID, Process: r.Process}, Nodes: nodes}
	}
	off := func(boot string, disks ...fingerprint.Disk) Observation {
		return Observation{Run: Run{Boot: boot}, Disks: disks}
	}
	disks := stopped.Disks
	looked := watched
	looked.Run.Process = "50@1"
	alone := Known{Phase: Running, Run: Run{Boot: "b1", ID: 3, Process: "50@1"}, Nodes: watched.Nodes} // no hook ever told
	for name, c := range map[string]struct {
		known Known
		seen  Observation
		want  Known
		found []Finding
	}{
		"running, as known":                        {watched, on(looked.Run, watched.Nodes...), looked, nil},
		"running, as looked at before":             {looked, on(looked.Run, watched.Nodes...), looked, nil},
		"running, no process to be seen":           {looked, on(first, watched.Nodes...), looked, nil},
		"running, a disk attached anew":            {looked, on(looked.Run, Node{"vda", []int{2}}, Node{"vdb", []int{6}}), Known{Phase: Running, Run: looked.Run, Nodes: Nodes{{"vda", []int{2}}, {"vdb", []int{6}}}}, []Finding{{Target: "vdb", Cause: chain.DiskReplaced}}},
		"running, its number was given again":      {alone, on(Run{Boot: "b1", ID: 3, Process: "60@2"}, watched.Nodes...), Known{Phase: Running, Run: Run{Boot: "b1", ID: 3, Process: "60@2"}, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},
		"running, another run":                     {alone, on(second, watched.Nodes...), Known{Phase: Running, Run: Run{Boot: "b1", ID: 4}, Nodes: watched.Nodes}, []Finding{{Cause: chain.Unseen}}},
		"running, after a boot":                    {alone, on(Run{Boot: "b2", ID: 3}, watched.Nodes...), Known{Phase: Running, Run: Run{Boot: "b2", ID: 3}, Nodes: watched.Nodes}, []Finding{{Cause: chain.HostRestarted}}},
		"running, was off":                         {stopped, on(alone.Run, watched.Nodes...), alone, []Finding{{Cause: chain.Unseen}}},
		"running, not known":                       {Known{}, on(alone.Run, watched.Nodes...), alone, []Finding{{Cause: chain.Unseen}}},
		"running, nobody told that it was started": {Known{Phase: Running, Run: first}, on(looked.Run, watched.Nodes...), looked, []Finding{{Cause: chain.Unseen}}},
		"off, as known":                            {stopped, off("b1", disks...), stopped, nil},
		"off, after a boot":                        {stopped, off("b2", disks...), stopped, nil},
		"off, edited":                              {stopped, off("b1", stamped("vda", 5), disks[1]), Known{Phase: Off, Disks: []fingerprint.Disk{stamped("vda", 5), disks[1]}}, []Finding{{Target: "vda", Cause: chain.ChangedWhileOff}}},
		"off, was running":                         {watched, off("b1", disks...), stopped, []Finding{{Cause: chain.Unseen}}},
		"off, was running before a boot":           {watched, off("b2", disks...), stopped, []Finding{{Cause: chain.HostRestarted}}},
		"off, stopped, not released":               {halted, off("b1", disks...), stopped, []Finding{{Cause: chain.Unseen}}},
		"running, was stopped":                     {halted, on(alone.Run, watched.Nodes...), alone, []Finding{{Cause: chain.Unseen}}},
		"off, not known":                           {Known{}, off("b1", disks...), stopped, []Finding{{Cause: chain.Unseen}}},
	} {
		t.Run(name, func(t *testing.T) {
			checkVerdict(t, c.want, c.found)(Observed(c.known, c.seen))
		})
	}
}

func checkVerdict(t *testing.T, want Known, found []Finding) func(Known, []Finding) {
	return func(got Known, gotFound []Finding) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("known (-want +got):\n%s", diff)
		}
		for i, f := range gotFound {
			if f.Detail == "" {
				t.Errorf("%+v says nothing to people", f)
			}
			gotFound[i].Detail = ""
		}
		if diff := cmp.Diff(found, gotFound); diff != "" {
			t.Errorf("found (-want +got):\n%s", diff)
		}
	}
}
