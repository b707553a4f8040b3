package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// Chain is a full backup and the increments on top of it.
type Chain struct {
	ID         string // of its full backup
	Domain     string // UUID
	Repository string // id
	Offering   string // name, as it was
	Isolated   bool   // one backup beside the domain's chains
	State      chain.State
	Cause      chain.Cause // why it ended
	Created    time.Time
	Length     int // committed backups in it
}

// Head is a chain with what the next backup would build on.
type Head struct {
	Chain
	Tip        *Backup     // its newest committed backup, with images; nil if none is left
	Checkpoint *Checkpoint // the current one; nil if the chain ended or no disk is tracked by one
}

const chainColumns = `id, domain, repository, offering, isolated, state, cause, created,
	(SELECT count(*) FROM backups WHERE chain = chains.id AND state NOT IN ('running', 'deleting'))`

func scanChain(from row) (c Chain, err error) {
	err = from.Scan(&c.ID, &c.Domain, &c.Repository, &c.Offering, &c.Isolated, &c.State, &c.Cause, timestamp{&c.Created}, &c.Length)
	return c, err
}

// Chain returns one chain.
func (c *Catalog) Chain(ctx context.Context, id string) (one Chain, err error) {
	err = c.read(ctx, "read chain "+id, func(tx *sql.Tx) (err error) {
		one, err = scanChain(tx.QueryRowContext(ctx, "SELECT "+chainColumns+" FROM chains WHERE id = ?", id))
		return err
	})
	return one, err
}

// Chains returns the chains of a domain, or of all for "", newest first.
func (c *Catalog) Chains(ctx context.Context, domain string) (all []Chain, err error) {
	var q conditions
	q.equal("domain", domain)
	err = c.read(ctx, "list chains", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanChain, "SELECT "+chainColumns+" FROM chains"+q.where()+" ORDER BY id DESC", q.args...)
		return err
	})
	return all, err
}

// LatestChain returns the newest chain of a domain in a repository, whatever
// its state; isolated backups are passed over. ErrNotFound: there is none.
func (c *Catalog) LatestChain(ctx context.Context, domain, repository string) (h Head, err error) {
	err = c.read(ctx, "read latest chain of domain "+domain, func(tx *sql.Tx) (err error) {
		h.Chain, err = scanChain(tx.QueryRowContext(ctx, "SELECT "+chainColumns+` FROM chains
			WHERE domain = ? AND repository = ? AND isolated = 0 ORDER BY state = 'open' DESC, id DESC LIMIT 1`, domain, repository))
		if err != nil {
			return err
		}
		if h.Tip, err = chainTip(ctx, tx, h.ID); err != nil {
			return err
		}
		h.Checkpoint, err = currentCheckpoint(ctx, tx, h.ID)
		return err
	})
	return h, err
}

// chainTip returns the newest committed backup of a chain, nil if none is left.
func chainTip(ctx context.Context, tx *sql.Tx, id string) (*Backup, error) {
	// Not the highest id: the clock may have been set back.
	var tip string
	err := tx.QueryRowContext(ctx, `SELECT id FROM backups AS b WHERE chain = ? AND state <> 'running' AND NOT EXISTS
		(SELECT 1 FROM backups WHERE parent = b.id AND state <> 'running')
		ORDER BY state = 'deleting', sequence DESC LIMIT 1`, id).Scan(&tip) // what was merged into another one is no tip
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := oneBackup(ctx, tx, tip)
	return &b, err
}

// EndChain finishes or breaks an open chain; its current checkpoint becomes
// obsolete. On a chain that has ended it does nothing: the first cause stays.
func (c *Catalog) EndChain(ctx context.Context, id string, state chain.State, cause chain.Cause) error {
	return c.write(ctx, "end chain "+id, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "chain", "chains", "id", id); err != nil {
			return err
		}
		return endChain(ctx, tx, id, state, cause)
	})
}

