package dbus

import (
	"fmt"
	"strings"
)

// Reference returns the API's reference in Markdown, made from the XML.
func Reference() (string, error) {
	all, err := Interfaces()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("# D-Bus API of virtbackup\n\n<!-- Made by go generate from dbus/interfaces. Do not edit. -->\n\n" +
		"Bus name `" + BusName + "` on the system bus, root `" + string(Root) + "`. Times are µs since the epoch. " +
		"All properties are read-only; PropertiesChanged invalidates them and carries no values, and InterfacesAdded carries no properties.\n\n" +
		"A call fails with one of:\n\n")
	for _, name := range ErrorNames() {
		fmt.Fprintf(&b, "- `%s`\n", string(name))
	}
	for _, i := range all {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n", i.Name, doc(i.Annotations))
		for _, m := range i.Methods {
			referenceMember(&b, "", m.Name, m.Args, m.Annotations)
		}
		for _, s := range i.Signals {
			referenceMember(&b, "signal ", s.Name, s.Args, s.Annotations)
		}
		b.WriteString("\n| property | type | |\n| --- | --- | --- |\n")
		for _, p := range i.Properties {
			fmt.Fprintf(&b, "| `%s` | `%s` | %s |\n", p.Name, p.Type, doc(p.Annotations))
		}
	}
	b.WriteString("\n## Causes\n\nWhy a disk, or a whole backup, is no increment by a bitmap, why a chain ended, or what was seen of a disk. More may come.\n\n| cause | |\n| --- | --- |\n")
	for _, c := range causes() {
		fmt.Fprintf(&b, "| `%s` | %s |\n", c.word, c.text)
	}
	return b.String(), nil
}

func referenceMember(b *strings.Builder, what, name string, args []Arg, annotations []annotation) {
	var in, out []string
	for _, a := range args {
		text := a.Type + " " + a.Name
		if a.Direction == "out" {
			out = append(out, text)
		} else {
			in = append(in, text)
		}
	}
	fmt.Fprintf(b, "\n### %s%s(%s)", what, name, strings.Join(in, ", "))
	if len(out) > 0 {
		fmt.Fprintf(b, " → %s", strings.Join(out, ", "))
	}
	fmt.Fprintf(b, "\n\n%s\n\n", doc(annotations))
	for _, a := range args {
		fmt.Fprintf(b, "- `%s`: %s\n", a.Name, doc(a.Annotations))
	}
}

func doc(annotations []annotation) string {
	for _, a := range annotations {
		if a.Name == docString {
			return a.Value
		}
	}
	return ""
}
