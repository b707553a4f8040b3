package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

func load(t *testing.T, text string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "virtbackupd.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(path)
	if err != nil && c != nil {
		t.Error("both settings and an error")
	}
	return c, err
}

func TestMissingFileIsDefaults(t *testing.T) {
	c, err := Load(filepath.Join(t.TempDir(), "none.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), c, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Error(diff)
	}
	for _, s := range Effective(c) {
		if s.Source != "default" || s.Value == "" || s.Help == "" {
			t.Errorf("got %+v", s)
		}
	}
}

func TestDefaultsAreAllowed(t *testing.T) {
	for _, s := range Default().settings() {
		if err := s.check(); err != nil {
			t.Errorf("%s: %v", s.key, err)
		}
	}
}

func TestLoad(t *testing.T) {
	c, err := load(t, `# all kinds of values
limits.memory_max = "1GiB"
[daemon]
log_level = "debug"
state_directory = "/srv/state"

[libvirt]
agent_timeout = "1m30s"

[restore]
destinations = [
  "/srv/a/",
  "/srv/b",
]
`)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Limits.MemoryMax = 1 << 30
	want.Daemon.LogLevel = "debug"
	want.Daemon.StateDirectory = "/srv/state"
	want.Libvirt.AgentTimeout = 90 * time.Second
	want.Restore.Destinations = []string{"/srv/a", "/srv/b"}
	if diff := cmp.Diff(want, c, cmpopts.IgnoreUnexported(Config{})); diff != "" {
		t.Error(diff)
	}
	if c.Daemon.LogLevel.Slog() != slog.LevelDebug {
		t.Error("level is not debug")
	}
	sources := map[string]string{}
	for _, s := range Effective(c) {
		if s.Source != "default" {
			_, line, _ := strings.Cut(s.Source, ".toml:")
			sources[s.Key] = line
		}
	}
	wantSources := map[string]string{"limits.memory_max": "2", "daemon.log_level": "4", "daemon.state_directory": "5",
		"libvirt.agent_timeout": "8", "restore.destinations": "11"}
	if diff := cmp.Diff(wantSources, sources); diff != "" {
		t.Error(diff)
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"syntax":               {"[daemon]\nlog_level = \n", ":2: "},
		"twice":                {"[daemon]\nlog_level = \"info\"\nlog_level = \"info\"\n", ":3: "},
		"misspelt key":         {"[limits]\n\nconcurent_backups = 3", `:3: unknown setting "limits.concurent_backups"; did you mean "limits.concurrent_backups"?`},
		"wrong section":        {"[daemon]\nuri = \"qemu:///system\"", `:2: unknown setting "daemon.uri"; did you mean "libvirt.uri"?`},
		"misspelt section":     {"\n[limit]\nqueue = 3", `:2: unknown setting "limit"; did you mean "[limits]"?`},
		"key without section":  {"queue = 3", `:1: unknown setting "queue"`},
		"other case":           {"[daemon]\nLog_Level = \"info\"", `:2: unknown setting "daemon.Log_Level"; did you mean "daemon.log_level"?`},
		"quoted dots":          {`"daemon.log_level" = "info"`, `unknown setting "\"daemon.log_level\""`},
		"nothing like it":      {"[limits]\nzzzzzzzzzzzzzzzzzz = 1", `:2: unknown setting "limits.zzzzzzzzzzzzzzzzzz"`},
		"section as a value":   {"limits = 3", `:1: "limits" is a section: [limits]`},
		"section as a list":    {"[[limits]]\nqueue = 3", `:1: "limits" is a section: [limits]`},
		"deeper":               {"[limits.queue]\nx = 3", `:1: limits.queue: not a whole number; allowed: 1 to 100000`},
		"level":                {"[daemon]\nlog_level = \"loud\"", `:2: daemon.log_level: "loud" is not a level; allowed: debug, info, warning, error`},
		"string for a number":  {"[limits]\nqueue = \"3\"", `:2: limits.queue: not a whole number; allowed: 1 to 100000`},
		"fraction":             {"[limits]\nqueue = 3.5", `:2: limits.queue: not a whole number`},
		"zero":                 {"[limits]\nqueue = 0", `:2: limits.queue: out of range; allowed: 1 to 100000`},
		"negative":             {"[limits]\ncpu_weight = -1", `:2: limits.cpu_weight: out of range; allowed: 1 to 10000`},
		"size without unit":    {"[limits]\nmemory_max = \"256\"", `:2: limits.memory_max: "256" is not a size; allowed: a size of at least "128MiB"`},
		"size as a number":     {"[limits]\nmemory_max = 1073741824", `:2: limits.memory_max: not a string`},
		"decimal unit":         {"[limits]\nmemory_max = \"256MB\"", `is not a size`},
		"negative size":        {"[limits]\nminimum_free_scratch = \"-1MiB\"", `is not a size`},
		"huge size":            {"[limits]\nminimum_free_scratch = \"99999999999TiB\"", `is not a size`},
		"small memory":         {"[limits]\nmemory_max = \"1MiB\"", `:2: limits.memory_max: too small`},
		"time without unit":    {"[libvirt]\nhold_limit = \"30\"", `:2: libvirt.hold_limit: "30" is not a time; allowed: a time from "1s" to "10m0s"`},
		"infinite":             {"[libvirt]\nagent_timeout = \"-1s\"", `:2: libvirt.agent_timeout: out of range`},
		"relative path":        {"[daemon]\nstate_directory = \"state\"", `:2: daemon.state_directory: "state" is not a usable directory; allowed: an absolute path`},
		"empty path":           {"[daemon]\nruntime_directory = \"\"", `:2: daemon.runtime_directory: "" is not a usable directory`},
		"up":                   {"[backup]\nscratch_directory = \"/var/../etc\"", `:2: backup.scratch_directory: "/var/../etc" is not a usable directory`},
		"newline in a path":    {"[backup]\nscratch_directory = \"/a\\nb\"", `:2: backup.scratch_directory: "/a\nb" is not a usable directory`},
		"root as destination":  {"[restore]\ndestinations = [\"/srv\", \"/\"]", `:2: restore.destinations: "/" is not a usable directory`},
		"up as destination":    {"[restore]\ndestinations = [\"/srv/..\"]", `:2: restore.destinations: "/srv/.." is not a usable directory`},
		"destinations, mixed":  {"[restore]\ndestinations = [\"/srv\", 3]", `:2: restore.destinations: not a list of strings`},
		"destination, no list": {"[restore]\ndestinations = \"/srv\"", `:2: restore.destinations: not a list`},
		"no window":            {"[jobs]\nwindow = [\"22-06\"]", `:2: jobs.window: "22-06" is not a window`},
		"window, no list":      {"[jobs]\nwindow = \"22:00-06:00\"", `:2: jobs.window: not a list`},
		"remote libvirt":       {"[libvirt]\nuri = \"qemu+ssh://root@host/system\"", `:2: libvirt.uri: "qemu+ssh://root@host/system" is not a usable connection`},
		"command in the URI":   {"[libvirt]\nuri = \"qemu:///system?command=/tmp/x\"", `is not a usable connection`},
		"other hypervisor":     {"[libvirt]\nuri = \"test:///default\"", `is not a usable connection`},
	} {
		if _, err := load(t, c.text); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", name, err, c.want)
		}
	}
}

