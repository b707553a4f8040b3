package catalog

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/virtbackup/virtbackup/daemon/internal/chain"

	"github.com/google/go-cmp/cmp"
)

func TestOpenIsPrivateAndDurable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.sqlite")
	must(t, os.WriteFile(path, nil, 0o666))
	c, err := Open(t.Context(), path)
	must(t, err)
	defer func() { must(t, c.Close()) }()
	fixture(t, c)
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if info, err := os.Stat(path + suffix); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s%s: %v, %v", path, suffix, info.Mode(), err)
		}
	}
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		var got string
		must(t, c.writer.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got))
		if got != want {
			t.Errorf("%s is %s, not %s", pragma, got, want)
		}
	}
	err = c.read(t.Context(), "write through a reader", func(tx *sql.Tx) error {
		_, err := tx.ExecContext(t.Context(), "DELETE FROM jobs")
		return err
	})
	if err == nil {
		t.Error("a reader can write")
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.sqlite")
	c, err := Open(t.Context(), path)
	must(t, err)
	_, err = c.writer.ExecContext(t.Context(), "PRAGMA user_version = 99")
	must(t, errors.Join(err, c.Close()))
	before, err := os.ReadFile(path)
	must(t, err)
	if c, err := Open(t.Context(), path); c != nil || !errors.Is(err, ErrNewerSchema) {
		t.Errorf("got %v, %v", c, err)
	}
	after, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(before, after) {
		t.Error("the file was changed")
	}
}

func TestMigrationKeepsACopy(t *testing.T) {
	ctx, path := t.Context(), filepath.Join(t.TempDir(), "catalog.sqlite")
	schema, err := readMigrations(migrations)
	must(t, err)
	c, err := open(ctx, path, schema)
	must(t, err)
	fixture(t, c)
	must(t, c.Close())
	kept := fmt.Sprintf("%s.schema-%d", path, len(schema))
	// What a migration that was interrupted left.
	must(t, os.WriteFile(kept+".new", []byte("half"), 0o600))

	failing := append(slices.Clone(schema), "CREATE TABLE added (x); INSERT INTO nowhere VALUES (1)")
	if c, err := open(ctx, path, failing); c != nil || err == nil {
		t.Fatalf("a failing migration gives %v, %v", c, err)
	}
	c, err = open(ctx, path, append(slices.Clone(schema), "ALTER TABLE jobs ADD COLUMN more TEXT; CREATE TABLE added (x)"))
	must(t, err)
	if _, err := c.Job(ctx, "j"); err != nil {
		t.Error(err)
	}
	must(t, c.Close())
	info, err := os.Stat(kept)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	old, err := open(ctx, kept, schema)
	must(t, err)
	defer func() { must(t, old.Close()) }()
	if o, err := old.Offering(ctx, "daily"); err != nil || !cmp.Equal(o.Settings, settings) {
		t.Errorf("the copy has %+v, %v", o, err)
	}
}

func TestMigrationsAreInOrder(t *testing.T) {
	if _, err := readMigrations(fstest.MapFS{"migrations/0001.sql": {}, "migrations/0003.sql": {}}); err == nil {
		t.Error("a gap is accepted")
	}
}

func TestCorruptedCatalogIsMovedAside(t *testing.T) {
	for name, damage := range map[string]func([]byte){
		"not a database": func(b []byte) { copy(b, "something else entirely") },
		"schema":         func(b []byte) { clear(b[100:4096]) },
		"pages":          func(b []byte) { clear(b[2*4096 : len(b)-4096]) },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, path := t.Context(), filepath.Join(t.TempDir(), "catalog.sqlite")
			c, err := Open(ctx, path)
			must(t, err)
			fixture(t, c)
			must(t, c.Close())
			content, err := os.ReadFile(path)
			must(t, err)
			damage(content)
			must(t, os.WriteFile(path, content, 0o600))

			c, err = Open(ctx, path)
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || c == nil {
				t.Fatalf("got %v, %v", c, err)
			}
			kept, err := os.ReadFile(corrupt.MovedTo)
			must(t, err)
			if !bytes.Equal(kept, content) || !strings.HasPrefix(corrupt.MovedTo, path+".corrupt-") {
				t.Errorf("%s is not what was found", corrupt.MovedTo)
			}
			fixture(t, c) // works, and was empty
			must(t, c.Close())
			c, err = Open(ctx, path)
			must(t, err)
			must(t, c.Close())
		})
	}
}

