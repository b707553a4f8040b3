package dbus

// cause is why a disk, or a whole backup, is no increment by a bitmap, why a
// chain ended, or what was seen of a disk.
type cause struct{ word, text string }

// causes are all that there are, in the order of the reference. The daemon's
// package chain says when each applies.
func causes() []cause {
	return []cause{
		{"first-backup", "the domain has no chain in this repository yet"},
		{"full-requested", "a full backup was asked for"},
		{"full-mode", "the offering makes full backups only"},
		{"isolated", "a backup outside of the chain was asked for"},
		{"chain-size", "the chain had as many backups as the offering allows"},
		{"chain-finished", "the chain was finished on request"},
		{"chain-broken", "the chain is broken"},
		{"offering-changed", "the chain was made with another offering"},
		{"repository-changed", "the chain is in another repository"},
		{"parent-missing", "the newest backup of the chain is not there"},
		{"parent-damaged", "the newest backup of the chain, or one it builds on, is damaged"},
		{"clock-set-back", "the newest backup of the chain is dated in the future: the clock was set back"},
		{"backup-deleted", "the newest backup of the chain was deleted"},
		{"restored", "a backup was restored over the domain's disks"},
		{"validation-failed", "a backup of the chain was tried, and is not valid"},
		{"no-disk-tracked", "none of the disks can go on, for different causes"},
		{"disk-attached", "the disk was not in the backup before"},
		{"disk-replaced", "the disk was replaced, or detached and attached again"},
		{"disk-resized", "the disk was resized"},
		{"changed-while-off", "the disk was changed while the domain was off"},
		{"unseen", "the domain was started or stopped while nobody watched"},
		{"host-restarted", "the host went down while the domain ran"},
		{"offering-digest", "the offering compares all disks"},
		{"raw-disk", "its image format cannot note what changes"},
		{"checkpoint-missing", "the checkpoint of the last backup does not cover the disk, or is gone"},
		{"bitmap-broken", "the bitmap that notes what changes is gone, in use or inconsistent"},
		{"internal-snapshot", "the domain has internal snapshots, and with a bitmap it could not revert to them"},
		{"overlay-missing", "the overlay that the last backup made is not the disk's top layer"},
		{"imported", "it was found in the repository, and nothing else is known of it"},
		{"merged", "what it built on went, and was merged into it"},
		{"overlay-unsupported", "no overlay is put on the disks of a domain that is transient, has snapshots, or has a disk that is no file"},
	}
}

// CauseText says a cause to people, as a part of a sentence. One that is not
// known, as of a newer daemon, is its own text.
func CauseText(word string) string {
	for _, known := range causes() {
		if known.word == word {
			return known.text
		}
	}
	return word
}
