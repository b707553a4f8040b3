package bus

import (
	"errors"
	"testing"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/dbus/bustest"
)

// TestTextThatIsNone: names of files, which are in details and errors, are any
// bytes. The bus takes nothing but UTF-8.
func TestTextThatIsNone(t *testing.T) {
	address, m := bustest.Start(t), newMemory()
	serve(t, address, m, authorize(everybody))
	c := client(t, address)
	const name, shown = "caf\xe9\x00", "caf\ufffd\ufffd"
	m.set(dbus.RepositoryProperties{ID: "R1", Name: "nas", Type: "dir", Path: "/" + name, State: dbus.RepositoryOnline})
	m.set(dbus.OfferingProperties{ID: "O1", Name: "daily", Repository: "nas", Domains: []string{name}})
	all, err := c.Objects(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all.Repositories {
		if r.ID == "R1" && r.Path != "/"+shown {
			t.Errorf("%+v", r)
		}
	}
	for _, o := range all.Offerings {
		if o.ID == "O1" && (len(o.Domains) != 1 || o.Domains[0] != shown) {
			t.Errorf("%+v", o)
		}
	}
	m.failing(errors.New("cannot open " + name))
	if err := c.FinishChain(t.Context(), webUUID); err == nil || err.Error() != "cannot open "+shown {
		t.Errorf("error %v", err)
	}
}