func endChain(ctx context.Context, tx *sql.Tx, id string, state chain.State, cause chain.Cause) error {
	if state == chain.Open || cause == "" {
		return fmt.Errorf("a chain ends as finished or broken, with a cause, not as %q with %q", state, cause)
	}
	_, err := tx.ExecContext(ctx, "UPDATE chains SET state = ?, cause = ? WHERE id = ? AND state = 'open'", state, cause, id)
	if err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, "UPDATE checkpoints SET state = 'obsolete' WHERE chain = ? AND state = 'current'", id)
	return err
}

// CheckpointState says what a checkpoint is good for.
type CheckpointState string

const (
	CheckpointPending  CheckpointState = "pending"  // of a backup that is not committed
	CheckpointCurrent  CheckpointState = "current"  // the base of the chain's next increment
	CheckpointObsolete CheckpointState = "obsolete" // to be removed from the domain's disks
	CheckpointRemoved  CheckpointState = "removed"  // gone; the name stays taken
)

// Checkpoint is a libvirt checkpoint that we made.
type Checkpoint struct {
	Name   string // used once, for ever
	Domain string // UUID
	Backup string // the backup whose point in time it is
	Chain  string
	State  CheckpointState
	XML    string // to define it in libvirt again; "" until known
}

const checkpointColumns = "name, domain, backup, chain, state, xml"

func scanCheckpoint(from row) (p Checkpoint, err error) {
	err = from.Scan(&p.Name, &p.Domain, &p.Backup, &p.Chain, &p.State, &p.XML)
	return p, err
}

func currentCheckpoint(ctx context.Context, tx *sql.Tx, chainID string) (*Checkpoint, error) {
	p, err := scanCheckpoint(tx.QueryRowContext(ctx, "SELECT "+checkpointColumns+
		" FROM checkpoints WHERE chain = ? AND state = 'current'", chainID))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return &p, err
}

// Checkpoints returns the checkpoints of a domain, or of all for "", in these
// states (all when none is given), oldest first.
func (c *Catalog) Checkpoints(ctx context.Context, domain string, states ...CheckpointState) (all []Checkpoint, err error) {
	var q conditions
	q.equal("domain", domain)
	oneOf(&q, "state", states)
	err = c.read(ctx, "list checkpoints", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanCheckpoint, "SELECT "+checkpointColumns+" FROM checkpoints"+q.where()+" ORDER BY name", q.args...)
		return err
	})
	return all, err
}

// SetCheckpointXML records the definition that libvirt gave a checkpoint.
func (c *Catalog) SetCheckpointXML(ctx context.Context, name, xml string) error {
	return c.write(ctx, "record checkpoint "+name, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "UPDATE checkpoints SET xml = ? WHERE name = ?", xml, name))
	})
}

// DropCheckpoint has a checkpoint removed that is the base of a chain's next
// increment; the chain goes on without. On any other it does nothing.
func (c *Catalog) DropCheckpoint(ctx context.Context, name string) error {
	return c.write(ctx, "drop checkpoint "+name, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "UPDATE checkpoints SET state = 'obsolete' WHERE name = ? AND state = 'current'", name)
		return err
	})
}

// RemovedCheckpoint records that an obsolete checkpoint is gone from the
// domain's disks. ErrState: it is pending or current.
func (c *Catalog) RemovedCheckpoint(ctx context.Context, name string) error {
	return c.write(ctx, "record removal of checkpoint "+name, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "checkpoint", "checkpoints", "name", name); err != nil {
			return err
		}
		err := exactlyOne(tx.ExecContext(ctx, `UPDATE checkpoints SET state = 'removed', xml = ''
			WHERE name = ? AND state IN ('obsolete', 'removed')`, name))
		if errors.Is(err, ErrNotFound) {
			return fmt.Errorf("checkpoint is still needed: %w", ErrState)
		}
		return err
	})
}
