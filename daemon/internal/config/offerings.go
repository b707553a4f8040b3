package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/BurntSushi/toml"

	"github.com/virtbackup/virtbackup/dbus"
)

// OfferingsDirectory is beside the settings: each of its files is an offering,
// which configuration management may write.
const OfferingsDirectory = "offerings.d"

const offeringSuffix = ".toml"

// OfferingFile is an offering as a file says it.
type OfferingFile struct {
	Name    string // the file's, without .toml
	Path    string
	Options dbus.UpdateOfferingOptions
	Err     error // what is wrong with it, one line for each; nil if nothing is
}

// LoadOfferings reads the offerings of a directory, by name; one that is missing is an empty
// one. The error is of the directory; what is wrong with a file is said there.
func LoadOfferings(directory string) ([]OfferingFile, error) {
	entries, err := os.ReadDir(directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the files of offerings: %w", err)
	}
	var all []OfferingFile
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), offeringSuffix)
		if !ok || strings.HasPrefix(name, ".") {
			continue // of an editor, or of a package manager
		}
		f := OfferingFile{Name: name, Path: filepath.Join(directory, e.Name())}
		f.Err = f.load()
		all = append(all, f)
	}
	return all, nil
}

func (f *OfferingFile) load() error {
	// Stat first: to open a pipe would wait for ever.
	info, err := os.Stat(f.Path)
	if err != nil {
		return fmt.Errorf("cannot read an offering: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maximumFile {
		return fmt.Errorf("%s: not a file, or larger than 1 MiB", f.Path)
	}
	text, err := os.ReadFile(f.Path)
	if err != nil {
		return fmt.Errorf("cannot read an offering: %w", err)
	}
	return f.read(text)
}

func (f *OfferingFile) read(text []byte) error {
	var document map[string]any
	meta, err := toml.NewDecoder(bytes.NewReader(text)).Decode(&document)
	if err != nil {
		var pe toml.ParseError
		if errors.As(err, &pe) {
			return fmt.Errorf("%s:%d: %s", f.Path, pe.Position.Line, pe.Message)
		}
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	var wrong []error
	for _, key := range meta.Keys() {
		if len(key) > 1 {
			continue // inside what is refused as a whole
		}
		if err := dbus.SetOption(&f.Options, key[0], document[key[0]]); err != nil {
			wrong = append(wrong, fmt.Errorf("%s:%d: %w", f.Path, lineOf(text, key), err))
		}
	}
	if len(wrong) == 0 && f.Options.Repository == nil {
		return fmt.Errorf("%s: it says no repository", f.Path)
	}
	return errors.Join(wrong...)
}
