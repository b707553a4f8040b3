//go:build race

package screen

import (
	"flag"
	"testing"
)

// TestMain tries fewer cases with the race detector, which takes ten times as
// long for each, unless the command line says how many.
func TestMain(m *testing.M) {
	if err := flag.Set("rapid.checks", "15"); err != nil {
		panic(err)
	}
	m.Run()
}
