// Package metrics writes what is known of backups in Prometheus' text format
// (https://prometheus.io/docs/instrumenting/exposition_formats/). All names are here.
//
// There is a series for each domain and each repository, and a few more: how
// many backups there are makes no difference.
package metrics

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Snapshot is what there is at one moment.
type Snapshot struct {
	Version          string
	Started          time.Time
	LibvirtConnected bool
	Domains          []Domain
	Repositories     []Repository
	Operations       []string // that there may be jobs of
	Live             []Live
	Ended            []Ended
	Validations      []Validations
}

// Validations is how many of the backups that are kept were tried with a result.
type Validations struct {
	Result  string
	Backups int
}

// Domain is one domain.
type Domain struct {
	UUID, Name  string
	Offering    string // "" for none
	Protection  string
	LastSuccess time.Time // zero for none
	// Tried tells whether a backup succeeded or failed at all, and Failed whether the last did.
	Tried, Failed bool
	Backups       int
	Stored        uint64 // bytes
	Protected     uint64 // bytes
}

// Repository is one repository.
type Repository struct {
	Name, Type  string
	State       string
	Free, Total uint64 // bytes
	Backups     int
	Stored      uint64 // bytes
}

// Live is how many jobs of an operation are in a state that is not final.
type Live struct {
	Operation, State string
	Jobs             int
}

// Ended is how many jobs of an operation have ended so since the daemon started,
// and how long they took.
type Ended struct {
	Operation, Result string
	Jobs              uint64
	Took              time.Duration
}

// Text writes the metrics.
func (s Snapshot) Text() string {
	w := &writer{}
	s.daemon(w)
	s.domains(w)
	s.repositories(w)
	s.jobs(w)
	s.validations(w)
	return w.String()
}

func (s Snapshot) daemon(w *writer) {
	w.family("virtbackup_build_info", gauge, "The version of virtbackupd, which serves when this is there.")
	w.sample(1, "version", s.Version)
	w.family("virtbackup_start_time_seconds", gauge, "When virtbackupd was started, since the epoch.")
	w.sample(seconds(s.Started))
	w.family("virtbackup_libvirt_connected", gauge, "Whether libvirt answers (1).")
	w.sample(truth(s.LibvirtConnected))
}

func (s Snapshot) domains(w *writer) {
	each := func(name, help string, value func(Domain) (float64, bool)) {
		w.family(name, gauge, help)
		for _, d := range s.Domains {
			if v, known := value(d); known {
				w.sample(v, "domain", d.Name, "uuid", d.UUID)
			}
		}
	}
	w.family("virtbackup_domain_info", gauge, "The offering of each domain that is known, empty for none; always 1.")
	for _, d := range s.Domains {
		w.sample(1, "domain", d.Name, "uuid", d.UUID, "offering", d.Offering)
	}
	w.family("virtbackup_domain_protection", gauge, "How the domain is protected: only the series with the present word is there; always 1.")
	for _, d := range s.Domains {
		w.sample(1, "domain", d.Name, "uuid", d.UUID, "protection", d.Protection)
	}
	each("virtbackup_domain_last_success_timestamp_seconds", "When the newest good backup was made, since the epoch; there if there is one.",
		func(d Domain) (float64, bool) { return seconds(d.LastSuccess), !d.LastSuccess.IsZero() })
	each("virtbackup_domain_last_backup_succeeded", "Whether the last backup that was tried succeeded (1) or failed (0); there if one was.",
		func(d Domain) (float64, bool) { return truth(!d.Failed), d.Tried })
	each("virtbackup_domain_backups", "Backups that are kept of the domain.", func(d Domain) (float64, bool) { return float64(d.Backups), true })
	each("virtbackup_domain_stored_bytes", "What the domain's backups take in all repositories.",
		func(d Domain) (float64, bool) { return float64(d.Stored), true })
	each("virtbackup_domain_protected_bytes", "The size of the disks that the newest good backup would bring back.",
		func(d Domain) (float64, bool) { return float64(d.Protected), true })
}