func TestUnreadableCatalogStaysWhereItIs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "catalog.sqlite")
	must(t, os.Mkdir(path, 0o700))
	if c, err := Open(t.Context(), path); c != nil || err == nil {
		t.Errorf("got %v, %v", c, err)
	}
	if found, err := filepath.Glob(path + "*"); err != nil || len(found) != 1 {
		t.Errorf("got %v, %v", found, err)
	}
}

// The test binary, when asked by this variable, is the process to be killed.
const childVariable = "CATALOG_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childVariable); path != "" {
		fmt.Fprintln(os.Stderr, writeUntilKilled(context.Background(), path))
		os.Exit(1)
	}
	if err := fewer(); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// writeUntilKilled grows a chain and says so after each commit; after the line
// that tells it to, it begins a transaction and never ends it.
func writeUntilKilled(ctx context.Context, path string) error {
	c, err := Open(ctx, path)
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	go func() {
		_, _ = io.ReadAll(os.Stdin) // the parent closes it
		close(stop)
	}()
	last := "b0000"
	for i := 1; ; i++ {
		select {
		case <-stop:
			return c.write(ctx, "hang", func(tx *sql.Tx) error {
				b := increment("half", "b0000", last)
				if err := insertBackup(ctx, tx, b); err != nil {
					return err
				}
				fmt.Println("hangs")
				select {}
			})
		default:
		}
		b := increment(fmt.Sprintf("b%04d", i), "b0000", last)
		if err := c.CreateBackup(ctx, b, "virtbackup-"+b.ID, Step{Job: "j"}); err != nil {
			return err
		}
		if err := c.CommitBackup(ctx, b.ID, done(b)); err != nil {
			return err
		}
		last = b.ID
		fmt.Println(last)
	}
}

// TestKill kills a writer at any moment, and in the middle of a transaction:
// all that it was told is committed is there, and nothing half.
func TestKill(t *testing.T) {
	for round := range 6 {
		inTransaction := round%2 == 0
		t.Run(fmt.Sprintf("round %d", round), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "catalog.sqlite")
			c, err := Open(t.Context(), path)
			must(t, err)
			fixture(t, c)
			take(t, c, fullBackup("b0000"))
			must(t, c.Close())

			last := killWriter(t, path, rand.IntN(20)+1, inTransaction)
			c, err = Open(t.Context(), path)
			must(t, err)
			defer func() { must(t, c.Close()) }()
			checkInvariants(t, c)
			if b, err := c.Backup(t.Context(), last); err != nil || b.State != chain.Complete {
				t.Errorf("%s was acknowledged, and is %+v, %v", last, b, err)
			}
			if _, err := c.Backup(t.Context(), "half"); !errors.Is(err, ErrNotFound) {
				t.Errorf("a transaction that did not end left something: %v", err)
			}
		})
	}
}

// killWriter kills the child after it has told of so many commits, and returns the last.
func killWriter(t *testing.T, path string, commits int, inTransaction bool) (last string) {
	t.Helper()
	child := exec.CommandContext(t.Context(), os.Args[0])
	child.Env = append(os.Environ(), childVariable+"="+path)
	child.Stderr = os.Stderr
	stdin, err := child.StdinPipe()
	must(t, err)
	stdout, err := child.StdoutPipe()
	must(t, err)
	must(t, child.Start())
	lines := bufio.NewScanner(stdout)
	for n := 0; lines.Scan(); n++ {
		if lines.Text() == "hangs" {
			break
		}
		last = lines.Text()
		if n == commits {
			if !inTransaction {
				break
			}
			must(t, stdin.Close())
		}
	}
	must(t, child.Process.Kill())
	if err := child.Wait(); err == nil || last == "" {
		t.Fatalf("the child was not killed: %v, last %q", err, last)
	}
	return last
}
