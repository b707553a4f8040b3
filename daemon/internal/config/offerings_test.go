package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/virtbackup/virtbackup/dbus"
)

func loadOfferings(t *testing.T, files map[string]string) []OfferingFile {
	t.Helper()
	directory := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(directory, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all, err := LoadOfferings(directory)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestOfferingsOfNoDirectory(t *testing.T) {
	if all, err := LoadOfferings(filepath.Join(t.TempDir(), "none")); err != nil || all != nil {
		t.Errorf("%v, %v", all, err)
	}
}

func TestOfferingFile(t *testing.T) {
	all := loadOfferings(t, map[string]string{
		"gold.toml": `# for those who pay
description = "every 12 hours, the last 14"
repository = "nas"
users = ["ann", "@ops"]
allow_user_backups = false
compression = "zstd"
compression_level = 5
exclude_disks = []
keep_last = 14
`,
		"gold.toml~": "broken", ".hidden.toml": "broken", "README": "broken",
	})
	want := dbus.UpdateOfferingOptions{
		Repository: new("nas"),
		OfferingOptions: dbus.OfferingOptions{
			Description: new("every 12 hours, the last 14"), Users: new([]string{"ann", "@ops"}),
			Overrides: dbus.Overrides{
				Settings:  dbus.Settings{Compression: new(dbus.CompressionZstd), CompressionLevel: new(uint32(5)), ExcludeDisks: new([]string{})},
				Retention: dbus.Retention{KeepLast: new(uint32(14))},
				Rights:    dbus.Rights{AllowUserBackups: new(false)},
			},
		},
	}
	if len(all) != 1 || all[0].Name != "gold" || all[0].Err != nil || filepath.Base(all[0].Path) != "gold.toml" {
		t.Fatalf("%+v", all)
	}
	if diff := cmp.Diff(want, all[0].Options); diff != "" {
		t.Error(diff)
	}
}

func TestWrongOfferingFiles(t *testing.T) {
	for text, want := range map[string]string{
		"repository = ":                                     "x.toml:1: ",
		"mode = \"full\"":                                   "x.toml: it says no repository",
		"repository = \"nas\"\nmode = \"odd\"":              `x.toml:2: option "mode": "odd" is none of full, incremental`,
		"repository = \"nas\"\n\nmoode = \"full\"":          `x.toml:3: unknown option "moode"`,
		"repository = 3":                                    `x.toml:1: option "repository": 3 is not expected`,
		"repository = \"nas\"\nthreads = -1":                `x.toml:2: option "threads": -1 is not expected`,
		"repository = \"nas\"\nthreads = 4294967296":        `x.toml:2: option "threads": 4294967296`,
		"repository = \"nas\"\nthreads = 1.5":               `x.toml:2: option "threads": 1.5`,
		"repository = \"nas\"\nthreads = \"1\"":             `x.toml:2: option "threads": its type is "s"`,
		"repository = \"nas\"\nusers = \"ann\"":             `x.toml:2: option "users": its type is "s"`,
		"repository = \"nas\"\nusers = [\"ann\", 3]":        `x.toml:2: option "users": [ann 3] is not a list of strings`,
		"repository = \"nas\"\ndisabled = \"yes\"":          `x.toml:2: option "disabled": its type is "s"`,
		"repository = \"nas\"\n[keep]\nlast = 3\nother = 4": `x.toml:2: unknown option "keep"`,
	} {
		all := loadOfferings(t, map[string]string{"x.toml": text})
		if len(all) != 1 || all[0].Err == nil || !strings.Contains(all[0].Err.Error(), want) || strings.Count(all[0].Err.Error(), "\n") > 0 {
			t.Errorf("%q: %+v, and not %s", text, all, want)
		}
	}
	all := loadOfferings(t, map[string]string{"x.toml": "mode = 1\nthreads = true\n", "y.toml": "repository = \"nas\""})
	if len(all) != 2 || strings.Count(all[0].Err.Error(), "\n") != 1 || all[1].Err != nil {
		t.Errorf("%+v", all)
	}
}

func TestWhatIsNoFileIsNoOffering(t *testing.T) {
	directory := t.TempDir()
	if err := os.Mkdir(filepath.Join(directory, "a.toml"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere", filepath.Join(directory, "b.toml")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(directory, "c.toml"), []byte(strings.Repeat("# nothing\n", maximumFile/10+1)), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := LoadOfferings(directory)
	if err != nil || len(all) != 3 {
		t.Fatalf("%+v, %v", all, err)
	}
	for _, f := range all {
		if f.Err == nil {
			t.Errorf("%s is taken", f.Path)
		}
	}
}

// TestManPageOfOfferingsHasEveryKey finds a setting that was forgotten there.
func TestManPageOfOfferingsHasEveryKey(t *testing.T) {
	page, err := os.ReadFile("../../virtbackup-offering.5")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range dbus.OptionKeys(dbus.UpdateOfferingOptions{}) {
		if !strings.Contains(string(page), key) {
			t.Errorf("the page does not have %s", key)
		}
	}
}
