package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// TestInvariants does at random what jobs do, in any order, also what they
// should not do; whatever the catalog accepts, its invariants hold.
func TestInvariants(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		directory, err := os.MkdirTemp("/dev/shm", "virtbackup-catalog") // no kill of the host here, so no disk is needed
		must(t, err)
		defer func() { must(t, os.RemoveAll(directory)) }()
		c, err := Open(t.Context(), filepath.Join(directory, "catalog.sqlite"))
		must(t, err)
		defer func() { must(t, c.Close()) }()
		fixture(t, c)
		m := &machine{catalog: c, ctx: t.Context()}
		rt.Repeat(map[string]func(*rapid.T){
			"create": m.create,
			"commit": m.commit,
			"fail":   m.fail,
			"end":    m.end,
			"damage": m.damage, "verify": m.verify,
			"begin":  m.beginDelete,
			"delete": m.delete,
			"merge":  m.merge,
			"hold":   m.hold,
			"":       func(rt *rapid.T) { checkInvariants(rt, c) },
		})
	})
}

type machine struct {
	catalog *Catalog
	ctx     context.Context
	made    int
}

// refusable lets through what the catalog may say to a request that makes no sense.
func refusable(t *rapid.T, err error) {
	if err != nil && !errors.Is(err, ErrState) && !errors.Is(err, ErrInUse) && !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

func (m *machine) pick(t *rapid.T, states ...chain.BackupState) (Backup, bool) {
	list, err := m.catalog.ListBackups(m.ctx, BackupFilter{States: states}, Page{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) == 0 {
		return Backup{}, false
	}
	return list[rapid.IntRange(0, len(list)-1).Draw(t, "backup")], true
}

func (m *machine) create(t *rapid.T) {
	m.made++
	id := fmt.Sprintf("b%03d", m.made)
	if rapid.Bool().Draw(t, "clock set back") {
		id = fmt.Sprintf("a%03d", 999-m.made)
	}
	b := fullBackup(id)
	b.Domain = rapid.SampledFrom([]string{"d1", "d2"}).Draw(t, "domain")
	b.Repository = rapid.SampledFrom([]string{"r1", "r1", "r2"}).Draw(t, "repository")
	b.Isolated = rapid.IntRange(0, 4).Draw(t, "isolated") == 0
	if !b.Isolated && rapid.IntRange(0, 3).Draw(t, "increment") > 0 {
		head, err := m.catalog.LatestChain(m.ctx, b.Domain, b.Repository)
		parent := ""
		if err == nil && head.Tip != nil {
			parent = head.Tip.ID
		}
		if any, ok := m.pick(t); ok && rapid.IntRange(0, 5).Draw(t, "wrong parent") == 0 {
			parent, head.ID = any.ID, any.Chain
		}
		b.Kind, b.Cause, b.Chain, b.Parent = chain.Incremental, "", head.ID, parent
	}
	refusable(t, m.catalog.CreateBackup(m.ctx, b, "virtbackup-"+id, Step{Job: "j", Name: id}))
}

func (m *machine) commit(t *rapid.T) {
	if b, ok := m.pick(t, chain.Running, chain.Complete); ok {
		refusable(t, m.catalog.CommitBackup(m.ctx, b.ID, done(fullBackup(b.ID))))
	}
}

func (m *machine) fail(t *rapid.T) {
	if b, ok := m.pick(t, chain.Running); ok {
		refusable(t, m.catalog.FailBackup(m.ctx, b.ID, "failed", epoch))
	}
}

func (m *machine) damage(t *rapid.T) {
	if b, ok := m.pick(t); ok && rapid.IntRange(0, 3).Draw(t, "really") == 0 {
		if rapid.Bool().Draw(t, "all of it") {
			refusable(t, m.catalog.DamagedBackup(m.ctx, b.ID, "damaged"))
			return
		}
		hit := []Damage{{Backup: b.ID, Target: "vda", Length: 1}}
		if child, ok := m.pick(t); ok {
			hit = append(hit, Damage{Backup: child.ID, Target: "vda", Length: 1})
		}
		refusable(t, m.catalog.RecordDamage(m.ctx, b.ID, "damaged", hit))
	}
}

// verify finds a backup good again, or keeps one that was to be deleted.
func (m *machine) verify(t *rapid.T) {
	if b, ok := m.pick(t); ok && rapid.Bool().Draw(t, "verified") {
		refusable(t, m.catalog.VerifiedBackup(m.ctx, b.ID, epoch))
	}
}

func (m *machine) end(t *rapid.T) {
	b, ok := m.pick(t, chain.Complete)
	if ok && rapid.IntRange(0, 3).Draw(t, "really") == 0 {
		refusable(t, m.catalog.EndChain(m.ctx, b.Chain, chain.Finished, chain.ChainFinished))
	}
}

// merge merges some backups below another one, as a plan has it or not.
func (m *machine) merge(t *rapid.T) {
	b, ok := m.pick(t, chain.Complete)
	if !ok {
		return
	}
	merged := Merged{Merge: chain.Merge{Into: b.ID}, Manifest: []byte("{}")}
	at := b.Parent
	for range rapid.IntRange(1, 3).Draw(t, "how many") {
		if rapid.IntRange(0, 9).Draw(t, "wrong") == 0 {
			if any, ok := m.pick(t); ok {
				at = any.ID
			}
		}
		if at == "" {
			break
		}
		below, err := m.catalog.Backup(m.ctx, at)
		if err != nil {
			t.Fatal(err)
		}
		merged.Drop, at = append(merged.Drop, at), below.Parent
	}
	merged.Base = at
	kind := chain.Incremental
	if at == "" {
		kind = chain.Full
	}
	whole, err := m.catalog.Backup(m.ctx, b.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range whole.Images {
		merged.Images = append(merged.Images, MergedImage{Target: i.Target, Kind: kind, StoredBytes: 5, DataBytes: 4})
	}
	if len(merged.Drop) > 0 {
		if begun := m.catalog.BeginMerge(m.ctx, merged.Merge, Step{Job: "j", Name: "merging"}); begun != nil {
			refusable(t, begun)
			return
		}
		refusable(t, m.catalog.MergeBackups(m.ctx, merged, Step{Job: "j", Name: "merge"}))
	}
}

func (m *machine) hold(t *rapid.T) {
	if b, ok := m.pick(t); ok {
		refusable(t, m.catalog.HoldBackup(m.ctx, b.ID, rapid.SampledFrom([]string{"", "", "wanted"}).Draw(t, "reason")))
	}
}

func (m *machine) beginDelete(t *rapid.T) {
	var ids []string
	for range rapid.IntRange(1, 3).Draw(t, "how many") {
		if b, ok := m.pick(t); ok && !slices.Contains(ids, b.ID) {
			ids = append(ids, b.ID)
		}
	}
	refusable(t, m.catalog.BeginDelete(m.ctx, ids, Step{Job: "j", Name: "delete"}))
}

func (m *machine) delete(t *rapid.T) {
	if b, ok := m.pick(t, chain.Deleting); ok {
		refusable(t, m.catalog.DeleteBackups(m.ctx, []string{b.ID}))
	}
}

// checkInvariants looks for what must not be, with a query for each.
func checkInvariants(t interface {
	Helper()
	Errorf(format string, args ...any)
}, c *Catalog) {
	t.Helper()
	for what, query := range map[string]string{
		"two open chains of a domain in a repository": `SELECT domain || ' ' || repository FROM chains WHERE state = 'open' GROUP BY domain, repository HAVING count(*) > 1`,
		"two current checkpoints of a chain":          `SELECT chain FROM checkpoints WHERE state = 'current' GROUP BY chain HAVING count(*) > 1`,
		"current checkpoint without an open chain":    `SELECT p.name FROM checkpoints AS p LEFT JOIN chains AS c ON c.id = p.chain WHERE p.state = 'current' AND c.state IS NOT 'open'`,
		"current checkpoint that is not of the tip": `SELECT p.name FROM checkpoints AS p WHERE p.state = 'current' AND EXISTS
			(SELECT 1 FROM backups WHERE parent = p.backup AND state <> 'running')`,
		"current checkpoint of a backup that is not complete": `SELECT p.name FROM checkpoints AS p LEFT JOIN backups AS b ON b.id = p.backup WHERE p.state = 'current' AND b.state IS NOT 'complete'`,
		"pending checkpoint of a backup that does not run":    `SELECT p.name FROM checkpoints AS p LEFT JOIN backups AS b ON b.id = p.backup WHERE p.state = 'pending' AND b.state IS NOT 'running'`,
		"chain without a full backup":                         `SELECT id FROM chains AS c WHERE NOT EXISTS (SELECT 1 FROM backups WHERE chain = c.id AND kind = 'full')`,
		"backup whose parent is not in its chain": `SELECT b.id FROM backups AS b LEFT JOIN backups AS p ON p.id = b.parent
			WHERE b.parent IS NOT NULL AND (p.chain IS NOT b.chain OR p.domain <> b.domain OR p.repository <> b.repository)`,
		"complete backup on one that is not":            `SELECT b.id FROM backups AS b JOIN backups AS p ON p.id = b.parent WHERE b.state = 'complete' AND p.state NOT IN ('complete', 'damaged')`,
		"complete backup of which something is damaged": `SELECT id FROM backups WHERE state = 'complete' AND id IN (SELECT backup FROM damage)`,
		"damaged backup of which nothing is":            `SELECT id FROM backups WHERE state = 'damaged' AND id NOT IN (SELECT backup FROM damage)`,
		"chain with branches":                           `SELECT parent FROM backups WHERE parent IS NOT NULL GROUP BY parent HAVING count(*) > 1`,
		"open chain whose newest backup is not complete": `SELECT id FROM chains AS c WHERE state = 'open' AND (EXISTS (SELECT 1 FROM backups WHERE chain = c.id AND state = 'damaged')
			OR NOT EXISTS (SELECT 1 FROM backups AS b WHERE chain = c.id AND state = 'complete' AND NOT EXISTS (SELECT 1 FROM backups WHERE parent = b.id AND state <> 'running')))`,
		"complete backups of a chain that do not follow one another": `SELECT chain FROM backups AS b WHERE state IN ('complete', 'damaged') AND NOT EXISTS
			(SELECT 1 FROM backups WHERE parent = b.id AND state <> 'running') GROUP BY chain HAVING count(*) > 1`,
		"held backup that is being deleted": `SELECT id FROM backups WHERE hold <> '' AND state = 'deleting'`,
		"committed backup without a chain":  `SELECT id FROM backups WHERE chain IS NULL AND state IN ('complete', 'damaged')`,
		"backup without images":             `SELECT id FROM backups WHERE id NOT IN (SELECT backup FROM images)`,
		"dangling reference":                `SELECT "table" FROM pragma_foreign_key_check`,
	} {
		err := c.read(context.Background(), "check", func(tx *sql.Tx) error {
			found, err := collect(context.Background(), tx, scanString, query)
			if len(found) > 0 {
				t.Errorf("%s: %v", what, found)
			}
			return err
		})
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}
