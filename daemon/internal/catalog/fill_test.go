package catalog

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/oklog/ulid/v2"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"
)

// TestFill makes a catalog such as years of backups leave one, and looks
// whether it is sound. The bench has it fill the installed daemon's, at
// TEST_CATALOG_FILL, with a hundred thousand backups.
func TestFill(t *testing.T) {
	f := filling{path: filepath.Join(t.TempDir(), "catalog.sqlite"), domains: 40, each: 20, now: epoch}
	if path := os.Getenv("TEST_CATALOG_FILL"); path != "" {
		f = filling{path: path, domains: 1000, each: 100, now: time.Now()}
	}
	ctx := t.Context()
	c, err := Open(ctx, f.path)
	must(t, err)
	defer c.Close()
	must(t, f.fill(ctx, c))
	all, err := c.Summaries(ctx, "")
	if err != nil || len(all) < f.domains {
		t.Fatal(len(all), err)
	}
	for _, s := range all {
		if strings.HasPrefix(s.Name, "scale-") && (s.Chain == "" || s.ChainLength < 1 || s.LastBackup < s.Chain) && s.Offering != "" {
			t.Fatalf("%+v", s)
		}
	}
	var count, broken int
	must(t, c.read(ctx, "count", func(tx *sql.Tx) error {
		return errors.Join(tx.QueryRowContext(ctx, "SELECT count(*) FROM backups WHERE domain_name LIKE 'scale-%'").Scan(&count),
			tx.QueryRowContext(ctx, "SELECT count(*) FROM pragma_foreign_key_check").Scan(&broken))
	}))
	if count != f.domains*f.each || broken > 0 {
		t.Errorf("%d backups, %d references to nothing", count, broken)
	}
	list, children, err := c.WholeBackups(ctx, BackupFilter{Domain: f.uuid(1)}, Page{})
	if err != nil || len(list) != f.each || len(list[0].Images) != 2 || len(children) == 0 {
		t.Error(len(list), len(children), err)
	}
}

// filling is what a catalog is filled with.
type filling struct {
	path          string
	domains, each int // backups of each domain
	now           time.Time
}

// fillChain is how many backups are in each chain, fillJobs how many of the
// newest ones have their job left, as the daemon keeps them.
const (
	fillChain = 8
	fillJobs  = 9_000
)

func (f filling) uuid(domain int) string { return fmt.Sprintf("5ca1e000-0000-4000-8000-%012d", domain) }

