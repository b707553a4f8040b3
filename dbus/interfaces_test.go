package dbus

import (
	"reflect"
	"strings"
	"testing"
	"unicode"

	godbus "github.com/godbus/dbus/v5"
)

func interfacesByName(t *testing.T) map[string]Interface {
	t.Helper()
	all, err := Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	byName := make(map[string]Interface)
	for _, i := range all {
		byName[i.Name] = i
	}
	return byName
}

func records() []Record {
	return []Record{
		ManagerProperties{}, RepositoryProperties{}, OfferingProperties{}, ScheduleProperties{}, DomainProperties{},
		ChainProperties{}, BackupProperties{}, JobProperties{},
	}
}

func TestRecordsAreThePropertiesOfTheXML(t *testing.T) {
	byName := interfacesByName(t)
	for _, record := range records() {
		name := record.Ref().Kind.Interface()
		want := make(map[string]string)
		for _, p := range byName[name].Properties {
			want[p.Name] = p.Type
			if p.Access != "read" {
				t.Errorf("%s.%s: access is %q; all properties are read-only", name, p.Name, p.Access)
			}
		}
		got := make(map[string]string)
		for _, f := range fields(reflect.ValueOf(record)) {
			got[f.key] = signature(f.value.Type())
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: the record has %v, the XML %v", name, got, want)
		}
	}
}

func TestXMLKeepsTheRules(t *testing.T) {
	for _, i := range interfacesByName(t) {
		documented(t, i.Name, i.Annotations)
		for _, m := range i.Methods {
			where := i.Name + "." + m.Name
			documented(t, where, m.Annotations)
			checkArgs(t, where, m.Args)
			if !unicode.IsUpper(rune(m.Name[0])) {
				t.Errorf("%s: members are UpperCamel", where)
			}
			in := m.Signature("in")
			if !readsOnly(m.Name) && !strings.HasSuffix(in, "a{sv}") {
				t.Errorf("%s: a call that changes something ends with options, and takes %q", where, in)
			}
		}
		for _, s := range i.Signals {
			documented(t, i.Name+"."+s.Name, s.Annotations)
			checkArgs(t, i.Name+"."+s.Name, s.Args)
		}
		for _, p := range i.Properties {
			documented(t, i.Name+"."+p.Name, p.Annotations)
		}
	}
}

func readsOnly(method string) bool {
	return strings.HasPrefix(method, "Get") || strings.HasPrefix(method, "List") || strings.HasPrefix(method, "Preview") ||
		method == "EffectiveConfiguration" || method == "Metrics" || method == "Log"
}

func checkArgs(t *testing.T, where string, args []Arg) {
	t.Helper()
	for _, a := range args {
		documented(t, where+" "+a.Name, a.Annotations)
		if a.Name == "" || strings.ToLower(a.Name) != a.Name {
			t.Errorf("%s: argument %q is not snake_case", where, a.Name)
		}
	}
}

func documented(t *testing.T, where string, annotations []annotation) {
	t.Helper()
	if doc(annotations) == "" {
		t.Errorf("%s has no %s", where, docString)
	}
}

func TestPathsRoundTrip(t *testing.T) {
	for _, ref := range []Ref{
		{Kind: KindManager},
		{KindDomain, "6a1f4d5e-0c0b-4b6e-9f1e-3a0d2c9b8f77"},
		{KindBackup, "01JD8Q4M6Z3V5W7X9YABCDEFGH"},
	} {
		got, ok := ParsePath(ref.Path())
		if !ok || got != ref || !ref.Path().IsValid() {
			t.Errorf("%v became %s and then %v", ref, ref.Path(), got)
		}
	}
	for _, path := range []string{
		"/", "/org", "/org/virtbackup1/", "/org/virtbackup1/domain", "/org/virtbackup1/manager",
		"/org/virtbackup1/job/a/b", "/org/virtbackup1/nothing/a", "/org/virtbackup11/job/a",
	} {
		if ref, ok := ParsePath(godbus.ObjectPath(path)); ok {
			t.Errorf("%s was taken for %v", path, ref)
		}
	}
	for _, id := range []string{"", "a/b", "a_b", "..", "ä", strings.Repeat("a", 65)} {
		if p := (Ref{KindJob, id}).Path(); p != NoObject {
			t.Errorf("id %q became %s", id, p)
		}
	}
}
