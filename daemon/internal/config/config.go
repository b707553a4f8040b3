// Package config reads the daemon's settings from a TOML file. What it does not
// know or allow it refuses, with file and line: a setting that is silently
// ignored is worse than a daemon that does not start.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// DefaultPath is where the file is when nobody says otherwise.
const DefaultPath = "/etc/virtbackup/virtbackupd.toml"

// maximumFile bounds the file: a real one has a few lines.
const maximumFile = 1 << 20

// Config holds all settings. Load makes one.
type Config struct {
	Daemon       Daemon
	Libvirt      Libvirt
	Limits       Limits
	Jobs         Jobs
	Backup       Backup
	Restore      Restore
	Metrics      Metrics
	Retention    Retention
	Compression  Compression
	Validation   Validation
	Verification Verification
	Repositories Repositories

	sources map[string]string // of the settings in the file: "file:line"
}

// Daemon is the section [daemon].
type Daemon struct {
	StateDirectory   string
	RuntimeDirectory string
	LogLevel         Level
}

// Libvirt is the section [libvirt].
type Libvirt struct {
	URI          string
	AgentTimeout time.Duration // for one command to a guest agent
	HoldLimit    time.Duration // after which a frozen or suspended guest goes on, whatever happens
}

// Limits is the section [limits].
type Limits struct {
	ConcurrentBackups           int
	ConcurrentRestores          int
	ConcurrentCompressions      int
	ConcurrentValidations       int
	ConcurrentMaintenance       int
	ConcurrentJobsPerRepository int
	JobsPerUser                 int // unfinished jobs; root has no bound
	Queue                       int // waiting jobs
	BackupTimeout               time.Duration
	RestoreTimeout              time.Duration
	CompressionTimeout          time.Duration
	ValidationTimeout           time.Duration
	MaintenanceTimeout          time.Duration
	CPUWeight                   int // as systemd's CPUWeight=
	CPUQuota                    int // percent of one CPU; 0: no bound
	MemoryMax                   Size
	IOWeight                    int // as systemd's IOWeight=
	RatePerJob                  int // MB/s that it may read from guests' disks, and as much that it may write; 0: no bound
	RatePerRepository           int
	RatePerHost                 int
	MinimumFreeRepository       Size
	MinimumFreeScratch          Size
}

// Jobs is the section [jobs].
type Jobs struct {
	Attempts   int // of a job of a schedule, or of the daemon's own
	RetryDelay time.Duration
	StallLimit time.Duration
	Window     Spans
}

// Spans are spans of the week, as package window reads them.
type Spans []string

// Backup is the section [backup].
type Backup struct {
	ScratchDirectory string
}

// Restore is the section [restore].
type Restore struct {
	Destinations []string // directories below which a restore may write
}

// Metrics is the section [metrics].
type Metrics struct {
	Textfile string // path of the file that metrics are written to; "" for none
	Interval time.Duration
}

// Retention is the section [retention].
type Retention struct {
	MostAtOnce int // backups of one domain in one repository that go without somebody asking
}

// Compression is the section [compression], of backups that were made already.
type Compression struct {
	Enabled       bool // by itself
	Retries       int
	RetryInterval time.Duration
	Threads       int     // that compress one backup
	MinimumFree   float64 // of what the backup takes
	Rate          int     // MB/s that it may read, and as much that it may write; 0: no bound
}

// Verification is the section [verification], of backups that are read back by themselves.
type Verification struct {
	Enabled       bool
	Every         time.Duration // each chain
	BytesPerNight Size          // 0: as many as it takes
	Window        Spans
	Rate          int // MB/s that it may read; 0: no bound
}

// Validation is the section [validation], of backups that are tried by starting them.
type Validation struct {
	Enabled        bool          // by itself
	Interval       time.Duration // between two of the same backup
	Retries        int
	RetryInterval  time.Duration
	MemoryMax      Size          // of a temporary domain
	CPUs           int           // the same
	EndChain       bool          // of a backup that is not valid
	BootTimeout    time.Duration // for the guest agent to answer
	CommandTimeout time.Duration // for a command in the guest
	ScreenshotWait time.Duration // from the start of the guest
}

// Repositories is the section [repositories].
type Repositories struct {
	MountTimeout time.Duration // for mounting storage, and for unmounting it
	UnmountAfter time.Duration // that nobody has needed it
	LookEvery    time.Duration // at one that is in use, or was not online
	LookIdle     time.Duration // at any other
	HungAfter    time.Duration // that it has not answered
	SlowAfter    time.Duration // that it takes to write a little
}

// Setting is one setting as it is in effect.
type Setting struct {
	Key    string // "section.name"
	Value  string // as in the file
	Source string // "default" or "file:line"
	Help   string
}