func TestAllMistakesAtOnce(t *testing.T) {
	_, err := load(t, "[limits]\nqueue = 0\nqeue = 1\n[nothing]\na = 1\nb = 2\n")
	if err == nil {
		t.Fatal("accepted")
	}
	if lines := strings.Split(err.Error(), "\n"); len(lines) != 3 {
		t.Errorf("%d lines instead of one for each mistake:\n%v", len(lines), err)
	}
}

func TestHugeFile(t *testing.T) {
	if _, err := load(t, strings.Repeat("# nothing\n", maximumFile/10+1)); err == nil {
		t.Error("accepted")
	}
}

// TestEffectiveIsAFile writes what is in effect to a file, which gives the same
// settings: so values are shown as they are to be written.
func TestEffectiveIsAFile(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		c := Default()
		c.Limits.Queue = rapid.IntRange(1, 100000).Draw(rt, "queue")
		c.Limits.MinimumFreeScratch = Size(rapid.Uint64Range(0, 1<<60).Draw(rt, "size"))
		c.Limits.MinimumFreeRepository = Size(rapid.Uint64Range(0, 1<<20).Draw(rt, "whole") << 20)
		c.Libvirt.HoldLimit = time.Duration(rapid.Int64Range(int64(time.Second), int64(10*time.Minute)).Draw(rt, "time"))
		c.Daemon.StateDirectory = "/" + rapid.StringMatching(`[a-zäß"\\ ]{1,10}`).Draw(rt, "path")
		c.Jobs.Window = rapid.SampledFrom([]Spans{nil, {"Mon..Fri 22:00-06:00", "00:00-24:00"}}).Draw(rt, "window")
		var text strings.Builder
		for _, s := range Effective(c) {
			text.WriteString(s.Key + " = " + s.Value + "\n")
		}
		again, err := load(t, text.String())
		if err != nil {
			rt.Fatalf("%v in\n%s", err, text.String())
		}
		if diff := cmp.Diff(c, again, cmpopts.IgnoreUnexported(Config{}), cmpopts.EquateEmpty()); diff != "" {
			rt.Fatal(diff)
		}
	})
}

// TestEveryFieldIsASetting finds a field that was forgotten in the list.
func TestEveryFieldIsASetting(t *testing.T) {
	c := Default()
	var places []any
	for section := range reflect.ValueOf(c).Elem().NumField() {
		if f := reflect.ValueOf(c).Elem().Field(section); f.Kind() == reflect.Struct {
			for i := range f.NumField() {
				places = append(places, f.Field(i).Addr().Interface())
			}
		}
	}
	for _, s := range c.settings() {
		i := slices.Index(places, s.to)
		if i < 0 {
			t.Errorf("%s has no place of its own", s.key)
			continue
		}
		places = slices.Delete(places, i, i+1)
	}
	if len(places) > 0 {
		t.Errorf("%d fields have no key", len(places))
	}
}

func FuzzRead(f *testing.F) {
	f.Add("[daemon]\nlog_level = \"info\"")
	f.Add("[[limits]]\n'a,b'.\"\".c = {x=1}")
	f.Fuzz(func(t *testing.T, text string) {
		c := Default()
		if err := c.read("f", []byte(text)); err != nil {
			return
		}
		for _, s := range c.settings() {
			if err := s.check(); err != nil {
				t.Errorf("%s: %v", s.key, err)
			}
		}
		var document map[string]any
		if err := toml.Unmarshal([]byte(text), &document); err != nil {
			t.Errorf("accepted what is no TOML: %v", err)
		}
	})
}
