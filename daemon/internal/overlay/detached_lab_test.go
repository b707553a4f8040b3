//go:build lab

package overlay

import (
	"os"
	"testing"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// TestLabDetachedWhileCommitting has a commit that was begun come to nothing,
// and the admin take the disk away before it is done again: its overlay alone
// holds what the guest wrote last.
func TestLabDetachedWhileCommitting(t *testing.T) {
	g := newGuest(t, "overlay-detached")
	g.start()
	g.write(0, 10)
	one := g.backup()
	must(t, g.c.EndChain(t.Context(), one, chain.Finished, chain.ChainFinished))
	for target := range targets {
		must(t, g.c.CommittingOverlay(t.Context(), Name(g.base(target), one)))
	}
	g.write(5, 10)
	host(t, "virsh", "-q", "destroy", g.name)
	overlay := Name(g.base("vdb"), one)
	host(t, "virsh", "-q", "detach-disk", g.name, "vdb", "--config")
	g.settle()
	if _, err := os.Stat(overlay); err != nil {
		t.Fatal(err)
	}
	host(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", overlay, g.want["vdb"])
	host(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", g.base("vda"), g.want["vda"])
	must(t, os.Remove(overlay))
	must(t, os.Remove(g.base("vdb")))
}
