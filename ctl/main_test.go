package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/virtbackup/virtbackup/dbus"
)

// runWith runs a command line without a daemon.
func runWith(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+t.TempDir()+"/nobody")
	var out, errs bytes.Buffer
	a := &app{in: strings.NewReader(""), out: &out, err: &errs, getenv: func(string) string { return "" }}
	status = a.run(t.Context(), args)
	return status, out.String(), errs.String()
}

func TestUsageIsCheckedBeforeAnythingIsAsked(t *testing.T) {
	for _, line := range []string{
		"bogus", "backup", "restore X", "restore X --name a --in-place", "restore X --in-place --keep-macs",
		"restore X --name a --keep-macs --no-nics", "repository", "repository bogus", "repository add one",
		"repository add one /two --minimum-free lots", "offering create daily", "offering create daily --repository nas --mode odd",
		"schedule create s --calendar daily",
		"schedule create s --offering a", "schedule create s --offering a --domain b --calendar daily", "schedule create s --offering a --calendar daily --overlap odd",
		"schedule create s --offering a --calendar daily --randomized-delay -1s", "schedule preview", "schedule preview s --calendar daily",
		"backup d --offering a --repository b", "backup d --tracking none", "backup d --fallback cbt", "backup d --level -1", "list a b", "list --since yesterday", "list --kind odd",
		"jobs --all --state running", "completion powershell", "status --json=long", "usage --by size", "quota set", "quota set host h --bytes 1G", "quota set domain d", "quota set domain d --bytes lots", "quota remove domain", "-H -oProxyCommand=x list", "list --bogus",
	} {
		status, stdout, stderr := runWith(t, strings.Fields(line)...)
		if status != exitUsage || stdout != "" || !strings.HasPrefix(stderr, "virtbackupctl: ") || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit status %d, stdout %q, stderr %q", line, status, stdout, stderr)
		}
	}
}

func TestWithoutABusItSaysWhatToLookAt(t *testing.T) {
	status, _, stderr := runWith(t, "list")
	if status != exitFailed || !strings.Contains(stderr, `see "systemctl status virtbackupd"`) {
		t.Errorf("exit status %d, stderr %q", status, stderr)
	}
	status, stdout, stderr := runWith(t, "list", "--json=short")
	var failure struct {
		Error, Message string
		ExitStatus     int `json:"exit_status"`
	}
	if err := json.Unmarshal([]byte(stderr), &failure); err != nil {
		t.Fatalf("%q: %v", stderr, err)
	}
	if status != exitFailed || stdout != "" || failure.Error != string(dbus.ErrFailed) || failure.Message == "" || failure.ExitStatus != exitFailed {
		t.Errorf("exit status %d, stdout %q, stderr %q", status, stdout, stderr)
	}
}

func TestHelpAndVersionAndCompletionNeedNoDaemon(t *testing.T) {
	for _, line := range []string{"", "help", "--version", "backup --help", "completion bash", "completion zsh", "completion fish"} {
		if status, stdout, stderr := runWith(t, strings.Fields(line)...); status != exitDone || stdout == "" || stderr != "" {
			t.Errorf("%q: exit status %d, stdout %q, stderr %q", line, status, stdout, stderr)
		}
	}
}

func TestExitStatus(t *testing.T) {
	gone := dbus.JobProperties{Operation: dbus.OperationBackup, State: dbus.JobFailed, Error: dbus.ErrNotFound, ErrorMessage: "it is gone"}
	for _, c := range []struct {
		err    error
		status int
		name   dbus.ErrorName
	}{
		{dbus.Errorf(dbus.ErrNotFound, "x"), exitNotFound, dbus.ErrNotFound},
		{fmt.Errorf("a: %w", dbus.Errorf(dbus.ErrNotAuthorized, "x")), exitRefused, dbus.ErrNotAuthorized},
		{dbus.Errorf(dbus.ErrBusy, "x"), exitFailed, dbus.ErrBusy},
		{dbus.Errorf(dbus.ErrInvalidArgument, "x"), exitFailed, dbus.ErrInvalidArgument},
		{&usageError{errors.New("x")}, exitUsage, dbus.ErrInvalidArgument},
		{&jobError{gone}, exitFailed, dbus.ErrNotFound},
		{errors.Join(dbus.Errorf(dbus.ErrNotFound, "x"), &jobError{gone}), exitFailed, dbus.ErrNotFound},
		{&jobError{dbus.JobProperties{State: dbus.JobCancelled}}, exitFailed, dbus.ErrCancelled},
		{&detachedError{"x"}, exitInterrupted, dbus.ErrCancelled},
		{context.Canceled, exitInterrupted, dbus.ErrCancelled},
		{errors.New("x"), exitFailed, dbus.ErrFailed},
	} {
		if status, name := exitStatus(c.err), errorName(c.err); status != c.status || name != c.name {
			t.Errorf("%v: %d, %s; %d, %s are expected", c.err, status, name, c.status, c.name)
		}
	}
}

