//go:build hosts

package hosttest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// backup is what "virtbackupctl list" tells of one.
type backup struct {
	ID         string
	DomainName string `json:"domain_name"`
	Repository string
	State      string
	Finished   time.Time
}

// list are the backups of a domain in a repository, oldest first.
func (h *host) list(domain, repository string) []backup {
	h.t.Helper()
	var all []backup
	h.read(&all, "list", domain, "--repository", repository, "--state", "complete")
	slices.Reverse(all)
	return all
}

// versions remembers all that the disk of each domain has held: by domain, the
// digests of its content, oldest first.
type versions map[string][]string

// write changes the disk of a domain that is shut off. A backup that has it
// open goes first: so each backup holds one version, whole.
func (v versions) write(h *host, domain string) error {
	n := len(v[domain]) + 1
	digest, err := h.tryScript(`
		file=/var/lib/libvirt/images/$1-vda.qcow2
		until error=$(qemu-io -f qcow2 -c "write -q -P $2 $((($2 * 7919) % 12000))k 256k" -c "write -q -P $2 0 4k" -c flush "$file" 2>&1); do
			[[ $error == *lock* ]] || { echo "$error" >&2; exit 1; }
			sleep 0.05
		done
		qemu-img convert -U -f qcow2 -O raw "$file" "/var/tmp/$1.raw"
		sha256sum <"/var/tmp/$1.raw"`, domain, strconv.Itoa(n%255+1))
	if err == nil {
		v[domain] = append(v[domain], digest)
	}
	return err
}

// restored is the version that a backup restores to.
func (v versions) restored(h *host, b backup) int {
	h.t.Helper()
	name := "restored-" + strings.ToLower(b.ID)
	h.ctl("restore", b.ID, "--name", name, "--no-ask-password")
	digest := h.script(`
		file=$(virsh -q domblklist "$1" | awk '$1 == "vda" { print $2 }')
		qemu-img convert -O raw "$file" "/var/tmp/$1.raw"
		sha256sum <"/var/tmp/$1.raw"
		rm "/var/tmp/$1.raw" "$file"
		virsh -q undefine "$1" >/dev/null`, name)
	n := slices.Index(v[b.DomainName], digest)
	if n < 0 {
		h.t.Errorf("backup %s of %s holds nothing that the disk ever held", b.ID, b.DomainName)
	}
	return n
}

// TestGoldOfferingOverReboot has an offering back its domains up by itself, to
// two repositories, and keep the newest few; in the middle the host loses its power.
func TestGoldOfferingOverReboot(t *testing.T) {
	const keep = 4
	h, held := newHost(t, "gold"), versions{}
	domains, repositories := []string{"gold-a", "gold-b", "gold-c"}, []string{"near", "far"}
	for _, d := range domains {
		h.run("lab-domain", "create", d, "--disk", "qcow2:16M")
		if err := held.write(h, d); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range repositories {
		h.run("mkdir", "/srv/"+r)
		h.ctl("repository", "add", r, "/srv/"+r, "--minimum-free", "0")
	}
	h.ctl("offering", "create", "gold", "--repository", "near", "--quiesce", "none", "--chain-size", "0", "--keep-last", strconv.Itoa(keep))
	for _, d := range domains {
		eventually(t, d+" is known", func() error { _, err := h.try("virtbackupctl", "domain", "assign", d, "gold"); return err })
	}
	h.ctl("schedule", "create", "gold", "--offering", "gold", "--calendar", "*:*:0/10")
	h.ctl("schedule", "create", "gold-far", "--offering", "gold", "--calendar", "*:*:5/10", "--repository", "far")

	// each waits until every domain has, in both repositories, what is wanted.
	each := func(what string, holds func([]backup) error) {
		t.Helper()
		eventually(t, what, func() (err error) {
			// Not all the time: a disk that is written to is not backed up.
			time.Sleep(4 * time.Second)
			for _, d := range domains {
				if err := held.write(h, d); err != nil {
					t.Fatal(err)
				}
				for _, r := range repositories {
					if e := holds(h.list(d, r)); e != nil {
						err = fmt.Errorf("%s in %s: %w", d, r, e)
					}
				}
			}
			return err
		})
	}
	each("there are some points", func(points []backup) error {
		if len(points) < 2 {
			return fmt.Errorf("%d points", len(points))
		}
		return nil
	})
	timers := h.timers()
	var before backup
	for _, d := range domains {
		for _, r := range repositories {
			if newest := h.list(d, r); newest[len(newest)-1].Finished.After(before.Finished) {
				before = newest[len(newest)-1]
			}
		}
	}
	h.reboot("--hard")
	if after := h.timers(); !slices.Equal(timers, after) || len(after) != 2 {
		t.Errorf("the timers are %v after the reboot, and were %v", after, timers)
	}
	each("newer points replaced all those from before the reboot", func(points []backup) error {
		if len(points) != keep || !points[0].Finished.After(before.Finished) {
			return fmt.Errorf("%+v", points)
		}
		return nil
	})
	h.ctl("schedule", "disable", "gold")
	h.ctl("schedule", "disable", "gold-far")
	h.idle()
	for _, d := range domains {
		for _, r := range repositories {
			points, last := h.list(d, r), -1
			if len(points) != keep {
				t.Errorf("%s has %d points in %s", d, len(points), r)
			}
			for _, b := range points {
				n := held.restored(h, b)
				if n < last {
					t.Errorf("backup %s of %s holds an older version than the one before it", b.ID, d)
				}
				last = n
			}
		}
	}
}

// timers are the units that systemctl list-timers has of schedules.
func (h *host) timers() []string {
	h.t.Helper()
	return strings.Fields(h.script(`systemctl list-timers --no-legend 'virtbackup-schedule-*' | grep -o 'virtbackup-schedule-[^ ]*\.timer' | sort`))
}

// idle waits until no job is left.
func (h *host) idle() {
	h.t.Helper()
	eventually(h.t, "no job is left", func() error {
		var jobs []struct{ ID string }
		if h.read(&jobs, "jobs"); len(jobs) > 0 {
			return fmt.Errorf("%v", jobs)
		}
		return nil
	})
}
