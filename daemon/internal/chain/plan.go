package chain

// Backup is what the rules need to know of one backup.
type Backup struct {
	ID     string
	Chain  string
	Parent string // "" for a full backup
	Kind   Kind
	State  BackupState
	Images []Image
}

// Image is one disk in a backup.
type Image struct {
	Target string // "vda"
	Kind   Kind
	Size   uint64 // bytes
}