func TestRemoteHost(t *testing.T) {
	for _, host := range []string{"a", "web-1.example.org", "root@10.0.0.1", "root@[fe80::1%eth0]", "::1", "backup_user@h"} {
		if err := checkHost(host); err != nil {
			t.Error(err)
		}
	}
	for _, host := range []string{"", "-v", "-oProxyCommand=x", "root@-v", "-root@h", "a b", "a;b", "$(x)", "a\nb", "root@", "@a", "a/b", "a@b@c"} {
		if checkHost(host) == nil {
			t.Errorf("%q is taken for a host", host)
		}
	}
	for ask, want := range map[bool]string{
		true:  "ssh -xT -- u@h systemd-stdio-bridge",
		false: "ssh -xT -o BatchMode=yes -- u@h systemd-stdio-bridge",
	} {
		if got := strings.Join(sshCommand("u@h", ask), " "); got != want {
			t.Errorf("%q; %q is expected", got, want)
		}
	}
}

// every calls f for each verb with its words, without virtbackupctl's.
func every(cmd *cobra.Command, f func(words string, cmd *cobra.Command)) {
	for _, sub := range cmd.Commands() {
		if sub.Hidden {
			continue
		}
		f(strings.TrimPrefix(sub.CommandPath(), "virtbackupctl "), sub)
		every(sub, f)
	}
}

func TestManPageHasEveryVerbAndFlag(t *testing.T) {
	page, err := os.ReadFile("virtbackupctl.1")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(`\fB`, "", `\fI`, "", `\fR`, "", `\-`, "-", "\n.B ", "\n", "\n.BR ", "\n").Replace(string(page))
	root := newRoot(&app{})
	root.InitDefaultHelpFlag()
	root.InitDefaultVersionFlag()
	flag := func(f *pflag.Flag) {
		if !strings.Contains(text, "--"+f.Name) {
			t.Errorf("the page does not have --%s", f.Name)
		}
	}
	root.PersistentFlags().VisitAll(flag)
	root.Flags().VisitAll(flag)
	verbs := 0
	every(root, func(words string, cmd *cobra.Command) {
		verbs++
		cmd.LocalFlags().VisitAll(flag)
		if !cmd.HasSubCommands() && !strings.Contains(text, "\n"+words) && !strings.Contains(text, ", "+words) {
			t.Errorf("the page does not have %q", words)
		}
		// A verb of its own says nothing of files where names are asked.
		if !cmd.HasSubCommands() && cmd.Args != nil && strings.Contains(cmd.Use, " ") && cmd.ValidArgsFunction == nil && cmd.ValidArgs == nil {
			t.Errorf("%q has no completion of its arguments", words)
		}
	})
	if verbs < 25 {
		t.Errorf("%d verbs were looked at", verbs)
	}
}

