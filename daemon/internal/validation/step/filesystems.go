package step

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// filesystems has the guest look at its own file systems, and changes nothing:
// a walk through all directories, which reads the metadata, its kernel's messages
// about disks and file systems since it started, and the errors that ext4 has
// counted. A tool that the guest does not have says nothing.
type filesystems struct{ timeout time.Duration }

func (filesystems) Name() string { return NameFilesystems }

func (c filesystems) Run(ctx context.Context, g Guest, _ []Finding) Finding {
	asked, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	system, err := systemOf(asked, g)
	if err != nil {
		return failed(err)
	}
	checks := []check{walk, kernelMessages, countedErrors} // what the walk meets, the kernel tells
	if system == windows {
		checks = []check{volumeHealth}
	}
	var done int
	var unable, output []string
	for _, one := range checks {
		within, cancel := context.WithTimeout(ctx, c.timeout)
		problem, text, err := one(within, g)
		cancel()
		switch {
		case errors.Is(err, ErrNoAgent), errors.Is(err, ErrEnded):
			return failed(err)
		case err != nil:
			unable = append(unable, err.Error())
			continue
		case problem != "":
			return Finding{Verdict: NotValid, Cause: problem, Output: text}
		}
		done++
		output = append(output, text)
	}
	if done == 0 {
		return Finding{Verdict: Unable, Cause: "the guest has nothing to look at its file systems with: " + strings.Join(unable, "; ")}
	}
	return Finding{Verdict: Valid, Output: strings.Join(append(output, unable...), "\n")}
}

// check is one look: the problem that it found, "" for none, and what it saw.
// The error is that it could not look.
type check func(ctx context.Context, g Guest) (problem, saw string, err error)

// tool runs a program that the guest may not have.
func tool(ctx context.Context, g Guest, path string, arguments ...string) (Output, error) {
	o, err := g.Execute(ctx, Command{Path: path, Arguments: arguments})
	if err != nil {
		return o, fmt.Errorf("%s: %w", path, err)
	}
	return o, nil
}

// badMessages are what Linux says of disks and file systems that are not well.
// What it says of devices that are no disks is left out.
var badMessages = regexp.MustCompile(`(?i)(I/O error, dev |Buffer I/O error on dev|EXT[234]-fs error|EXT4-fs \([^)]*\): (error count since|.*(corrupt|mounting fs with errors|bad geometry))|` +
	`JBD2: .*(error|fail)|XFS \([^)]*\): .*(corruption|metadata I/O error|Internal error|shutting down|unmount and run xfs_repair)|` +
	`BTRFS (error|critical|warning) .*(csum failed|corrupt|parent transid|checksum|bad tree block|I/O)|Remounting filesystem read-only|` +
	`FAT-fs \([^)]*\): (error|.*corrupt)|critical (medium|target) error|UNEXPECTED INCONSISTENCY)`)

var otherDevices = regexp.MustCompile(`\b(fd|sr|loop)[0-9]+\b`)

func kernelMessages(ctx context.Context, g Guest) (string, string, error) {
	o, err := tool(ctx, g, "dmesg")
	if err != nil {
		return "", "", err
	}
	if o.ExitCode != 0 || o.Signalled {
		return "", "", fmt.Errorf("dmesg: it ended with %d", o.ExitCode)
	}
	bad := findBad(string(o.Stdout))
	if len(bad) > 0 {
		return fmt.Sprintf("the guest's kernel tells of errors of a disk or file system: %q", bad[0]), strings.Join(bad, "\n"), nil
	}
	return "", "dmesg: no errors of disks and file systems", nil
}

// findBad returns the lines of a kernel's log that tell of errors.
func findBad(log string) []string {
	var bad []string
	for line := range strings.Lines(log) {
		if badMessages.MatchString(line) && !otherDevices.MatchString(line) {
			bad = append(bad, strings.TrimSpace(line))
		}
	}
	return bad
}

// mount is a file system of a disk, as /proc/mounts has it.
type mount struct{ device, directory, kind string }

