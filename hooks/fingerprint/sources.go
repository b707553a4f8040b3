package fingerprint

import (
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
)

// Source is where a domain's definition says that a disk is.
type Source struct {
	Target string
	// Type is libvirt's: file, block, network, volume, …
	Type string
	// Path of a file or block device; empty for all else.
	Path string
	// Format is that of the driver element, as raw or qcow2.
	Format string
	// Network names what has no path.
	Network string
	// Backing is the backing chain where the definition gives it. QEMU then
	// uses that, whatever the images' headers say.
	Backing []Source
}

// definition is what is read of a domain's XML
// (https://libvirt.org/formatdomain.html, "Hard drives, floppy disks, CDROMs").
type definition struct {
	XMLName xml.Name `xml:"domain"`
	Disks   []struct {
		Type   string `xml:"type,attr"`
		Device string `xml:"device,attr"`
		Driver struct {
			Type string `xml:"type,attr"`
		} `xml:"driver"`
		Source *source `xml:"source"`
		Target struct {
			Dev string `xml:"dev,attr"`
		} `xml:"target"`
		Backing *backing `xml:"backingStore"`
	} `xml:"devices>disk"`
}

type backing struct {
	Type   string `xml:"type,attr"`
	Format struct {
		Type string `xml:"type,attr"`
	} `xml:"format"`
	Source  *source  `xml:"source"`
	Backing *backing `xml:"backingStore"`
}

type source struct {
	File       string     `xml:"file,attr"`
	Dev        string     `xml:"dev,attr"`
	Attributes []xml.Attr `xml:",any,attr"`
	Hosts      []struct {
		Attributes []xml.Attr `xml:",any,attr"`
	} `xml:"host"`
}

// Sources returns the disks of a domain that have a source. CD-ROM and floppy
// drives are none.
func Sources(domainXML []byte) ([]Source, error) {
	var d definition
	if err := xml.Unmarshal(domainXML, &d); err != nil {
		return nil, fmt.Errorf("cannot read the definition of a domain: %w", err)
	}
	var all []Source
	for _, k := range d.Disks {
		if k.Device != "" && k.Device != "disk" && k.Device != "lun" || k.Source == nil {
			continue
		}
		if k.Target.Dev == "" {
			return nil, errors.New("cannot read the definition of a domain: a disk has no target")
		}
		s := k.Source.source(k.Target.Dev, k.Type, k.Driver.Type)
		// An empty element ends the chain.
		for b := k.Backing; b != nil && b.Source != nil; b = b.Backing {
			s.Backing = append(s.Backing, b.Source.source(k.Target.Dev, b.Type, b.Format.Type))
		}
		all = append(all, s)
	}
	return all, nil
}

func (s *source) source(target, typ, format string) Source {
	found := Source{Target: target, Type: typ, Format: format}
	switch typ {
	case "file":
		found.Path = s.File
	case "block":
		found.Path = s.Dev
	default:
		found.Network = s.name(typ)
	}
	return found
}

// name puts together all that says where the source is. The index is not of
// that: libvirt numbers the layers anew each time.
func (s *source) name(typ string) string {
	var b strings.Builder
	b.WriteString(typ)
	attributes := func(list []xml.Attr) {
		for _, a := range list {
			if a.Name.Local != "index" {
				fmt.Fprintf(&b, " %s=%s", a.Name.Local, a.Value)
			}
		}
	}
	attributes(s.Attributes)
	for _, h := range s.Hosts {
		b.WriteString(" host")
		attributes(h.Attributes)
	}
	return b.String()
}
