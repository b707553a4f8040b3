package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// series is one line of the format, read back.
type series struct {
	name   string
	labels [][2]string
	value  float64
}

var (
	metricName = regexp.MustCompile(`^virtbackup_[a-z0-9_]+$`)
	labelName  = regexp.MustCompile(`^[a-z][a-z0-9_]*`)
)

// parse reads the text format, and takes no more than the format allows: each
// family has its HELP and TYPE first, and all its samples in one place, none twice.
func parse(text string) (all []series, err error) {
	if text != "" && !strings.HasSuffix(text, "\n") {
		return nil, errors.New("the last line does not end")
	}
	families, seen := map[string]bool{}, map[string]bool{}
	name, kind := "", ""
	for number, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		wrong := func(what string) error { return fmt.Errorf("line %d: %s: %q", number+1, what, line) }
		if rest, ok := strings.CutPrefix(line, "# HELP "); ok {
			var help string
			name, help, _ = strings.Cut(rest, " ")
			if kind = ""; families[name] || !metricName.MatchString(name) || help == "" {
				return nil, wrong("this is no help, or the family was there")
			}
			families[name] = true
			continue
		}
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			of, what, _ := strings.Cut(rest, " ")
			if of != name || kind != "" || what != "gauge" && what != "summary" && what != "counter" {
				return nil, wrong("this is no type")
			}
			kind = what
			continue
		}
		s, err := parseSample(line)
		if err != nil {
			return nil, wrong(err.Error())
		}
		of := s.name
		if kind == "summary" {
			of = strings.TrimSuffix(strings.TrimSuffix(of, "_sum"), "_count")
		}
		if of != name || kind == "" || kind == "summary" && of == s.name {
			return nil, wrong("it is not of the family " + name)
		}
		if key := fmt.Sprint(s.name, s.labels); seen[key] {
			return nil, wrong("it is there twice")
		} else {
			seen[key] = true
		}
		all = append(all, s)
	}
	return all, nil
}

func parseSample(line string) (s series, err error) {
	end := strings.IndexAny(line, "{ ")
	if end < 0 {
		return s, errors.New("no value")
	}
	s.name, line = line[:end], line[end:]
	if line[0] == '{' {
		for sep := byte('{'); line[0] == sep; sep = ',' {
			name := labelName.FindString(line[1:])
			rest, ok := strings.CutPrefix(line[1+len(name):], `="`)
			if name == "" || !ok {
				return s, errors.New("no label")
			}
			var value strings.Builder
			i := 0
			for ; i < len(rest) && rest[i] != '"'; i++ {
				if rest[i] != '\\' {
					value.WriteByte(rest[i])
					continue
				}
				i++
				plain, ok := map[byte]byte{'\\': '\\', '"': '"', 'n': '\n'}[rest[i]]
				if !ok {
					return s, errors.New("no escape")
				}
				value.WriteByte(plain)
			}
			if i == len(rest) {
				return s, errors.New("a label does not end")
			}
			s.labels = append(s.labels, [2]string{name, value.String()})
			line = rest[i+1:]
		}
		if line[0] != '}' {
			return s, errors.New("labels do not end")
		}
		line = line[1:]
	}
	number, ok := strings.CutPrefix(line, " ")
	if s.value, err = strconv.ParseFloat(number, 64); err != nil || !ok {
		return s, errors.New("no number")
	}
	return s, nil
}

