//go:build race

package catalog

import "flag"

// fewer tries fewer cases with the race detector, which takes ten times as long
// for each, unless the command line says how many.
func fewer() error { return flag.Set("rapid.checks", "25") }
