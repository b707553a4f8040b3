package lifecycle

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

// Phase is what a domain did when it was last heard of.
type Phase string

// The phases.
const (
	Unknown Phase = ""        // nothing that was known of it can be trusted
	Running Phase = "running" // from before QEMU opens the disks
	Stopped Phase = "stopped" // QEMU has ended, and nobody has looked at the disks so far
	Off     Phase = "off"     // they were looked at since
)

// Run is one life of a domain's QEMU process.
type Run struct {
	Boot string `json:"boot,omitempty"` // the kernel's boot id
	// Libvirt is the libvirtd that watches it, as in spool.Record; "" if no hook
	// told. Only one that saw the whole run saw when it ended.
	Libvirt string `json:"libvirt,omitempty"`
	ID      int    `json:"id,omitempty"` // libvirt's number of the domain; 0 for not known
	// Process is QEMU's, as Libvirt is libvirtd's; "" for not known. A libvirtd
	// that was restarted may give a number again.
	Process string `json:"process,omitempty"`
}

// Known is what is known of a domain.
type Known struct {
	Phase Phase `json:"phase,omitempty"`
	Run   Run   `json:"run,omitzero"` // while it runs
	// Nodes are the disks in this run; nil for not known.
	Nodes Nodes `json:"nodes"`
	// Disks are as they were when it was last seen off.
	Disks []fingerprint.Disk `json:"disks,omitempty"`
}

// Finding says that a disk changed unseen, or may have.
type Finding struct {
	Target string // "" for all disks
	Cause  chain.Cause
	Detail string // for people
}

// Observation is a domain as it was looked at, by nobody who would have seen
// what it did before.
type Observation struct {
	Active bool
	Run    Run                // Boot always; ID and Process of an active one
	Nodes  Nodes              // of an active one
	Disks  []fingerprint.Disk // of one that is off
}

// Next says what is known after the hook told of something, and what that
// means for the disks.
func Next(k Known, r spool.Record) (Known, []Finding) {
	run := Run{Boot: r.Boot, Libvirt: r.Libvirt, ID: r.DomainID}
	switch r.Operation {
	case "prepare":
		return prepared(k, run, r.Disks)
	case "start", "started", "stopped":
		k, found := goesOn(k, run)
		k, found = located(k, parseNodes(r.XML), found)
		if r.Operation == "stopped" {
			k.Phase = Stopped
		}
		return k, found
	case "release":
		if k.Phase != Stopped { // which run it was that ended was told when it stopped, if at all
			return Known{Phase: Off, Disks: r.Disks}, []Finding{lost(k, run, "the domain is off, and nobody saw it stop")}
		}
		k.Phase = Running
		k, found := goesOn(k, run)
		_, found = located(k, parseNodes(r.XML), found)
		return Known{Phase: Off, Disks: r.Disks}, found
	case "reconnect":
		return reconnected(k, run, parseNodes(r.XML))
	case "migrate":
		return k, []Finding{{Cause: chain.Unseen, Detail: "the domain came from another host"}}
	case "attach":
		return Known{Phase: Running, Run: run, Nodes: parseNodes(r.XML)},
			[]Finding{{Cause: chain.Unseen, Detail: "libvirt took over a QEMU process that ran already"}}
	}
	// "restore" comes before "prepare", and is no start of its own.
	return k, nil
}

// prepared is before QEMU opens the disks.
func prepared(k Known, run Run, disks []fingerprint.Disk) (Known, []Finding) {
	now := Known{Phase: Running, Run: run}
	if k.Phase != Off {
		return now, []Finding{lost(k, run, "the domain was started, and nobody saw it stop before")}
	}
	return now, compare(k.Disks, disks)
}

// goesOn checks that this is still the run that is known. If not, one that was
// not watched from its beginning takes its place.
func goesOn(k Known, run Run) (Known, []Finding) {
	switch {
	case k.Phase == Running && sameRun(k.Run, run) && k.Run.Libvirt == run.Libvirt:
		k.Run.ID = cmp.Or(k.Run.ID, run.ID)
		return k, nil
	case k.Phase == Running && sameRun(k.Run, run):
		k.Run.Libvirt = run.Libvirt
		return k, []Finding{{Cause: chain.Unseen, Detail: "the domain stopped while libvirtd was away, or nobody told that it was back"}}
	}
	return Known{Phase: Running, Run: run}, []Finding{lost(k, run, "the domain was started, and nobody saw what its disks were before")}
}