func (f filling) fill(ctx context.Context, c *Catalog) error {
	repositories, err := c.Repositories(ctx)
	if err != nil {
		return err
	}
	if len(repositories) == 0 {
		one := Repository{ID: "01SCALE", Name: "scale", Type: "dir", Path: "/srv/scale", Created: f.now}
		if err := c.CreateRepository(ctx, one); err != nil {
			return err
		}
		repositories = append(repositories, one)
	}
	var offerings []Offering
	for i := range 4 {
		o := Offering{ID: ulid.Make().String(), Name: fmt.Sprintf("scale-offering-%d", i), Repository: repositories[i%len(repositories)].ID,
			Settings: settings, Created: f.now}
		if err := c.CreateOffering(ctx, o); err != nil {
			return err
		}
		offerings = append(offerings, o)
	}
	return c.write(ctx, "fill the catalog", func(tx *sql.Tx) error {
		for i := range f.domains {
			var offering any = offerings[i%len(offerings)].Name
			if i%50 == 7 {
				offering = nil
			}
			if _, err := tx.ExecContext(ctx, "INSERT INTO domains (uuid, name, offering) VALUES (?, ?, ?)", f.uuid(i), fmt.Sprintf("scale-%04d", i), offering); err != nil {
				return err
			}
		}
		w := writer{ctx: ctx, tx: tx, filling: f, chains: make([]string, f.domains), tips: make([]string, f.domains)}
		for n := range f.each {
			for domain := range f.domains {
				if err := w.backup(n, domain, offerings[domain%len(offerings)]); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// writer writes backups in the order of their making.
type writer struct {
	filling
	ctx    context.Context
	tx     *sql.Tx
	chains []string // by domain
	tips   []string // by domain
}

func (w *writer) exec(query string, args ...any) error {
	_, err := w.tx.ExecContext(w.ctx, query, args...)
	return err
}

func (w *writer) backup(n, domain int, o Offering) error {
	const interval = 12 * time.Hour
	created := w.now.Add(-interval*time.Duration(w.each-n) + time.Duration(domain)*time.Second)
	id := ulid.MustNew(ulid.Timestamp(created), ulid.DefaultEntropy()).String()
	b := Backup{ID: id, Domain: w.uuid(domain), DomainName: fmt.Sprintf("scale-%04d", domain), Repository: o.Repository, Offering: o.Name, Job: id,
		Kind: chain.Incremental, Chain: w.chains[domain], Parent: w.tips[domain], Created: created, Settings: settings, Consistency: "filesystem"}
	if n%fillChain == 0 {
		b.Kind, b.Cause, b.Chain, b.Parent = chain.Full, chain.FirstBackup, id, ""
	}
	for _, target := range []string{"vda", "vdb"} {
		b.Images = append(b.Images, Image{Target: target, Kind: b.Kind, Tracking: chain.CBT, Cause: b.Cause, Source: "/var/lib/libvirt/images/" + b.DomainName + "-" + target,
			Format: "qcow2", Size: 64 << 30, StoredBytes: rand.Uint64N(1 << 30), DataBytes: rand.Uint64N(1 << 31), ReadBytes: rand.Uint64N(1 << 31)})
	}
	if err := insertBackup(w.ctx, w.tx, b); err != nil {
		return err
	}
	if b.Kind == chain.Full {
		if err := w.exec("UPDATE chains SET state = 'finished', cause = 'chain-size' WHERE id = ?", w.chains[domain]); err != nil {
			return err
		}
		if _, err := startChain(w.ctx, w.tx, b); err != nil {
			return err
		}
		w.chains[domain] = id
	}
	w.tips[domain] = id
	if err := w.exec("INSERT INTO checkpoints (name, domain, backup, chain, state, xml) VALUES (?, ?, ?, ?, 'removed', '')",
		"virtbackup-"+id, b.Domain, id, b.Chain); err != nil {
		return err
	}
	if err := w.job(b, (n*w.domains + domain)); err != nil {
		return err
	}
	return completeBackup(w.ctx, w.tx, b, Commit{Finished: created.Add(time.Minute), Consistency: "filesystem", Manifest: manifestOf(b), Images: b.Images})
}

// job writes the job of a backup, unless it is forgotten by now; the last one of
// some domains has failed.
func (w *writer) job(b Backup, number int) error {
	left := w.domains*w.each - number
	if left > fillJobs {
		return nil
	}
	state, message := JobSucceeded, ""
	if left <= w.domains && left%100 == 3 {
		state, message = JobFailed, "the repository does not answer"
	}
	spec := fmt.Sprintf(`{"Domain":%q,"Repository":%q,"Offering":%q}`, b.Domain, b.Repository, b.Offering)
	plan := fmt.Sprintf(`{"Plan":{"Backup":%q,"Definition":%q}}`, b.ID, strings.Repeat("<disk type='file'/>", 300))
	err := w.exec(`INSERT INTO jobs (id, kind, domain, repository, backup, spec, state, step, step_data, undoing, result,
		error_name, error_message, uid, created, started, finished, phase, done, total)
		VALUES (?, 'backup', ?, ?, ?, ?, ?, 'copying', ?, 0, '', '', ?, 0, ?, ?, ?, 'committing', 1, 1)`,
		b.Job, b.Domain, b.Repository, b.ID, spec, state, plan, message, toMicro(b.Created), toMicro(b.Created), toMicro(b.Created.Add(time.Minute)))
	for i := 0; i < 3 && err == nil; i++ {
		err = w.exec("INSERT INTO job_messages (job, number, time, level, message) VALUES (?, ?, ?, ?, ?)",
			b.Job, i+1, toMicro(b.Created), 4*(i/2), "incremental backup of domain, disks: vda, vdb")
	}
	return err
}

func manifestOf(b Backup) []byte {
	disk := strings.Repeat(`{"target":"vda","file":"vda.qcow2","size":68719476736,"kind":"incremental","tracking":"cbt","format":"qcow2","digest_root":"`+
		strings.Repeat("ab", 32)+`","source":"/var/lib/libvirt/images/scale.qcow2","stored_bytes":123456789},`, 2)
	return fmt.Appendf(nil, `{"format":1,"backup":%q,"chain":%q,"host":"scale-host","version":"1.0","disks":[%s],"hmac":"%s"}`,
		b.ID, b.Chain, strings.TrimSuffix(disk, ","), strings.Repeat("cd", 32))
}
