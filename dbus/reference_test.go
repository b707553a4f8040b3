package dbus

import (
	"flag"
	"os"
	"testing"
)

func TestReferenceIsFresh(t *testing.T) {
	want, err := Reference()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("reference.md", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile("reference.md")
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Error("reference.md does not match interfaces/: run go generate ./dbus")
	}
}

var update = flag.Bool("update", false, "write reference.md anew")
