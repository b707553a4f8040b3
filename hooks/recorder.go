package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/virtbackup/virtbackup/dbus"
	"github.com/virtbackup/virtbackup/hooks/fingerprint"
	"github.com/virtbackup/virtbackup/hooks/spool"
)

const (
	// reserve is what is left of the limit for writing the record when storage
	// does not answer for so long.
	reserve = 300 * time.Millisecond
	// wakeLimit is how long a daemon that hangs may hold up one step. libvirt
	// calls the hook up to four times to start a domain (restore, prepare,
	// start, started): it is delayed by less than 1 s in all.
	wakeLimit = 200 * time.Millisecond
)

// recorder writes down what the hook was called with, and wakes the daemon.
func recorder(args []string) {
	c, err := decode(args)
	if err == nil {
		err = c.record(context.Background(), os.Stdin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "virtbackup-hook:", err)
	}
	// It does not matter who does not answer, the bus or the daemon.
	time.AfterFunc(wakeLimit, func() { os.Exit(0) })
	if err := wake(context.Background()); err != nil && !errors.Is(err, dbus.ErrNoDaemon) {
		fmt.Fprintln(os.Stderr, "virtbackup-hook: cannot wake virtbackupd:", err)
	}
}

// record writes the record, however late.
func (c call) record(ctx context.Context, stdin io.Reader) error {
	now := time.Now()
	// What came before an error is as good as nothing, and the record says so.
	text, _ := io.ReadAll(io.LimitReader(stdin, maxXML+1))
	if len(text) > maxXML {
		text = nil
	}
	boot, _ := spool.BootID() // always there on Linux
	r := spool.Record{
		Version: spool.Version, Time: now.UnixMicro(), Boot: boot, Libvirt: c.libvirt,
		Name: c.arg(0), Operation: c.arg(1), SubOperation: c.arg(2), Extra: c.arg(3), XML: string(text),
	}
	var d struct {
		XMLName xml.Name `xml:"domain"`
		ID      int      `xml:"id,attr"`
		UUID    string   `xml:"uuid"`
		Mark    struct {
			Validation *struct {
				Job string `xml:"job,attr"`
			} `xml:"https://virtbackup.org/xmlns/validation/1 validation"`
		} `xml:"metadata"`
	}
	err := xml.Unmarshal(text, &d)
	if err == nil && d.Mark.Validation != nil && isValidation(r.Name, d.Mark.Validation.Job) {
		return nil // a temporary domain of ours, whose disks nobody tracks
	}
	if err != nil {
		err = fmt.Errorf("cannot read the definition of domain %q: %w", r.Name, err)
	} else {
		r.Domain, r.DomainID = strings.TrimSpace(d.UUID), d.ID
		if r.DomainID == 0 && r.Operation == "stopped" {
			r.DomainID = numberOf(r.Name)
		}
		if r.Operation == "prepare" || r.Operation == "release" {
			r.Disks, err = c.fingerprints(ctx, text)
		}
	}
	_, written := spool.Write(c.directory, r)
	if r.Operation == "prepare" && err == nil {
		limited, cancel := context.WithTimeout(ctx, c.deadline-reserve-monotonic())
		defer cancel()
		err = makeRevertible(limited, text)
	}
	return errors.Join(err, written)
}

// isValidation tells whether a domain that is marked with a job is one that a
// backup is tried with. By its name too: anybody may define a domain by a copy of
// ours. The daemon has the same rule.
func isValidation(name, job string) bool {
	return regexp.MustCompile(`^[0-9A-Z]{26}$`).MatchString(job) && name == "virtbackup-validation-"+strings.ToLower(job)
}

// statusDirectory is where libvirt keeps the state of the domains that run, in
// NAME.xml: until it has told that one stopped, in whose definition it no longer
// gives the number that tells this run of it from others.
const statusDirectory = "/run/libvirt/qemu"

// numberOf returns libvirt's number of a domain that has just stopped; 0 if it
// cannot be told.
func numberOf(name string) int {
	text, err := os.ReadFile(filepath.Join(statusDirectory, name+".xml"))
	if err != nil {
		return 0
	}
	var status struct {
		Domain struct {
			ID int `xml:"id,attr"`
		} `xml:"domain"`
	}
	if err := xml.Unmarshal(text, &status); err != nil {
		return 0
	}
	return status.Domain.ID
}

// fingerprints looks at all disks at once, as long as libvirt waits. What is
// seen later may have been changed by then.
func (c call) fingerprints(ctx context.Context, definition []byte) ([]fingerprint.Disk, error) {
	sources, err := fingerprint.Sources(definition)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, c.deadline-reserve-monotonic())
	defer cancel()
	return fingerprint.TakeAll(ctx, sources), nil
}

// wake makes the daemon read the spool, and waits until it has.
func wake(ctx context.Context) error {
	client, err := dbus.ConnectSystem(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	return client.NotifyHook(ctx)
}
