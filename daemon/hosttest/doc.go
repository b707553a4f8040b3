// Package hosttest holds the tests that want more than one host of the lab, or
// one that reboots: they run on the machine, and drive hosts from there (build
// tag hosts, "make test-hosts"). What one host shows by itself is in labtest.
package hosttest
