package repository

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	ownerName   = "owner.json"
	ownerPrefix = ".owner-" // of a claim that is being written or taken over
	ownerLimit  = 4 << 10

	// A live owner renews its claim each minute; one that did not for ten is
	// dead, or so cut off from the storage that it will find its claim gone
	// before it commits.
	renewInterval = time.Minute
	staleAfter    = 10 * time.Minute
)

// owner is the content of the file that says who writes backups of a domain.
type owner struct {
	Host     string `json:"host"`
	HostName string `json:"host_name"`
	Backup   string `json:"backup"`
	Nonce    string `json:"nonce"`
}

// Claim is the right to change one domain's backups in a repository. Two hosts
// that both know a domain (a copy of it, a migration) would otherwise mix their
// chains. File locks are not enough on NAS: this is a file with a heartbeat.
type Claim struct {
	r      *Repository
	domain string
	owner  owner
}

// Claim takes the domain's directory for this host, for a job that makes or
// removes this backup. A live claim of another host is ErrForeign; a claim of
// this host is taken over, for the daemon runs one job of a domain at a time.
func (r *Repository) Claim(domain, backup string) (*Claim, error) {
	if err := checkBackup(domain, backup); err != nil {
		return nil, err
	}
	if err := r.tree.mkdir(domain); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	name, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	c := &Claim{r: r, domain: domain, owner: owner{Host: r.host, HostName: name, Backup: backup, Nonce: rand.Text()}}
	if err := c.take(); err != nil {
		return nil, fmt.Errorf("cannot claim domain %s in the repository: %w", domain, err)
	}
	return c, nil
}

func (c *Claim) take() error {
	content, err := json.Marshal(c.owner)
	if err != nil {
		return err
	}
	// The name says whose it is, should the file's content never be written.
	mine := c.domain + "/" + ownerPrefix + strings.Join([]string{c.owner.Host, c.owner.Backup, c.owner.Nonce}, ".")
	if err := c.r.tree.writeNew(mine, content); err != nil {
		return err
	}
	err = c.replace(mine)
	return errors.Join(err, ignoreMissing(c.r.tree.remove(mine, 0)))
}

// replace gives the file mine, just written, the owner file's name if no other
// host holds it. Its time is the file server's, and so is the heartbeat's: the
// clocks of two hosts are never compared.
func (c *Claim) replace(mine string) error {
	t := c.r.tree
	current := c.domain + "/" + ownerName
	there, age, err := c.r.readOwner(c.domain, mine)
	if err == nil && there.Host != c.r.host {
		if age < staleAfter {
			return fmt.Errorf("%w: %q has done so %s ago", ErrForeign, truncated(there.HostName), age.Round(time.Second))
		}
	}
	if err == nil {
		// Moved aside and looked at again: another host may have been faster.
		aside := mine + ".old"
		if err := t.rename(current, aside); err != nil {
			return err
		}
		moved, err := c.r.decodeOwner(aside)
		if err == nil && moved.Nonce != there.Nonce {
			return errors.Join(fmt.Errorf("%w: %q was faster", ErrForeign, truncated(moved.HostName)), t.rename(aside, current))
		}
		if err := t.remove(aside, 0); err != nil {
			return err
		}
	} else if !errors.Is(err, unix.ENOENT) {
		return err
	}
	if err := c.linkNew(mine, current); err != nil {
		return err
	}
	return c.Check()
}

// linkNew renames without replacing what another host may just have put there.
func (c *Claim) linkNew(mine, current string) error {
	t := c.r.tree
	err := t.at("claim", mine, func(fd int, base string) error {
		err := unix.Renameat2(fd, base, fd, ownerName, unix.RENAME_NOREPLACE)
		if err == unix.EINVAL || err == unix.ENOSYS { // NFS, some FUSE
			err = unix.Linkat(fd, base, fd, ownerName, 0)
		}
		return err
	})
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: it was faster", ErrForeign)
	}
	return err
}

// readOwner returns the owner of a domain and how much older its heartbeat is
// than the file probe, which was just written.
func (r *Repository) readOwner(domain, probe string) (owner, time.Duration, error) {
	current := domain + "/" + ownerName
	f, info, err := r.tree.openRegular(current)
	if err != nil {
		return owner{}, 0, err
	}
	f.Close()
	p, now, err := r.tree.openRegular(probe)
	if err != nil {
		return owner{}, 0, err
	}
	p.Close()
	age := now.ModTime().Sub(info.ModTime())
	o, err := r.decodeOwner(current)
	if errors.Is(err, unix.ENOENT) {
		return o, age, err
	}
	return o, age, nil // an unreadable owner is a stranger, alive until it is stale
}

func (r *Repository) decodeOwner(name string) (owner, error) {
	b, err := r.tree.readFile(name, ownerLimit)
	if err != nil {
		return owner{}, err
	}
	var o owner
	return o, json.Unmarshal(b, &o)
}

// Check tells whether the claim is still ours; ErrForeign if not.
func (c *Claim) Check() error {
	o, err := c.r.decodeOwner(c.domain + "/" + ownerName)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	if o.Nonce != c.owner.Nonce {
		return fmt.Errorf("%w: the claim on domain %s was lost to %q", ErrForeign, c.domain, truncated(o.HostName))
	}
	return nil
}

// Keep renews the claim until the context ends (nil) or it is lost.
func (c *Claim) Keep(ctx context.Context) error {
	tick := time.NewTicker(renewInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := c.renew(); err != nil {
				return err
			}
		}
	}
}

func (c *Claim) renew() error {
	if err := c.Check(); err != nil {
		return err
	}
	return c.r.tree.at("renew", c.domain+"/"+ownerName, func(fd int, base string) error {
		return unix.UtimesNanoAt(fd, base, nil, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Release gives the claim back, and removes the domain's directory if there is
// nothing in it.
func (c *Claim) Release() error {
	return c.r.dropClaim(c.domain, func(o owner) bool { return o.Nonce == c.owner.Nonce })
}

// dropClaim removes the claim on a domain if it is one that may go, the files
// of claims of this host that were cut short, and a directory left empty.
func (r *Repository) dropClaim(domain string, may func(owner) bool) error {
	names, err := r.tree.names(domain)
	if err != nil {
		return ignoreMissing(err)
	}
	for _, n := range names {
		var o owner
		if rest, ok := strings.CutPrefix(n, ownerPrefix); ok {
			if parts := strings.Split(rest, "."); len(parts) >= 3 {
				o = owner{Host: parts[0], Backup: parts[1], Nonce: parts[2]}
			}
		} else if n == ownerName {
			o, _ = r.decodeOwner(domain + "/" + n) // unreadable: nobody's
		}
		if o.Host == "" || !may(o) {
			continue
		}
		if err := ignoreMissing(r.tree.remove(domain+"/"+n, 0)); err != nil {
			return err
		}
	}
	err = r.tree.remove(domain, unix.AT_REMOVEDIR)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return nil
	}
	return ignoreMissing(err)
}
