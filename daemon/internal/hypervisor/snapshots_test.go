package hypervisor

import (
	"context"
	"os"
	"path/filepath"
	"testing"
)

// TestWatchSnapshots writes files as libvirt does, for a domain that had
// snapshots before and for one that gets its first.
func TestWatchSnapshots(t *testing.T) {
	directory := t.TempDir()
	if err := os.Mkdir(filepath.Join(directory, "old"), 0o700); err != nil {
		t.Fatal(err)
	}
	h := &Hypervisor{}
	ctx, cancel := context.WithCancel(t.Context())
	events := h.Subscribe(ctx)
	done := make(chan error)
	go func() { done <- h.watchSnapshots(ctx, directory) }()
	write := func(domain string) {
		t.Helper()
		path := filepath.Join(directory, domain, "snap.xml")
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path+".new", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	// The watch begins at some time: what is written until then is not seen.
	for seen := map[string]bool{}; !seen["old"] || !seen["new"]; {
		write("old")
		write("new")
		select {
		case e := <-events:
			if e.Kind != EventSnapshot {
				t.Fatalf("got %+v", e)
			}
			seen[e.Name] = true
		default:
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := h.watchSnapshots(t.Context(), filepath.Join(directory, "missing")); err == nil {
		t.Error("a directory that is not there is watched")
	}
}
