package repository

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// usageLimit is the most that the usage of a secret may have, in bytes: it is a
// path, or a name.
const usageLimit = 4096

// validate checks all that can be said about a manifest by itself.
func (m *Manifest) validate() error {
	names := []error{
		checkBackup(m.Domain.UUID, m.Backup),
		checkName("repository id", ulidPattern, string(m.Repository)),
		checkName("chain id", ulidPattern, m.Chain),
		checkName("host id", hostPattern, m.Host),
		m.validateKind(),
	}
	if m.Generation < 0 || (m.Generation > 0) != (m.Rewriter != "") {
		names = append(names, fmt.Errorf("generation %d does not go with rewriter %q", m.Generation, truncated(m.Rewriter)))
	}
	if m.Rewriter != "" {
		names = append(names, checkName("job id", ulidPattern, m.Rewriter))
	}
	if m.Created < 0 || m.Finished < 0 || m.Held < 0 {
		names = append(names, errors.New("a time is negative"))
	}
	if len(m.Disks) > listLimit || len(m.Files) > listLimit || len(m.Secrets) > listLimit {
		return fmt.Errorf("it lists %d disks, %d files and %d secrets, more than %d", len(m.Disks), len(m.Files), len(m.Secrets), listLimit)
	}
	seen := map[string]bool{}
	for _, d := range m.Disks {
		if seen[d.File] {
			names = append(names, fmt.Errorf("disk %q is listed twice", d.Target))
		}
		seen[d.File] = true
		names = append(names, m.validateDisk(d))
	}
	for _, f := range m.Files {
		if seen[f.Name] {
			names = append(names, fmt.Errorf("file %q is listed twice", f.Name))
		}
		seen[f.Name] = true
		names = append(names, f.validate())
	}
	for _, s := range m.Secrets {
		names = append(names, s.validate())
	}
	return errors.Join(names...)
}

func (s Secret) validate() error {
	if s.UUID != "" {
		if err := checkName("secret's UUID", uuidPattern, s.UUID); err != nil {
			return err
		}
	}
	if len(s.Usage) > usageLimit || strings.ContainsFunc(s.Usage, unicode.IsControl) {
		return fmt.Errorf("%q is not a secret's usage", truncated(s.Usage))
	}
	return checkName("use of a secret", targetPattern, s.For)
}

func (m *Manifest) validateKind() error {
	switch {
	case m.Kind == KindFull && m.Parent == "":
		return nil
	case m.Kind == KindIncremental && m.Parent < m.Backup:
		return checkName("parent id", ulidPattern, m.Parent)
	}
	// ULIDs ascend with time: this also excludes a circle of parents.
	return fmt.Errorf("kind %q does not go with parent %q", truncated(m.Kind), truncated(m.Parent))
}

func (m *Manifest) validateDisk(d Disk) error {
	if err := checkName("disk target", targetPattern, d.Target); err != nil {
		return err
	}
	if d.File != ImageName(d.Target) {
		return fmt.Errorf("disk %s: unexpected image %q", d.Target, truncated(d.File))
	}
	if d.Kind != KindFull && (d.Kind != KindIncremental || m.Kind != KindIncremental) {
		return fmt.Errorf("disk %s: kind %q in a backup of kind %q", d.Target, truncated(d.Kind), m.Kind)
	}
	switch d.Changes {
	case "":
	case ChangesCBT, ChangesSnapshot, ChangesDigest:
		if d.Kind != KindIncremental {
			return fmt.Errorf("disk %s: changes found by %q in an image of kind %q", d.Target, d.Changes, d.Kind)
		}
	default:
		return fmt.Errorf("disk %s: changes found by %q", d.Target, truncated(d.Changes))
	}
	if d.Container != "" && (d.Container != "qcow2" && d.Container != "raw" || d.Format != "raw") {
		return fmt.Errorf("disk %s: container of format %q in format %q", d.Target, truncated(d.Container), truncated(d.Format))
	}
	if max(d.Size, d.StoredBytes, d.DataBytes, d.ReadBytes) > sizeLimit {
		return fmt.Errorf("disk %s: sizes %d, %d, %d, %d are out of range", d.Target, d.Size, d.StoredBytes, d.DataBytes, d.ReadBytes)
	}
	if !slices.ContainsFunc(m.Files, func(f File) bool { return f.Name == DigestName(d.Target) }) {
		return fmt.Errorf("disk %s: no digests are listed", d.Target)
	}
	return checkName("BLAKE3 sum", sumPattern, d.DigestRoot)
}

func (f File) validate() error {
	if err := checkFileName(f.Name); err != nil {
		return err
	}
	if f.Size > sizeLimit {
		return fmt.Errorf("file %s: size %d is out of range", f.Name, f.Size)
	}
	return checkName("BLAKE3 sum", sumPattern, f.BLAKE3)
}
