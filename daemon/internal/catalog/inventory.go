package catalog

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"time"
)

// Repository is secondary storage that is known to this host.
type Repository struct {
	ID          string // ULID, of this host
	Name        string
	Type        string   // as of package storage
	Path        string   // of its directory; for storage that is mounted, the mount point
	Address     string   // of what is mounted; "" for a directory
	FileSystem  string   // of storage of type "mount"
	Options     []string // of the mount
	Credentials bool     // there are some, in a file of their own
	MinimumFree uint64   // bytes that a backup must leave free
	Created     time.Time
	Finding
}

// Finding is what a worker found when it last looked at a repository.
type Finding struct {
	Identity    string    // as in virtbackup-repository.json; "" until it was seen
	State       string    // as of package health
	Since       time.Time // it has this state; FoundRepository keeps it
	Problem     string    // why it is not online; "" if it is
	Total, Free uint64    // bytes
	Checked     time.Time
}

// Domain is a libvirt domain that was assigned, backed up, or both.
type Domain struct {
	UUID     string
	Name     string // last seen
	Offering string // "" if it is assigned to none
	// Overrides are what it has in place of its offering's settings, as JSON; nil for nothing.
	Overrides json.RawMessage
}

// CreateRepository adds a repository. ErrExists: its id, name or path is taken.
func (c *Catalog) CreateRepository(ctx context.Context, r Repository) error {
	return c.write(ctx, "create repository "+r.Name, func(tx *sql.Tx) error {
		options, err := listJSON(r.Options)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO repositories ("+repositoryColumns+") VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
			r.ID, r.Name, r.Type, r.Path, r.Address, r.FileSystem, options, r.Credentials,
			r.MinimumFree, toMicro(r.Created), r.Identity, cmp.Or(r.State, "unknown"), toMicro(r.Since), r.Problem, r.Total, r.Free, toMicro(r.Checked))
		return err
	})
}

// UpdateRepository changes where a repository is and how it is mounted, and what
// must stay free in it. ErrExists: another one is there.
func (c *Catalog) UpdateRepository(ctx context.Context, r Repository) error {
	return c.write(ctx, "change repository "+r.Name, func(tx *sql.Tx) error {
		options, err := listJSON(r.Options)
		if err != nil {
			return err
		}
		return exactlyOne(tx.ExecContext(ctx, "UPDATE repositories SET path = ?, address = ?, options = ?, credentials = ?, minimum_free = ? WHERE id = ?",
			r.Path, r.Address, options, r.Credentials, r.MinimumFree, r.ID))
	})
}

func listJSON(list []string) (string, error) {
	b, err := json.Marshal(append([]string{}, list...))
	return string(b), err
}

// FoundRepository records what a worker found. An identity that was seen once
// stays: another one at the same path is another repository, and a problem.
func (c *Catalog) FoundRepository(ctx context.Context, id string, f Finding) error {
	return c.write(ctx, "record the state of repository "+id, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, `UPDATE repositories SET
			identity = iif(identity = '', ?1, identity), since = iif(state = ?6, since, ?5), state = ?6, problem = ?2,
			total = ?3, free = ?4, checked = ?5 WHERE id = ?7`,
			f.Identity, f.Problem, f.Total, f.Free, toMicro(f.Checked), f.State, id))
	})
}

// RemoveRepository forgets a repository, and the attempts at backups that failed
// in it. ErrInUse: an offering or a backup is in it.
func (c *Catalog) RemoveRepository(ctx context.Context, id string) error {
	return c.write(ctx, "remove repository "+id, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, "DELETE FROM backups WHERE repository = ? AND state = 'failed'", id); err != nil {
			return err
		}
		return exactlyOne(tx.ExecContext(ctx, "DELETE FROM repositories WHERE id = ?", id))
	})
}

const repositoryColumns = "id, name, type, path, address, file_system, options, credentials, minimum_free, created, identity, state, since, problem, total, free, checked"

func scanRepository(from row) (r Repository, err error) {
	var options string
	err = from.Scan(&r.ID, &r.Name, &r.Type, &r.Path, &r.Address, &r.FileSystem, &options, &r.Credentials, &r.MinimumFree, timestamp{&r.Created},
		&r.Identity, &r.State, timestamp{&r.Since}, &r.Problem, &r.Total, &r.Free, timestamp{&r.Checked})
	if err == nil {
		err = json.Unmarshal([]byte(options), &r.Options)
	}
	return r, err
}

