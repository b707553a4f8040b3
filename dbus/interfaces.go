package dbus

import (
	"embed"
	"encoding/xml"
	"fmt"
	"slices"
)

//go:embed interfaces/*.xml
var files embed.FS

// docString is the annotation that GLib's gdbus-codegen reads documentation
// from.
const docString = "org.gtk.GDBus.DocString"

// emitsChanged is the annotation of the D-Bus specification that tells how
// changes of a property are signalled.
const emitsChanged = "org.freedesktop.DBus.Property.EmitsChangedSignal"

// Interface is one interface of the API, as its XML describes it.
type Interface struct {
	Name        string       `xml:"name,attr"`
	Annotations []annotation `xml:"annotation"`
	Methods     []Method     `xml:"method"`
	Signals     []Signal     `xml:"signal"`
	Properties  []Property   `xml:"property"`
	// XML is the inside of its <node> element.
	XML string `xml:"-"`
}

// Method is a method of an Interface.
type Method struct {
	Name        string       `xml:"name,attr"`
	Annotations []annotation `xml:"annotation"`
	Args        []Arg        `xml:"arg"`
}

// Signal is a signal of an Interface.
type Signal struct {
	Name        string       `xml:"name,attr"`
	Annotations []annotation `xml:"annotation"`
	Args        []Arg        `xml:"arg"`
}

// Arg is an argument of a Method or Signal. Direction is in or out; signals
// have none.
type Arg struct {
	Name        string       `xml:"name,attr"`
	Type        string       `xml:"type,attr"`
	Direction   string       `xml:"direction,attr"`
	Annotations []annotation `xml:"annotation"`
}

// Property is a property of an Interface.
type Property struct {
	Name        string       `xml:"name,attr"`
	Type        string       `xml:"type,attr"`
	Access      string       `xml:"access,attr"`
	Annotations []annotation `xml:"annotation"`
}

type annotation struct {
	Name  string `xml:"name,attr"`
	Value string `xml:"value,attr"`
}

// Signature returns the D-Bus types of the arguments of the given direction.
func (m Method) Signature(direction string) string {
	var s string
	for _, a := range m.Args {
		if a.Direction == direction {
			s += a.Type
		}
	}
	return s
}

// Changing returns the names of the properties that can change: all but those
// that are annotated as const.
func (i Interface) Changing() []string {
	var names []string
	for _, p := range i.Properties {
		if !slices.Contains(p.Annotations, annotation{emitsChanged, "const"}) {
			names = append(names, p.Name)
		}
	}
	return names
}

// Interfaces parses the interfaces of all kinds, in the order of Kinds.
func Interfaces() ([]Interface, error) {
	var all []Interface
	for _, kind := range Kinds() {
		name := "interfaces/" + kind.Interface() + ".xml"
		data, err := files.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("cannot read the interface of a %s: %w", kind, err)
		}
		i, err := ParseInterface(data)
		if err != nil {
			return nil, fmt.Errorf("cannot parse %s: %w", name, err)
		}
		all = append(all, i)
	}
	return all, nil
}

// ParseInterface parses introspection XML with one interface (D-Bus
// specification, "Introspection Data Format").
func ParseInterface(data []byte) (Interface, error) {
	var node struct {
		Interfaces []Interface `xml:"interface"`
		Inside     string      `xml:",innerxml"`
	}
	if err := xml.Unmarshal(data, &node); err != nil {
		return Interface{}, err
	}
	if len(node.Interfaces) != 1 {
		return Interface{}, fmt.Errorf("it holds %d interfaces, and one is expected", len(node.Interfaces))
	}
	node.Interfaces[0].XML = node.Inside
	return node.Interfaces[0], nil
}
