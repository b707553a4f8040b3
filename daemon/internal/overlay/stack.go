// Package overlay knows the overlays that tracking by snapshot puts on disks of
// domains: an image on top of a disk takes all writes, so that what it holds is
// what changed since the backup at whose point in time it was made. It makes
// none, that is part of a backup; it brings the disks of a domain to what the
// catalog says they should be: one overlay, that of the newest backup of an
// open chain, or none. All others are committed into the layer below and
// removed, by QEMU while the domain runs, by qemu-img while it is off (a start
// fails for the lock of the image meanwhile).
//
// An overlay holds what the guest wrote last, so an overlay that is in no chain
// of its domain is removed only if we committed it, or nothing is in it. It is
// left where it is while libvirt knows snapshots of the domain, whose
// definitions name it, when it has internal snapshots in it, when another domain
// uses it or the image below it, and while the domain is saved.
//
// A domain that is defined from a file that names the image below, and not the
// overlay, starts without what is in the overlay. That is what tracking by
// snapshot asks of an admin: to define from what virsh dumpxml tells, or to
// finish the chain first.
package overlay

import (
	"regexp"

	"github.com/virtbackup/virtbackup/daemon/internal/hypervisor"
)

const infix = ".virtbackup-"

// pattern is that of the names of our overlays; its group is the id of the
// backup, a ULID.
var pattern = regexp.MustCompile(regexp.QuoteMeta(infix) + `([0-7][0-9A-HJKMNP-TV-Z]{25})$`)

// Name is the path of the overlay that a backup puts on a disk: beside its
// image, where libvirt, mandatory access control and storage pools bear it.
func Name(source, backup string) string { return source + infix + backup }

// Ours tells by its name whether a layer is an overlay of ours, and of which backup.
func Ours(l hypervisor.Stacked) (backup string, ours bool) {
	m := pattern.FindStringSubmatch(l.Path)
	if m == nil || l.Type != "file" || l.Format != "qcow2" {
		return "", false
	}
	return m[1], true
}

// Split parts a disk's layers, the top one first, into our overlays on top of
// it and the disk as it is without them. An image that all was pulled into is
// the disk itself, whatever its name.
func Split(stack []hypervisor.Stacked) (overlays, disk []hypervisor.Stacked) {
	i := 0
	for i < len(stack)-1 && ours(stack[i]) {
		i++
	}
	return stack[:i], stack[i:]
}

func ours(l hypervisor.Stacked) bool { _, is := Ours(l); return is }

// commit is one thing to do to a disk: some of its layers, all ours, go into
// the one below them.
type commit struct {
	target string
	above  *hypervisor.Stacked // the layer on top of them; nil if they are the top
	layers []hypervisor.Stacked
	base   hypervisor.Stacked
}

// plan says what has to be committed so that of our overlays only the one to
// keep is left, with nothing of ours on top of it; "" keeps none. What is on
// top of the one to keep goes into it.
func plan(target string, stack []hypervisor.Stacked, keep string) []commit {
	var all []commit
	for i := 0; i < len(stack)-1; i++ {
		if !ours(stack[i]) || stack[i].Path == keep {
			continue
		}
		one := commit{target: target}
		if i > 0 {
			one.above = &stack[i-1]
		}
		for i < len(stack)-1 && ours(stack[i]) && stack[i].Path != keep {
			one.layers = append(one.layers, stack[i])
			i++
		}
		one.base = stack[i]
		all = append(all, one)
	}
	return all
}