// Repository returns the repository with this id.
func (c *Catalog) Repository(ctx context.Context, id string) (r Repository, err error) {
	err = c.read(ctx, "read repository "+id, func(tx *sql.Tx) (err error) {
		r, err = scanRepository(tx.QueryRowContext(ctx, "SELECT "+repositoryColumns+" FROM repositories WHERE id = ?", id))
		return err
	})
	return r, err
}

// RepositoryByName returns the repository with this name.
func (c *Catalog) RepositoryByName(ctx context.Context, name string) (r Repository, err error) {
	err = c.read(ctx, "find repository "+name, func(tx *sql.Tx) (err error) {
		r, err = scanRepository(tx.QueryRowContext(ctx, "SELECT "+repositoryColumns+" FROM repositories WHERE name = ?", name))
		return err
	})
	return r, err
}

// Repositories returns all repositories by name.
func (c *Catalog) Repositories(ctx context.Context) (all []Repository, err error) {
	err = c.read(ctx, "list repositories", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanRepository, "SELECT "+repositoryColumns+" FROM repositories ORDER BY name")
		return err
	})
	return all, err
}

// SeenDomain records a domain and its name, and leaves its offering as it is.
func (c *Catalog) SeenDomain(ctx context.Context, uuid, name string) error {
	return c.write(ctx, "record domain "+uuid, func(tx *sql.Tx) error { return seenDomain(ctx, tx, uuid, name) })
}

func seenDomain(ctx context.Context, tx *sql.Tx, uuid, name string) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO domains (uuid, name) VALUES (?, ?)
		ON CONFLICT (uuid) DO UPDATE SET name = excluded.name WHERE name <> excluded.name`, uuid, name)
	return err
}

// AssignDomain assigns a domain to an offering, in place of the one it had. ErrNotFound: no such offering.
func (c *Catalog) AssignDomain(ctx context.Context, uuid, name, offering string) error {
	return c.write(ctx, "assign domain "+name, func(tx *sql.Tx) error {
		if err := mustExist(ctx, tx, "offering", "offerings", "name", offering); err != nil {
			return err
		}
		if err := seenDomain(ctx, tx, uuid, name); err != nil {
			return err
		}
		return exactlyOne(tx.ExecContext(ctx, "UPDATE domains SET offering = ? WHERE uuid = ?", offering, uuid))
	})
}

// UnassignDomain takes a domain from its offering; its backups stay.
func (c *Catalog) UnassignDomain(ctx context.Context, uuid string) error {
	return c.write(ctx, "unassign domain "+uuid, func(tx *sql.Tx) error {
		return exactlyOne(tx.ExecContext(ctx, "UPDATE domains SET offering = NULL WHERE uuid = ? AND offering IS NOT NULL", uuid))
	})
}

// OverrideDomain records what a domain has in place of its offering's settings,
// and the domain if it is not known yet.
func (c *Catalog) OverrideDomain(ctx context.Context, uuid, name string, overrides json.RawMessage) error {
	return c.write(ctx, "override settings of domain "+name, func(tx *sql.Tx) error {
		if err := seenDomain(ctx, tx, uuid, name); err != nil {
			return err
		}
		return exactlyOne(tx.ExecContext(ctx, "UPDATE domains SET overrides = ? WHERE uuid = ?", string(overrides), uuid))
	})
}

func scanDomain(from row) (d Domain, err error) {
	var overrides string
	err = from.Scan(&d.UUID, &d.Name, &d.Offering, &overrides)
	d.Overrides = raw(overrides)
	return d, err
}

const domainColumns = "uuid, name, coalesce(offering, ''), overrides"

// Domain returns what is known of a domain.
func (c *Catalog) Domain(ctx context.Context, uuid string) (d Domain, err error) {
	err = c.read(ctx, "read domain "+uuid, func(tx *sql.Tx) (err error) {
		d, err = scanDomain(tx.QueryRowContext(ctx, "SELECT "+domainColumns+" FROM domains WHERE uuid = ?", uuid))
		return err
	})
	return d, err
}

// Domains returns the known domains by name; with an offering, only those assigned to it.
func (c *Catalog) Domains(ctx context.Context, offering string) (all []Domain, err error) {
	var q conditions
	q.equal("offering", offering)
	err = c.read(ctx, "list domains", func(tx *sql.Tx) (err error) {
		all, err = collect(ctx, tx, scanDomain, "SELECT "+domainColumns+" FROM domains"+q.where()+" ORDER BY name, uuid", q.args...)
		return err
	})
	return all, err
}

func mustExist(ctx context.Context, tx *sql.Tx, what, table, column, value string) error {
	var found bool
	if err := tx.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM "+table+" WHERE "+column+" = ?)", value).Scan(&found); err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("%s %q: %w", what, value, ErrNotFound)
	}
	return nil
}