func TestText(t *testing.T) {
	at := time.UnixMicro(1_700_000_000_500_000)
	var c Counter
	c.Count("backup", "succeeded", 2*time.Second)
	c.Count("backup", "succeeded", 1500*time.Millisecond)
	c.Count("backup", "failed", -time.Hour)
	s := Snapshot{
		Version: "1.0", Started: at, LibvirtConnected: true, Operations: []string{"backup", "check"},
		Domains: []Domain{
			{UUID: "u1", Name: `we"b\`, Offering: "gold", Protection: "protected", LastSuccess: at, Tried: true, Backups: 2, Stored: 1 << 40, Protected: 5},
			{UUID: "u2", Name: "new", Protection: "unassigned"},
		},
		Repositories: []Repository{{Name: "nas", Type: "dir", State: "ready", Free: 10, Total: 20, Backups: 2, Stored: 7}},
		Live:         []Live{{"backup", "running", 3}},
		Ended:        c.Ended(),
		Validations:  []Validations{{"valid", 4}, {"not-valid", 0}},
	}
	want := `# HELP virtbackup_build_info The version of virtbackupd, which serves when this is there.
# TYPE virtbackup_build_info gauge
virtbackup_build_info{version="1.0"} 1
# HELP virtbackup_start_time_seconds When virtbackupd was started, since the epoch.
# TYPE virtbackup_start_time_seconds gauge
virtbackup_start_time_seconds 1.7000000005e+09
# HELP virtbackup_libvirt_connected Whether libvirt answers (1).
# TYPE virtbackup_libvirt_connected gauge
virtbackup_libvirt_connected 1
# HELP virtbackup_domain_info The offering of each domain that is known, empty for none; always 1.
# TYPE virtbackup_domain_info gauge
virtbackup_domain_info{domain="we\"b\\",uuid="u1",offering="gold"} 1
virtbackup_domain_info{domain="new",uuid="u2",offering=""} 1
# HELP virtbackup_domain_protection How the domain is protected: only the series with the present word is there; always 1.
# TYPE virtbackup_domain_protection gauge
virtbackup_domain_protection{domain="we\"b\\",uuid="u1",protection="protected"} 1
virtbackup_domain_protection{domain="new",uuid="u2",protection="unassigned"} 1
# HELP virtbackup_domain_last_success_timestamp_seconds When the newest good backup was made, since the epoch; there if there is one.
# TYPE virtbackup_domain_last_success_timestamp_seconds gauge
virtbackup_domain_last_success_timestamp_seconds{domain="we\"b\\",uuid="u1"} 1.7000000005e+09
# HELP virtbackup_domain_last_backup_succeeded Whether the last backup that was tried succeeded (1) or failed (0); there if one was.
# TYPE virtbackup_domain_last_backup_succeeded gauge
virtbackup_domain_last_backup_succeeded{domain="we\"b\\",uuid="u1"} 1
# HELP virtbackup_domain_backups Backups that are kept of the domain.
# TYPE virtbackup_domain_backups gauge
virtbackup_domain_backups{domain="we\"b\\",uuid="u1"} 2
virtbackup_domain_backups{domain="new",uuid="u2"} 0
# HELP virtbackup_domain_stored_bytes What the domain's backups take in all repositories.
# TYPE virtbackup_domain_stored_bytes gauge
virtbackup_domain_stored_bytes{domain="we\"b\\",uuid="u1"} 1.099511627776e+12
virtbackup_domain_stored_bytes{domain="new",uuid="u2"} 0
# HELP virtbackup_domain_protected_bytes The size of the disks that the newest good backup would bring back.
# TYPE virtbackup_domain_protected_bytes gauge
virtbackup_domain_protected_bytes{domain="we\"b\\",uuid="u1"} 5
virtbackup_domain_protected_bytes{domain="new",uuid="u2"} 0
# HELP virtbackup_repository_state How the repository is: only the series with the present word is there; always 1.
# TYPE virtbackup_repository_state gauge
virtbackup_repository_state{repository="nas",type="dir",state="ready"} 1
# HELP virtbackup_repository_free_bytes What was free when the repository was last looked at.
# TYPE virtbackup_repository_free_bytes gauge
virtbackup_repository_free_bytes{repository="nas"} 10
# HELP virtbackup_repository_total_bytes The size of its file system.
# TYPE virtbackup_repository_total_bytes gauge
virtbackup_repository_total_bytes{repository="nas"} 20
# HELP virtbackup_repository_backups Backups that are kept in it.
# TYPE virtbackup_repository_backups gauge
virtbackup_repository_backups{repository="nas"} 2
# HELP virtbackup_repository_stored_bytes What these backups take.
# TYPE virtbackup_repository_stored_bytes gauge
virtbackup_repository_stored_bytes{repository="nas"} 7
# HELP virtbackup_jobs Jobs that have not ended.
# TYPE virtbackup_jobs gauge
virtbackup_jobs{operation="backup",state="queued"} 0
virtbackup_jobs{operation="backup",state="running"} 3
virtbackup_jobs{operation="backup",state="cancelling"} 0
virtbackup_jobs{operation="check",state="queued"} 0
virtbackup_jobs{operation="check",state="running"} 0
virtbackup_jobs{operation="check",state="cancelling"} 0
# HELP virtbackup_job_duration_seconds Jobs that ended since virtbackupd was started, and how long they took together.
# TYPE virtbackup_job_duration_seconds summary
virtbackup_job_duration_seconds_sum{operation="backup",result="failed"} 0
virtbackup_job_duration_seconds_count{operation="backup",result="failed"} 1
virtbackup_job_duration_seconds_sum{operation="backup",result="succeeded"} 3.5
virtbackup_job_duration_seconds_count{operation="backup",result="succeeded"} 2
# HELP virtbackup_validated_backups Backups that are kept, by the result of trying them the last time; those that never were are left out.
# TYPE virtbackup_validated_backups gauge
virtbackup_validated_backups{result="valid"} 4
virtbackup_validated_backups{result="not-valid"} 0
`
	if diff := cmp.Diff(want, s.Text()); diff != "" {
		t.Error(diff)
	}
	if all, err := parse(s.Text()); err != nil || len(all) != strings.Count(want, "\n")-2*strings.Count(want, "# HELP ") {
		t.Error(len(all), err)
	}
}

// TestAnyNamesAreReadBack has names of any bytes.
func TestAnyNamesAreReadBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := string(rapid.SliceOf(rapid.OneOf(rapid.SampledFrom([]byte("\"\\\n{}=, \xff#ä")), rapid.Byte())).Draw(t, "name"))
		stored := rapid.Uint64().Draw(t, "stored")
		all, err := parse(Snapshot{Domains: []Domain{{UUID: "u", Name: name, Stored: stored}}}.Text())
		if err != nil {
			t.Fatal(err)
		}
		want := strings.ToValidUTF8(name, "�")
		found := false
		for _, s := range all {
			if s.name == "virtbackup_domain_stored_bytes" {
				found = true
				if s.labels[0] != [2]string{"domain", want} || math.Abs(s.value-float64(stored)) > 0 {
					t.Fatalf("%q, %d became %q, %g", name, stored, s.labels, s.value)
				}
			}
		}
		if !found {
			t.Fatal("the domain is not there")
		}
	})
}

func TestParserIsStrict(t *testing.T) {
	const head = "# HELP virtbackup_a x\n# TYPE virtbackup_a gauge\n"
	for _, text := range []string{
		"virtbackup_a 1\n", "# TYPE virtbackup_a gauge\nvirtbackup_a 1\n", head + "virtbackup_b 1\n", head + "virtbackup_a 1", head + "virtbackup_a x\n",
		head + "virtbackup_a 1\nvirtbackup_a 2\n", head + `virtbackup_a{b="c} 1` + "\n", head + `virtbackup_a{b="\x"} 1` + "\n",
		head + `virtbackup_a{b="c",} 1` + "\n", head + head, head + "virtbackup_a_sum 1\n",
	} {
		if _, err := parse(text); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
	if _, err := parse(head + `virtbackup_a{b="c",d="\\\"\n"} 1e3` + "\n"); err != nil {
		t.Error(err)
	}
}

func TestTextfile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "virtbackup.prom")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told := 0
	file := Textfile{
		Settings: func() (string, time.Duration) { return path, time.Millisecond },
		Text: func(context.Context) (string, error) {
			if told++; told == 3 {
				cancel()
			}
			return fmt.Sprintf("# %d\n", told), nil
		},
		Log: slog.New(slog.DiscardHandler),
	}
	file.Run(ctx)
	got, err := os.ReadFile(path)
	info, failed := os.Stat(path)
	if string(got) != "# 3\n" || err != nil || failed != nil || info.Mode() != 0o644 {
		t.Error(string(got), err, failed)
	}
	path = filepath.Join(t.TempDir(), "no", "directory", "x.prom")
	if err := file.write(t.Context(), path); err == nil {
		t.Error("it is written to no directory")
	}
	all, err := os.ReadDir(filepath.Dir(filepath.Dir(path)))
	if err == nil || len(all) > 0 {
		t.Error(all, err)
	}
}