// parseMounts reads /proc/mounts, and returns the file systems of disks, each once.
func parseMounts(text string) []mount {
	var all []mount
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 || !strings.HasPrefix(f[0], "/dev/") || otherDevices.MatchString(f[0]) ||
			slices.ContainsFunc(all, func(m mount) bool { return m.device == f[0] }) {
			continue
		}
		all = append(all, mount{f[0], unescape(f[1]), f[2]})
	}
	return all
}

// escaped is how /proc/mounts writes blanks and the like.
var escaped = regexp.MustCompile(`\\[0-7]{3}`)

func unescape(text string) string {
	return escaped.ReplaceAllStringFunc(text, func(octal string) string {
		n, err := strconv.ParseUint(octal[1:], 8, 8)
		if err != nil {
			return octal
		}
		return string([]byte{byte(n)})
	})
}

func mounts(ctx context.Context, g Guest) ([]mount, error) {
	o, err := tool(ctx, g, "cat", "/proc/mounts")
	if err != nil {
		return nil, err
	}
	all := parseMounts(string(o.Stdout))
	if len(all) == 0 {
		return nil, errors.New("no file system of a disk is mounted")
	}
	return all, nil
}

// countedErrors asks ext4 for the errors that it has written into a file system.
func countedErrors(ctx context.Context, g Guest) (string, string, error) {
	all, err := mounts(ctx, g)
	if err != nil {
		return "", "", err
	}
	looked := 0
	for _, m := range all {
		if m.kind != "ext4" {
			continue
		}
		name := m.device[strings.LastIndex(m.device, "/")+1:]
		o, err := tool(ctx, g, "cat", "/sys/fs/ext4/"+name+"/errors_count")
		if err != nil {
			return "", "", err
		}
		count, err := strconv.ParseUint(strings.TrimSpace(string(o.Stdout)), 10, 64)
		if err != nil {
			continue // as of a device with another name there
		}
		if count > 0 {
			return fmt.Sprintf("the file system of %s has counted %d errors", m.device, count), "", nil
		}
		looked++
	}
	return "", fmt.Sprintf("ext4: %d file systems have counted no errors", looked), nil
}

// badReads are what tools say of metadata that cannot be read.
var badReads = regexp.MustCompile(`Input/output error|Structure needs cleaning|Bad message|Stale file handle|Corrupt`)

// walkTogether is how many file systems one program walks through.
const walkTogether = 16

// walk reads all directories of all file systems, as far as time allows.
func walk(ctx context.Context, g Guest) (string, string, error) {
	all, err := mounts(ctx, g)
	if err != nil {
		return "", "", err
	}
	var directories []string
	for _, m := range all[:min(len(all), walkTogether)] {
		directories = append(directories, m.directory)
	}
	// Nothing has that name: only what cannot be read is told.
	o, err := tool(ctx, g, "find", append(slices.Clone(directories), "-xdev", "-name", ".virtbackup-reads-directories")...)
	if err != nil && ctx.Err() != nil {
		return "", fmt.Sprintf("find: %s was not read to the end in time", strings.Join(directories, ", ")), nil
	}
	if err != nil {
		return "", "", err
	}
	if bad := badReads.Find(o.Stderr); bad != nil {
		return fmt.Sprintf("directories cannot be read in the guest: %s", bad), string(o.Stderr), nil
	}
	return "", fmt.Sprintf("find: all directories of %s were read", strings.Join(directories, ", ")), nil
}

// volumeHealth asks Windows.
func volumeHealth(ctx context.Context, g Guest) (string, string, error) {
	const script = "$bad = @(Get-Volume | Where-Object { $_.DriveType -eq 'Fixed' -and $_.HealthStatus -ne 'Healthy' }); $bad; exit (100 + $bad.Count)"
	o, err := g.Execute(ctx, powershell(script))
	if err != nil {
		return "", "", fmt.Errorf("powershell: %w", err)
	}
	if o.ExitCode < 100 { // the script failed
		return "", "", fmt.Errorf("powershell: it ended with %d", o.ExitCode)
	}
	if o.ExitCode > 100 {
		return "Windows tells of volumes that are not healthy", said(o), nil
	}
	return "", "all volumes are healthy", nil
}
