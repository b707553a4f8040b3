package repository

import (
	"bytes"
	"testing"
)

// FuzzManifest: whatever is accepted is exactly what encode writes, valid, and
// authenticated only by its key.
func FuzzManifest(f *testing.F) {
	m := testManifest(idB, idA)
	m.Format, m.Repository, m.Host = Format, ID(idC), HostID(ourKey)
	good, err := m.sign(ourKey)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"format":1}`))
	f.Add([]byte(`{"format":1e99}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b)
		if err != nil {
			return
		}
		if err := m.validate(); err != nil {
			t.Fatal(err)
		}
		again, err := m.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Fatalf("accepted %q, which is written as %q (error %v)", b, again, err)
		}
		if m.authenticate(ourKey) == nil && !bytes.Equal(b, good) {
			t.Fatalf("a forged manifest was accepted: %q", b)
		}
	})
}
