package hypervisor

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Limits on a definition from a repository. libvirt's own definitions are far
// below them.
const (
	maximumDefinition = 4 << 20 // bytes
	maximumDepth      = 32
	maximumElements   = 20000
)

// element is a piece of XML. Names in a namespace
// (qemu:commandline and the like) keep it in front, so that no rule allows them.
type element struct {
	name     string
	attrs    []attribute
	text     string // all character data directly in it
	children []*element
}

type attribute struct{ name, value string }

func (e *element) attr(name string) string {
	for _, a := range e.attrs {
		if a.name == name {
			return a.value
		}
	}
	return ""
}

func (e *element) set(name, value string) {
	for i := range e.attrs {
		if e.attrs[i].name == name {
			e.attrs[i].value = value
			return
		}
	}
	e.attrs = append(e.attrs, attribute{name, value})
}

func (e *element) unset(names ...string) {
	kept := e.attrs[:0]
	for _, a := range e.attrs {
		if !contains(names, a.name) {
			kept = append(kept, a)
		}
	}
	e.attrs = kept
}

// child returns the first child of that name, or nil.
func (e *element) child(name string) *element {
	for _, c := range e.children {
		if c.name == name {
			return c
		}
	}
	return nil
}

// replace puts child in the place of all children of its name, or at the end.
func (e *element) replace(child *element) {
	var kept []*element
	done := false
	for _, c := range e.children {
		if c.name != child.name {
			kept = append(kept, c)
		} else if !done {
			kept = append(kept, child)
			done = true
		}
	}
	if !done {
		kept = append(kept, child)
	}
	e.children = kept
}

func (e *element) remove(name string) {
	var kept []*element
	for _, c := range e.children {
		if c.name != name {
			kept = append(kept, c)
		}
	}
	e.children = kept
}

func contains(list []string, s string) bool {
	for _, l := range list {
		if l == s {
			return true
		}
	}
	return false
}

// qualified names an XML name; a namespace makes it one that no rule allows.
func qualified(n xml.Name) string {
	if n.Space != "" {
		return n.Space + ":" + n.Local
	}
	return n.Local
}

// parseTree reads one XML document. Documents with a DOCTYPE (and so with
// entities of their own) or with processing instructions are refused.
func parseTree(doc []byte) (*element, error) {
	if len(doc) > maximumDefinition {
		return nil, fmt.Errorf("the definition has %d bytes, more than %d", len(doc), maximumDefinition)
	}
	dec := xml.NewDecoder(strings.NewReader(string(doc)))
	var root *element
	var open []*element
	count := 0
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("cannot parse the definition: %w", err)
		}
		switch t := tok.(type) {
		case xml.StartElement:
			if count++; count > maximumElements || len(open) >= maximumDepth {
				return nil, errors.New("the definition is too large or too deep")
			}
			e := newElement(t)
			if len(open) == 0 {
				if root != nil {
					return nil, errors.New("the definition has more than one root element")
				}
				root = e
			} else {
				parent := open[len(open)-1]
				parent.children = append(parent.children, e)
			}
			open = append(open, e)
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			if len(open) > 0 {
				open[len(open)-1].text += string(t)
			}
		case xml.Directive:
			return nil, errors.New("the definition has a document type, which no definition needs")
		case xml.ProcInst:
			if t.Target != "xml" {
				return nil, errors.New("the definition has a processing instruction, which no definition needs")
			}
		}
	}
	if root == nil {
		return nil, errors.New("the definition is empty")
	}
	return root, nil
}

func newElement(t xml.StartElement) *element {
	e := &element{name: qualified(t.Name)}
	for _, a := range t.Attr {
		if a.Name.Space == "xmlns" || a.Name.Local == "xmlns" {
			continue
		}
		e.attrs = append(e.attrs, attribute{qualified(a.Name), a.Value})
	}
	return e
}

// marshal writes the element as a document. All escaping is encoding/xml's.
func (e *element) marshal() (string, error) {
	var b strings.Builder
	enc := xml.NewEncoder(&b)
	enc.Indent("", "  ")
	if err := e.encode(enc); err != nil {
		return "", fmt.Errorf("cannot write the definition: %w", err)
	}
	if err := enc.Close(); err != nil {
		return "", fmt.Errorf("cannot write the definition: %w", err)
	}
	return b.String(), nil
}

func (e *element) encode(enc *xml.Encoder) error {
	start := xml.StartElement{Name: xml.Name{Local: e.name}}
	for _, a := range e.attrs {
		start.Attr = append(start.Attr, xml.Attr{Name: xml.Name{Local: a.name}, Value: a.value})
	}
	if err := enc.EncodeToken(start); err != nil {
		return err
	}
	if e.text != "" {
		if err := enc.EncodeToken(xml.CharData(e.text)); err != nil {
			return err
		}
	}
	for _, c := range e.children {
		if err := c.encode(enc); err != nil {
			return err
		}
	}
	return enc.EncodeToken(start.End())
}
