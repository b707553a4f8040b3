package policy

import (
	"encoding/xml"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
)

type defaults struct {
	Any      string `xml:"allow_any"`
	Inactive string `xml:"allow_inactive"`
	Active   string `xml:"allow_active"`
}

type policyAction struct {
	ID          string   `xml:"id,attr"`
	Description string   `xml:"description"`
	Message     string   `xml:"message"`
	Defaults    defaults `xml:"defaults"`
}

func policyActions(t *testing.T) map[Action]policyAction {
	t.Helper()
	data, err := os.ReadFile("org.virtbackup1.policy")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Actions []policyAction `xml:"action"`
	}
	if err := xml.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	actions := make(map[Action]policyAction)
	for _, a := range file.Actions {
		actions[Action(a.ID)] = a
	}
	return actions
}

// standard are the interfaces beside ours that the daemon answers to. Peer is
// answered by the D-Bus library, and says nothing.
func standard() []string {
	return []string{
		"org.freedesktop.DBus.ObjectManager.GetManagedObjects", "org.freedesktop.DBus.Introspectable.Introspect",
		"org.freedesktop.DBus.Properties.Get", "org.freedesktop.DBus.Properties.GetAll", "org.freedesktop.DBus.Properties.Set",
	}
}

func TestTableListsEveryMethodAndNoOther(t *testing.T) {
	interfaces, err := dbus.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	want := standard()
	for _, i := range interfaces {
		for _, m := range i.Methods {
			want = append(want, i.Name+"."+m.Name)
		}
	}
	slices.Sort(want)
	if got := Methods(); !slices.Equal(got, want) {
		t.Errorf("the table has\n%s\nthe interfaces have\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestOnlyReadingIsView(t *testing.T) {
	reads := regexp.MustCompile(`\.(Get\w*|List\w+|EffectiveConfiguration|Metrics|Preview\w*|PlanRestore|Log)$`)
	for method, action := range table() {
		if (action == ActionView) != reads.MatchString(method) && action != ActionNone {
			t.Errorf("%s needs %s", method, action)
		}
		if action == ActionNone && method != "org.freedesktop.DBus.Introspectable.Introspect" {
			t.Errorf("%s is open to anybody", method)
		}
	}
}

func TestActionsAreThoseOfThePolicyFile(t *testing.T) {
	used := make(map[Action]bool)
	for _, action := range table() {
		if action != ActionNone && action != ActionRoot {
			used[action] = true
		}
	}
	actions := policyActions(t)
	if got, want := slices.Sorted(maps.Keys(actions)), slices.Sorted(maps.Keys(used)); !slices.Equal(got, want) {
		t.Errorf("the file has %v, the table uses %v", got, want)
	}
	for id, a := range actions {
		for _, value := range []string{a.Defaults.Any, a.Defaults.Inactive, a.Defaults.Active} {
			if value != "auth_admin" && value != "auth_admin_keep" {
				t.Errorf("%s: a default is %q; only an administrator's password may do", id, value)
			}
		}
		if a.Description == "" || !strings.HasPrefix(a.Message, "Authentication is required to ") {
			t.Errorf("%s: description %q, message %q", id, a.Description, a.Message)
		}
	}
	for _, id := range []Action{ActionDelete, ActionRestoreInPlace, ActionManageRepositories} {
		if d := actions[id].Defaults; d != (defaults{"auth_admin", "auth_admin", "auth_admin"}) {
			t.Errorf("%s destroys data: each time needs a password of its own, and the defaults are %v", id, d)
		}
	}
}

func TestExamplesNameActionsAndDetailsThatExist(t *testing.T) {
	files, err := filepath.Glob("examples/*.rules")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	actions := policyActions(t)
	details := []string{dbus.DetailDomainName, dbus.DetailDomainUUID, dbus.DetailRepository, dbus.DetailOffering, dbus.DetailBackup}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		ids := regexp.MustCompile(`"(org\.virtbackup1\.[^"]*)"`).FindAllSubmatch(text, -1)
		if len(ids) == 0 {
			t.Errorf("%s names no action", file)
		}
		for _, id := range ids {
			if _, ok := actions[Action(id[1])]; !ok {
				t.Errorf("%s: no action %s", file, id[1])
			}
		}
		for _, key := range regexp.MustCompile(`lookup\("([^"]*)"\)`).FindAllSubmatch(text, -1) {
			if !slices.Contains(details, string(key[1])) {
				t.Errorf("%s: no detail %s", file, key[1])
			}
		}
	}
}