// reconnected is when a new libvirtd found QEMU still running.
func reconnected(k Known, run Run, nodes Nodes) (Known, []Finding) {
	if k.Phase != Running || !sameRun(k.Run, run) {
		return Known{Phase: Running, Run: run, Nodes: nodes}, []Finding{lost(k, run, "libvirtd found the domain running, and nobody saw it start")}
	}
	k.Run.Libvirt = run.Libvirt
	return located(k, nodes, nil)
}

// Observed says what is known after a look at the domain, and what that means
// for the disks.
func Observed(k Known, o Observation) (Known, []Finding) {
	switch {
	case !o.Active && k.Phase == Off:
		return Known{Phase: Off, Disks: o.Disks}, compare(k.Disks, o.Disks)
	case !o.Active:
		return Known{Phase: Off, Disks: o.Disks}, []Finding{lost(k, o.Run, "the domain is off, and nobody saw it stop")}
	case k.Phase != Running || !sameRun(k.Run, o.Run):
		return Known{Phase: Running, Run: o.Run, Nodes: o.Nodes}, []Finding{lost(k, o.Run, "the domain runs, and nobody saw it start")}
	case k.Nodes == nil:
		k.Run.Process, k.Nodes = cmp.Or(o.Run.Process, k.Run.Process), o.Nodes
		return k, []Finding{{Cause: chain.Unseen, Detail: "the domain runs, and nobody saw which disks it was started with"}}
	}
	k.Run.Process = cmp.Or(o.Run.Process, k.Run.Process)
	return located(k, o.Nodes, nil)
}

// sameRun tells whether nothing speaks against two being the same run. Which
// libvirtd watches it does not.
func sameRun(a, b Run) bool {
	return a.Boot == b.Boot && (a.ID == b.ID || a.ID == 0 || b.ID == 0) &&
		(a.Process == b.Process || a.Process == "" || b.Process == "")
}

// lost is about a domain that has stopped, or was started, unseen.
func lost(k Known, now Run, detail string) Finding {
	if k.Phase == Running && k.Run.Boot != now.Boot {
		return Finding{Cause: chain.HostRestarted, Detail: "the host went down while the domain ran"}
	}
	return Finding{Cause: chain.Unseen, Detail: detail}
}

// located takes over where the disks are in a run, and finds those that were
// attached in it, or detached and attached again: nobody watched them before.
func located(k Known, now Nodes, found []Finding) (Known, []Finding) {
	if now == nil {
		return k, found
	}
	for _, n := range now {
		if k.Nodes == nil {
			break
		}
		before, ok := k.Nodes.of(n.Target)
		switch {
		case !ok:
			found = append(found, Finding{Target: n.Target, Cause: chain.DiskReplaced, Detail: "the disk was attached while the domain ran"})
		case !before.continues(n):
			found = append(found, Finding{Target: n.Target, Cause: chain.DiskReplaced, Detail: "the disk was replaced, or detached and attached again, while the domain ran"})
		}
	}
	k.Nodes = now
	return k, found
}

// compare finds the disks that are not as they were when the domain stopped.
func compare(before, now []fingerprint.Disk) []Finding {
	var found []Finding
	for _, d := range now {
		i := slices.IndexFunc(before, func(b fingerprint.Disk) bool { return b.Target == d.Target })
		if i < 0 {
			found = append(found, Finding{Target: d.Target, Cause: chain.DiskReplaced, Detail: "the disk was attached while the domain was off"})
			continue
		}
		same, why := before[i].Compare(d)
		switch was, is := top(before[i]), top(d); {
		case was != is:
			found = append(found, Finding{Target: d.Target, Cause: chain.DiskReplaced, Detail: fmt.Sprintf("it is %s, and was %s", is, was)})
		case same:
		case why == fingerprint.Opaque:
			found = append(found, Finding{Target: d.Target, Cause: chain.Unseen, Detail: "whether it changed while the domain was off cannot be seen on this kind of storage"})
		default:
			found = append(found, Finding{Target: d.Target, Cause: chain.ChangedWhileOff, Detail: why})
		}
	}
	return found
}

func top(d fingerprint.Disk) string {
	if len(d.Layers) == 0 {
		return ""
	}
	return d.Layers[0].Path
}
