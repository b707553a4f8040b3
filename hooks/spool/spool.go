// Package spool keeps what the libvirt hook saw until the daemon has taken it
// over: a directory of records in order of a number. It is the only way from
// the hook to the daemon, so that nothing depends on whether that runs, and
// nothing overtakes.
package spool

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/virtbackup/virtbackup/hooks/fingerprint"
)

// Directory is where the hook writes to. Only root may enter it: a domain's
// definition may hold secrets.
const Directory = "/var/lib/virtbackup/hooks"

// Version is that of the records which Write writes.
const Version = 1

// Record is what the hook saw once.
type Record struct {
	Version int `json:"version"`
	// Time is in µs since the epoch.
	Time int64 `json:"time_usec"`
	// Boot is /proc/sys/kernel/random/boot_id.
	Boot string `json:"boot"`
	// Libvirt is the process that called the hook: its id and its start time
	// in clock ticks since the boot (proc(5), stat, field 22), as "1234@56789".
	Libvirt string `json:"libvirt"`
	// Domain is its UUID, in lower case with dashes; empty when the definition
	// could not be read, so that only the name is known.
	Domain string `json:"domain"`
	Name   string `json:"name"`
	// DomainID is libvirt's number of the active domain; 0 for none. libvirt
	// 9.0 gives it from prepare on, and no longer at release; at stopped only
	// its status file does.
	DomainID int `json:"domain_id"`
	// Operation, SubOperation and Extra are what the hook was called with
	// (https://libvirt.org/hooks.html), as prepare, begin, -.
	Operation    string `json:"operation"`
	SubOperation string `json:"sub_operation"`
	Extra        string `json:"extra"`
	// XML is the domain's definition as the hook got it.
	XML string `json:"xml"`
	// Disks are there at prepare and release only.
	Disks []fingerprint.Disk `json:"disks"`
}

// Entry is one record of the spool. Err says why it cannot be read: then
// anything may have happened, to any domain.
type Entry struct {
	Number uint64
	Record Record
	Err    error
}

const (
	recordSuffix = ".json" // after the number
	// A record that is being written.
	temporaryPrefix = ".new-"
	// Nobody takes so long to write one.
	temporaryAge = time.Hour
	// maxRecord is longer than any record: the definition is 16 MiB at most,
	// and each byte six bytes in JSON.
	maxRecord = 128 << 20
)

// Write puts a record into the spool, and makes it the last one. It makes the
// directory where needed. When it returns without an error, the record is
// there also after a loss of power. Errors are the file system's; after one the
// record may be there or not.
func Write(directory string, r Record) (number uint64, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot record what happened to domain %q: %w", r.Name, err)
		}
	}()
	if err := makeDirectory(directory); err != nil {
		return 0, err
	}
	dir, err := os.Open(directory)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	temporary, err := writeTemporary(directory, r)
	if err != nil {
		return 0, err
	}
	defer os.Remove(temporary)
	if number, err = last(directory, temporary); err != nil {
		return 0, err
	}
	return number, dir.Sync()
}

// makeDirectory makes a directory, and those above it, so that they last.
func makeDirectory(path string) error {
	err := os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeDirectory(filepath.Dir(path)); err != nil {
			return err
		}
		err = os.Mkdir(path, 0o700)
	}
	if err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	above, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer above.Close()
	return above.Sync()
}

// writeTemporary writes a record that has no number yet, and returns its path.
func writeTemporary(directory string, r Record) (path string, err error) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false) // XML would be twice as long
	if err := encoder.Encode(r); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(directory, temporaryPrefix)
	if err != nil {
		return "", err
	}
	_, err = f.Write(text.Bytes())
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return f.Name(), err
}

// last links a record to a number that is greater than all that are there, and
// that was not used before: numbers are the time, in µs since the epoch, as long
// as nobody sets the clock back. libvirt waits for the hook before it calls it
// for the same domain again, so the records of a domain are in order.
func last(directory, temporary string) (uint64, error) {
	for {
		records, err := scan(directory)
		if err != nil {
			return 0, err
		}
		number := max(uint64(time.Now().UnixMicro()), greatest(records)+1)
		// It never replaces anything.
		err = os.Link(temporary, file(directory, number))
		if !errors.Is(err, fs.ErrExist) {
			return number, err
		}
	}
}

// Read returns all records, the first to the last. A directory that is not
// there has none.
func Read(directory string) ([]Entry, error) {
	// A list that is made while records come may have a later one of a domain and
	// not the one before. What was there when the first list had been made is in
	// the second.
	first, err := scan(directory)
	records := first
	if err == nil && len(first) > 0 {
		records, err = scan(directory)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the records of the hook: %w", err)
	}
	var all []Entry
	for _, n := range records {
		if n > greatest(first) {
			break
		}
		e := Entry{Number: n}
		e.Record, e.Err = read(file(directory, n))
		if errors.Is(e.Err, fs.ErrNotExist) {
			continue // somebody else has removed it by now
		}
		if e.Err != nil {
			e.Err = fmt.Errorf("cannot read record %d of the hook: %w", n, e.Err)
		}
		all = append(all, e)
	}
	return all, nil
}

func read(path string) (Record, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxRecord {
		return Record{}, errors.Join(errors.New("it is no record"), err)
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return Record{}, err
	}
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return Record{}, err
	}
	if r.Version != Version {
		return Record{}, fmt.Errorf("it is of version %d, and %d is known", r.Version, Version)
	}
	return r, nil
}

// Remove takes a record away. One that is not there is none to take away.
func Remove(directory string, number uint64) error {
	if err := os.Remove(file(directory, number)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove record %d of the hook: %w", number, err)
	}
	return nil
}

func greatest(records []uint64) uint64 { return slices.Max(append(records, 0)) }

// scan lists the numbers in a spool, in order, and removes what hooks left there
// that died.
func scan(directory string) (records []uint64, err error) {
	entries, err := os.ReadDir(directory)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), temporaryPrefix) {
			if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > temporaryAge {
				_ = os.Remove(filepath.Join(directory, e.Name()))
			}
			continue
		}
		if n, ok := parse(e.Name()); ok {
			records = append(records, n)
		}
	}
	slices.Sort(records)
	return records, nil
}

// file is the path of a record: all have the same length, for people who list
// the directory.
func file(directory string, number uint64) string {
	return filepath.Join(directory, fmt.Sprintf("%020d%s", number, recordSuffix))
}

func parse(name string) (uint64, bool) {
	digits, ok := strings.CutSuffix(name, recordSuffix)
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, ok && err == nil && name == filepath.Base(file("", n))
}
