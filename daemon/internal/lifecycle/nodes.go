package lifecycle

import (
	"encoding/xml"
	"slices"
)

// Nodes are the disks of a running domain.
type Nodes []Node

// Node is where one disk is in QEMU: libvirt's numbers of its layers, the top
// one first. libvirt gives none twice in a run, so one that stays there says
// that QEMU had it open, and its bitmaps recorded, all the time.
type Node struct {
	Target  string `json:"target"`
	Indexes []int  `json:"indexes,omitempty"`
}

func (all Nodes) of(target string) (Node, bool) {
	i := slices.IndexFunc(all, func(n Node) bool { return n.Target == target })
	if i < 0 {
		return Node{}, false
	}
	return all[i], true
}

// continues tells whether now is what became of n by snapshots that were put on
// top of it, or committed into it. A libvirt that numbers no layers cannot tell.
func (n Node) continues(now Node) bool {
	if len(n.Indexes) == 0 && len(now.Indexes) == 0 {
		return true
	}
	return slices.ContainsFunc(now.Indexes, func(i int) bool { return slices.Contains(n.Indexes, i) })
}

// definition is what is read of a domain's live XML
// (https://libvirt.org/formatdomain.html, "Hard drives, floppy disks, CDROMs").
type definition struct {
	ID    int `xml:"id,attr"`
	Disks []struct {
		Device string `xml:"device,attr"`
		Source *struct {
			Index int `xml:"index,attr"`
		} `xml:"source"`
		Backing *backing `xml:"backingStore"`
		Target  struct {
			Dev string `xml:"dev,attr"`
		} `xml:"target"`
	} `xml:"devices>disk"`
}

// backing is a layer below the top.
type backing struct {
	Index   int      `xml:"index,attr"`
	Backing *backing `xml:"backingStore"`
}

// parseNodes returns the disks of a domain as its live XML tells, nil if that
// cannot be read. CD-ROM and floppy drives are none.
func parseNodes(domainXML string) Nodes {
	d, err := parse(domainXML)
	if err != nil {
		return nil
	}
	return d.nodes()
}

func parse(domainXML string) (d definition, err error) {
	err = xml.Unmarshal([]byte(domainXML), &d)
	return d, err
}

func (d definition) nodes() Nodes {
	all := Nodes{}
	for _, k := range d.Disks {
		if k.Device != "" && k.Device != "disk" && k.Device != "lun" || k.Source == nil {
			continue
		}
		n := Node{Target: k.Target.Dev}
		if k.Source.Index != 0 {
			n.Indexes = append(n.Indexes, k.Source.Index)
		}
		for b := k.Backing; b != nil; b = b.Backing {
			if b.Index != 0 {
				n.Indexes = append(n.Indexes, b.Index)
			}
		}
		all = append(all, n)
	}
	return all
}
