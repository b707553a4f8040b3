package repository

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
)

// Format is the version of the repository and of its manifests that this
// program writes, and the newest that it reads.
const Format = 1

const (
	manifestName  = "manifest.json"
	pendingName   = "manifest.pending" // the manifest of a backup that is not committed yet
	manifestLimit = 16 << 20           // bytes
	listLimit     = 4096               // disks, or other files, of one backup
	sizeLimit     = 1 << 62            // bytes, of a disk or a file
)

// Kinds of a backup, and of a disk in it.
const (
	KindFull        = "full"
	KindIncremental = "incremental"
)

// How the changes in an increment's image were found.
const (
	ChangesCBT      = "cbt"      // by a dirty bitmap
	ChangesSnapshot = "snapshot" // they are what the frozen layer holds
	ChangesDigest   = "digest"   // by comparing the whole disk with the parent's digests
)

// How well a backup's data hangs together, weakest last.
const (
	ConsistencyApplication = "application"
	ConsistencyFilesystem  = "filesystem"
	ConsistencySuspended   = "suspended"
	ConsistencyCrash       = "crash"
	ConsistencyOff         = "off" // the domain was shut off: as its last run left the disks
)

// Manifest describes one backup and is all that is needed to restore it, with
// the other files of its directory. It is authenticated by the key of the host
// that wrote it: storage that others can write to can lose a backup, but not
// make us restore a forged one.
type Manifest struct {
	Format      int      `json:"format"`
	Repository  ID       `json:"repository"`
	Domain      Domain   `json:"domain"`
	Backup      string   `json:"backup"`           // ULID
	Parent      string   `json:"parent,omitempty"` // ULID of the backup that this one is an increment to
	Chain       string   `json:"chain"`            // ULID
	Kind        string   `json:"kind"`
	Isolated    bool     `json:"isolated"`
	Created     int64    `json:"created_usec"`        // the point in time of the data; µs since the epoch
	Finished    int64    `json:"finished_usec"`       // µs since the epoch
	Host        string   `json:"host"`                // HostID of the key that authenticates this manifest
	HostName    string   `json:"host_name"`           // informative
	Version     string   `json:"version"`             // of the program that wrote it
	Quiesce     string   `json:"quiesce"`             // what was asked: "none", "agent", "suspend"
	Consistency string   `json:"consistency"`         // what came of it
	Held        int64    `json:"held_usec,omitempty"` // µs that the guest was held still
	Shortfall   string   `json:"shortfall,omitempty"` // for people: why it is less consistent than was asked for
	Offering    Offering `json:"offering"`
	Disks       []Disk   `json:"disks"`
	Files       []File   `json:"files"`
	Secrets     []Secret `json:"secrets,omitempty"` // that a restored domain needs
	// Generation counts how often the backup's files were replaced by others that
	// hold the same: see Rewrite.
	Generation int    `json:"generation,omitempty"`
	Rewriter   string `json:"rewriter,omitempty"` // ULID of the job that did so last
	HMAC       string `json:"hmac"`               // hex HMAC-SHA256 of this document with an empty hmac
}

// Domain names the domain that was backed up.
type Domain struct {
	UUID string `json:"uuid"`
	Name string `json:"name"`
}

// Offering is what was asked for when the backup was made; informative.
type Offering struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Compression string `json:"compression"`
	Level       int    `json:"level"`
}

// Disk is one disk of a backup; its image is File, and the digests of its blocks
// are in DigestName(Target), which is listed in Files. DigestRoot vouches for
// those of all blocks, also where an increment leaves them to its parent.
type Disk struct {
	Target      string `json:"target"`               // "vda"
	File        string `json:"file"`                 // "vda.qcow2"
	Size        uint64 `json:"size"`                 // bytes that the guest sees
	StoredBytes uint64 `json:"stored_bytes"`         // size of File
	DataBytes   uint64 `json:"data_bytes"`           // bytes of guest data in File, before compression
	Kind        string `json:"kind"`                 // an increment's disk may be full
	Tracking    string `json:"tracking"`             // "cbt", "snapshot", "digest", "none"
	Changes     string `json:"changes,omitempty"`    // how an increment's changes were found; "" also if an older version wrote it
	ReadBytes   uint64 `json:"read_bytes,omitempty"` // from the source
	Checkpoint  string `json:"checkpoint,omitempty"`
	Format      string `json:"format"` // of the source: "qcow2", "raw"
	SectorSize  uint32 `json:"sector_size,omitempty"`
	DigestRoot  string `json:"digest_root"` // hex BLAKE3-256
	Source      string `json:"source"`      // path on the host, informative
	// Container says that the image holds the bytes of the source's own file, as
	// QEMU would open it with this format ("qcow2", "raw") and a key: it is
	// encrypted by LUKS. Format is "raw" then.
	Container string `json:"container,omitempty"`
}