func TestSettingsAreGivenOnlyWhenTheyWereSaid(t *testing.T) {
	cmd, got := &cobra.Command{}, dbus.OfferingOptions{}
	addOffering(cmd, &got)
	if err := cmd.ParseFlags(nil); err != nil || got != (dbus.OfferingOptions{}) {
		t.Errorf("without flags: %+v, %v", got, err)
	}
	if err := cmd.ParseFlags([]string{
		"--threads=0", "--level", "3", "--compression", "zstd", "--tracking=digest", "--fallback=full", "--quiesce-policy=prefer",
		"--exclude-disks", "vdb,vdc", "--include-disks=", "--disabled", "--allow-user-backups=false", "--keep-daily=7", "--users", "ann,@ops",
	}); err != nil {
		t.Fatal(err)
	}
	want := dbus.OfferingOptions{
		Disabled: new(true), Users: new([]string{"ann", "@ops"}),
		Overrides: dbus.Overrides{
			Settings: dbus.Settings{
				Threads: new(uint32(0)), CompressionLevel: new(uint32(3)), Compression: new(dbus.CompressionZstd), Tracking: new(dbus.TrackingDigest),
				Fallback: new(dbus.FallbackFull), QuiescePolicy: new(dbus.QuiescePrefer),
				ExcludeDisks: new([]string{"vdb", "vdc"}), IncludeDisks: new([]string{}),
			},
			Retention: dbus.Retention{KeepDaily: new(uint32(7))},
			Rights:    dbus.Rights{AllowUserBackups: new(false)},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, wrong := range []string{"--threads=-1", "--threads=many", "--disabled=maybe", "--mode=odd"} {
		if err := cmd.ParseFlags([]string{wrong}); err == nil {
			t.Errorf("%s is taken", wrong)
		}
	}
}

// TestEverySettingHasAFlag finds one that was forgotten: all that an offering
// can have can be said on the command line, and all that a domain can have can
// be set and unset.
func TestEverySettingHasAFlag(t *testing.T) {
	flags := func(add func(cmd *cobra.Command)) (keys []string) {
		cmd := &cobra.Command{}
		add(cmd)
		cmd.Flags().VisitAll(func(f *pflag.Flag) { keys = append(keys, settingKey(f.Name)) })
		slices.Sort(keys)
		return keys
	}
	for what, all := range map[string][2][]string{
		"offering": {dbus.OptionKeys(dbus.OfferingOptions{}), flags(func(cmd *cobra.Command) { addOffering(cmd, &dbus.OfferingOptions{}) })},
		"domain":   {dbus.OptionKeys(dbus.Overrides{}), flags(func(cmd *cobra.Command) { addOverrides(cmd, &dbus.Overrides{}) })},
		"backup":   {dbus.OptionKeys(dbus.Settings{}), flags(func(cmd *cobra.Command) { addSettings(cmd, &dbus.Settings{}) })},
	} {
		slices.Sort(all[0])
		if diff := cmp.Diff(all[0], all[1]); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
	}
}

func TestSizes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 1 << 30: "1.0 GiB", 1<<64 - 1: "16.0 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, and %q is expected", n, got, want)
		}
	}
	for text, want := range map[string]uint64{"0": 0, "512": 512, "10G": 10 << 30, "10GiB": 10 << 30, "3k": 3 << 10, "1T": 1 << 40, "5B": 5} {
		if got, err := parseSize(text); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "G", "-1", "1.5G", "1X", "17179869184G", "10 G", "99999999999999999999"} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("parseSize(%q) = %d", text, got)
		}
	}
}

func TestTimes(t *testing.T) {
	now := time.Date(2026, 2, 3, 4, 5, 6, 0, time.Local)
	for text, want := range map[string]time.Time{
		"2026-01-31":           time.Date(2026, 1, 31, 0, 0, 0, 0, time.Local),
		"2026-01-31 14:00":     time.Date(2026, 1, 31, 14, 0, 0, 0, time.Local),
		"2026-01-31T14:00:01Z": time.Date(2026, 1, 31, 14, 0, 1, 0, time.UTC),
		"7d":                   time.Date(2026, 1, 27, 4, 5, 6, 0, time.Local),
		"12h":                  now.Add(-12 * time.Hour),
	} {
		if got, err := parseTime(text, now); err != nil || !got.Equal(want) {
			t.Errorf("parseTime(%q) = %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "yesterday", "-1h", "d", "-7d", "31.1.2026"} {
		if got, err := parseTime(text, now); err == nil {
			t.Errorf("parseTime(%q) = %v", text, got)
		}
	}
	for d, want := range map[time.Duration]string{
		420 * time.Millisecond: "0 s", 42 * time.Second: "42 s", 61 * time.Second: "1 min 01 s", 3*time.Hour + 4*time.Minute: "3 h 04 min",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %q, and %q is expected", d, got, want)
		}
	}
	if short, long := elapsed(420*time.Millisecond), elapsed(61*time.Second); short != "0.4 s" || long != "1 min 01 s" {
		t.Error(short, long)
	}
}

func TestNotFoundTellsWhereTheNamesAre(t *testing.T) {
	for _, name := range []dbus.ErrorName{dbus.ErrNotFound, unknownObject} {
		_, err := found("", dbus.Errorf(name, "x"), "domain", "d", "domain list")
		if exitStatus(err) != exitNotFound || err.Error() != `there is no domain "d": "virtbackupctl domain list" shows them` {
			t.Error(err)
		}
	}
	if id, err := found("i", nil, "domain", "d", "domain list"); id != "i" || err != nil {
		t.Error(id, err)
	}
	if _, err := found("", dbus.Errorf(dbus.ErrNotAuthorized, "x"), "domain", "d", "domain list"); exitStatus(err) != exitRefused {
		t.Error(err)
	}
}