// Default returns the settings of an empty file.
func Default() *Config {
	return &Config{
		Daemon:  Daemon{StateDirectory: "/var/lib/virtbackup", RuntimeDirectory: "/run/virtbackup", LogLevel: "info"},
		Libvirt: Libvirt{URI: "qemu:///system", AgentTimeout: 10 * time.Second, HoldLimit: 30 * time.Second},
		Limits: Limits{
			ConcurrentBackups: 2, ConcurrentRestores: 2, ConcurrentCompressions: 5, ConcurrentValidations: 1, ConcurrentMaintenance: 2,
			BackupTimeout: 12 * time.Hour, RestoreTimeout: 24 * time.Hour, CompressionTimeout: 8 * time.Hour,
			ValidationTimeout: 12 * time.Hour, MaintenanceTimeout: 12 * time.Hour,
			ConcurrentJobsPerRepository: 2, JobsPerUser: 20, Queue: 200,
			CPUWeight: 50, MemoryMax: 1 * gibibyte, IOWeight: 50,
			MinimumFreeRepository: 256 * mebibyte, MinimumFreeScratch: 256 * mebibyte,
		},
		Jobs:         Jobs{Attempts: 3, RetryDelay: time.Minute, StallLimit: 15 * time.Minute},
		Backup:       Backup{ScratchDirectory: "/var/lib/virtbackup/scratch"},
		Restore:      Restore{Destinations: []string{"/var/lib/libvirt/images"}},
		Metrics:      Metrics{Interval: time.Minute},
		Retention:    Retention{MostAtOnce: 20},
		Compression:  Compression{Enabled: true, Retries: 2, RetryInterval: time.Hour, Threads: 1, MinimumFree: 1},
		Validation:   Validation{Enabled: true, Interval: 24 * time.Hour, Retries: 2, RetryInterval: time.Hour, MemoryMax: 2 * gibibyte, CPUs: 2, EndChain: true, BootTimeout: 4 * time.Minute, CommandTimeout: time.Minute, ScreenshotWait: time.Minute},
		Verification: Verification{Enabled: true, Every: 30 * 24 * time.Hour},
		Repositories: Repositories{MountTimeout: 30 * time.Second, UnmountAfter: 5 * time.Minute, LookEvery: time.Minute, LookIdle: 10 * time.Minute, HungAfter: 20 * time.Second, SlowAfter: 5 * time.Second},
	}
}

// Load reads the settings at path; a file that is missing is an empty one. The
// error names all that is wrong, one line each.
func Load(path string) (*Config, error) {
	c := Default()
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read settings: %w", err)
	}
	if len(text) > maximumFile {
		return nil, fmt.Errorf("cannot read settings: %s is larger than 1 MiB", path)
	}
	if err := c.read(path, text); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Config) read(path string, text []byte) error {
	var document map[string]any
	meta, err := toml.NewDecoder(bytes.NewReader(text)).Decode(&document)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return fmt.Errorf("%s:%d: %s", path, pe.Position.Line, pe.Message)
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	c.sources = map[string]string{}
	var wrong []error
	for _, key := range meta.Keys() {
		if slices.ContainsFunc(wrong, func(err error) bool { return inside(err, key) }) {
			continue // its section was refused
		}
		if err := c.set(document, meta, key); err != nil {
			at := fmt.Sprintf("%s:%d", path, lineOf(text, key))
			wrong = append(wrong, &settingError{key: key, at: at, err: err})
			continue
		}
		if meta.Type(key...) != "Hash" {
			c.sources[key.String()] = fmt.Sprintf("%s:%d", path, lineOf(text, key))
		}
	}
	return errors.Join(wrong...)
}

// settingError is what is wrong at one place.
type settingError struct {
	key toml.Key
	at  string
	err error
}

func (e *settingError) Error() string { return e.at + ": " + e.err.Error() }
func (e *settingError) Unwrap() error { return e.err }

func inside(err error, key toml.Key) bool {
	var s *settingError
	return errors.As(err, &s) && len(s.key) < len(key) && slices.Equal(s.key, key[:len(s.key)])
}

// set takes one key of the file over.
func (c *Config) set(document map[string]any, meta toml.MetaData, key toml.Key) error {
	all := c.settings()
	name := key.String()
	if len(key) == 1 && slices.ContainsFunc(all, func(s setting) bool { return strings.HasPrefix(s.key, name+".") }) {
		if meta.Type(key...) == "Hash" {
			return nil
		}
		return fmt.Errorf("%q is a section: [%s]", name, name)
	}
	i := slices.IndexFunc(all, func(s setting) bool { return s.key == name })
	if i < 0 {
		return unknown(key, all)
	}
	section, _ := document[key[0]].(map[string]any)
	if err := all[i].set(section[key[1]]); err != nil {
		return fmt.Errorf("%s: %w; allowed: %s", name, err, all[i].allowed)
	}
	return nil
}

// Effective returns all settings with their values and where these are from.
func Effective(c *Config) []Setting {
	var list []Setting
	for _, s := range c.settings() {
		source, ok := c.sources[s.key]
		if !ok {
			source = "default"
		}
		list = append(list, Setting{Key: s.key, Value: s.get(), Source: source, Help: s.help})
	}
	return list
}

// lineOf returns the line on which the key is set. Only the TOML library knows,
// and it tells with an error: so it is made to decode into a value at that
// place that refuses everything.
func lineOf(text []byte, key toml.Key) int {
	at := reflect.TypeFor[refuser]()
	for _, part := range slices.Backward(key) {
		at = reflect.StructOf([]reflect.StructField{{Name: "X", Type: at, Tag: reflect.StructTag(fmt.Sprintf("toml:%q", part))}})
	}
	_, err := toml.NewDecoder(bytes.NewReader(text)).Decode(reflect.New(at).Interface())
	var pe toml.ParseError
	if errors.As(err, &pe) {
		return pe.Position.Line
	}
	return 1
}

type refuser struct{}

func (*refuser) UnmarshalTOML(any) error { return errors.New("refused") }