// File is any other file of a backup.
type File struct {
	Name   string `json:"name"` // one that begins with "tpm/" lies in that directory
	Size   uint64 `json:"size"`
	BLAKE3 string `json:"blake3"` // hex BLAKE3-256
}

// Secret names a secret of libvirt's that something in the backup is encrypted
// with, as it was on the host. Its value is in no backup.
type Secret struct {
	For   string `json:"for"`             // a disk's target, or SecretForTPM
	UUID  string `json:"uuid,omitempty"`  // or
	Usage string `json:"usage,omitempty"` // how libvirt finds it
}

// SecretForTPM is the For of the secret of the TPM's state.
const SecretForTPM = "tpm"

// Disk returns the disk with this target.
func (m *Manifest) Disk(target string) (Disk, bool) {
	for _, d := range m.Disks {
		if d.Target == target {
			return d, true
		}
	}
	return Disk{}, false
}

// ImageName is the file name of a disk's image, DigestName that of its digests.
func ImageName(target string) string  { return target + ".qcow2" }
func DigestName(target string) string { return target + ".digests" }

// Backing is the only backing file name that the image of d may carry: the
// parent's image of the same disk by relative path, or "" for a full image.
func (m *Manifest) Backing(d Disk) string {
	if d.Kind != KindIncremental {
		return ""
	}
	return "../" + m.Parent + "/" + d.File
}

// HostID is the public name of a host's manifest key. It is derived from the
// key, so that a key that changed is never taken for the host's.
func HostID(key []byte) string {
	h := hmac.New(sha256.New, key)
	h.Write([]byte("virtbackup host id"))
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// sign gives m its HMAC and returns the bytes of the file.
func (m *Manifest) sign(key []byte) ([]byte, error) {
	m.HMAC = ""
	unsigned, err := m.encode()
	if err != nil {
		return nil, err
	}
	m.HMAC = mac(key, unsigned)
	return m.encode()
}

func mac(key, b []byte) string {
	h := hmac.New(sha256.New, key)
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil))
}

// encode returns the one form of a manifest that is accepted back.
func (m *Manifest) encode() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(m); err != nil {
		return nil, fmt.Errorf("cannot encode manifest: %w", err)
	}
	return b.Bytes(), nil
}

// parseManifest reads a manifest without asking who wrote it. A manifest that
// is not byte for byte as encode writes it (unknown or double members, other
// spacing, bytes that are no UTF-8) is refused, so that no two readers can
// disagree about what was authenticated.
func parseManifest(b []byte) (*Manifest, error) {
	if err := checkFormat(b); err != nil {
		return nil, err
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	again, err := m.encode()
	if err != nil || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: it is not in the form that virtbackup writes", ErrManifest)
	}
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrManifest, err)
	}
	return &m, nil
}

// checkFormat looks only at the format, which every version of a document has.
func checkFormat(b []byte) error {
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return fmt.Errorf("%w: %w", ErrManifest, err)
	}
	if head.Format > Format {
		return fmt.Errorf("%w: it has format %d, this version reads up to %d", ErrNewerFormat, head.Format, Format)
	}
	if head.Format != Format {
		return fmt.Errorf("%w: unknown format %d", ErrManifest, head.Format)
	}
	return nil
}

// authenticate checks that the host with this key wrote m.
func (m *Manifest) authenticate(key []byte) error {
	if m.Host != HostID(key) {
		return fmt.Errorf("%w: it was written by %q (%s)", ErrForeignManifest, m.HostName, m.Host)
	}
	unsigned := *m
	unsigned.HMAC = ""
	b, err := unsigned.encode()
	if err != nil {
		return err
	}
	if !hmac.Equal([]byte(mac(key, b)), []byte(m.HMAC)) {
		return fmt.Errorf("%w: its authentication code is wrong: it was changed after it was written", ErrManifest)
	}
	return nil
}

var (
	ulidPattern   = regexp.MustCompile(`^[0-7][0-9A-HJKMNP-TV-Z]{25}$`)
	uuidPattern   = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	targetPattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,31}$`)
	filePattern   = regexp.MustCompile(`^(tpm/)?[a-z0-9][a-z0-9_-]{0,63}(\.[a-z0-9_-]{1,32}){0,3}$`)
	hostPattern   = regexp.MustCompile(`^[0-9a-f]{32}$`)
	sumPattern    = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// The names that may stand in a path are checked wherever they come in; nothing
// else is ever joined into one.
func checkName(what string, pattern *regexp.Regexp, name string) error {
	if !pattern.MatchString(name) {
		return fmt.Errorf("%q is not a valid %s", truncated(name), what)
	}
	return nil
}

func truncated(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func checkFileName(name string) error {
	if name == manifestName || name == pendingName {
		return fmt.Errorf("the name %q is reserved", name)
	}
	return checkName("file name", filePattern, name)
}

func checkBackup(domain, backup string) error {
	if err := checkName("domain UUID", uuidPattern, domain); err != nil {
		return err
	}
	return checkName("backup id", ulidPattern, backup)
}