func (s Snapshot) repositories(w *writer) {
	each := func(name, help string, value func(Repository) float64) {
		w.family(name, gauge, help)
		for _, r := range s.Repositories {
			w.sample(value(r), "repository", r.Name)
		}
	}
	w.family("virtbackup_repository_state", gauge, "How the repository is: only the series with the present word is there; always 1.")
	for _, r := range s.Repositories {
		w.sample(1, "repository", r.Name, "type", r.Type, "state", r.State)
	}
	each("virtbackup_repository_free_bytes", "What was free when the repository was last looked at.", func(r Repository) float64 { return float64(r.Free) })
	each("virtbackup_repository_total_bytes", "The size of its file system.", func(r Repository) float64 { return float64(r.Total) })
	each("virtbackup_repository_backups", "Backups that are kept in it.", func(r Repository) float64 { return float64(r.Backups) })
	each("virtbackup_repository_stored_bytes", "What these backups take.", func(r Repository) float64 { return float64(r.Stored) })
}

func (s Snapshot) jobs(w *writer) {
	w.family("virtbackup_jobs", gauge, "Jobs that have not ended.")
	for _, operation := range s.Operations {
		for _, state := range []string{"queued", "running", "cancelling"} {
			i := slices.IndexFunc(s.Live, func(l Live) bool { return l.Operation == operation && l.State == state })
			n := 0
			if i >= 0 {
				n = s.Live[i].Jobs
			}
			w.sample(float64(n), "operation", operation, "state", state)
		}
	}
	w.family("virtbackup_job_duration_seconds", summary, "Jobs that ended since virtbackupd was started, and how long they took together.")
	ended := slices.Clone(s.Ended)
	slices.SortFunc(ended, func(a, b Ended) int {
		return cmp.Or(cmp.Compare(a.Operation, b.Operation), cmp.Compare(a.Result, b.Result))
	})
	for _, e := range ended {
		w.part("_sum", e.Took.Seconds(), "operation", e.Operation, "result", e.Result)
		w.part("_count", float64(e.Jobs), "operation", e.Operation, "result", e.Result)
	}
}

func (s Snapshot) validations(w *writer) {
	w.family("virtbackup_validated_backups", gauge, "Backups that are kept, by the result of trying them the last time; those that never were are left out.")
	for _, v := range s.Validations {
		w.sample(float64(v.Backups), "result", v.Result)
	}
}

func seconds(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMicro()) / 1e6
}

func truth(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// Types of metrics.
const (
	gauge   = "gauge"
	summary = "summary"
)

// writer knows the format.
type writer struct {
	strings.Builder
	name string // of the family
}

// family begins a family of metrics; its samples follow.
func (w *writer) family(name, kind, help string) {
	w.name = name
	w.WriteString("# HELP " + name + " " + escape(help, false) + "\n# TYPE " + name + " " + kind + "\n")
}

// sample writes a sample; labels are names and values.
func (w *writer) sample(value float64, labels ...string) { w.part("", value, labels...) }

// part writes a sample of a family whose samples have names with a suffix.
func (w *writer) part(suffix string, value float64, labels ...string) {
	w.WriteString(w.name + suffix)
	for i := 0; i < len(labels); i += 2 {
		if i == 0 {
			w.WriteByte('{')
		} else {
			w.WriteByte(',')
		}
		w.WriteString(labels[i] + `="` + escape(labels[i+1], true) + `"`)
	}
	if len(labels) > 0 {
		w.WriteByte('}')
	}
	w.WriteString(" " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
}

// escape makes a text safe; names of domains are any characters. The format is in UTF-8.
func escape(text string, quoted bool) string {
	text = strings.NewReplacer(`\`, `\\`, "\n", `\n`).Replace(strings.ToValidUTF8(text, "\uFFFD"))
	if quoted {
		text = strings.ReplaceAll(text, `"`, `\"`)
	}
	return text
}
