//go:build race

package nbd_test

import (
	"flag"
	"testing"
)

// TestMain tries fewer cases with the race detector, which takes ten times as
// long for each, unless the command line says how many.
func TestMain(m *testing.M) {
	if err := flag.Set("rapid.checks", "25"); err != nil {
		panic(err)
	}
	m.Run()
}
