-- Backups that are looked after once they are made: compressed, validated, verified.


-- == jobs

ALTER TABLE jobs ADD COLUMN yielded INTEGER NOT NULL DEFAULT 0; -- how often it gave way to another job of its domain


-- == compression

-- Whether data is still to be compressed, by a job after the backup; '' if none was to be.
ALTER TABLE backups ADD COLUMN compression_state TEXT NOT NULL DEFAULT '' CHECK (compression_state IN ('', 'due', 'done', 'failed'));
ALTER TABLE backups ADD COLUMN compression_error TEXT NOT NULL DEFAULT ''; -- why it failed, or was put off
ALTER TABLE backups ADD COLUMN compression_next INTEGER NOT NULL DEFAULT 0; -- not due before
UPDATE backups SET compression_state = 'due' WHERE compression_time = 'deferred' AND compression <> 'none' AND state = 'complete' AND pin = '';
CREATE INDEX backups_compression ON backups (id) WHERE compression_state = 'due';


-- == validation

-- How backups are tried; 0 seconds: as the configuration says.
ALTER TABLE offerings ADD COLUMN validation_boot_timeout INTEGER NOT NULL DEFAULT 0; -- microseconds
ALTER TABLE offerings ADD COLUMN validation_command TEXT NOT NULL DEFAULT '';
ALTER TABLE offerings ADD COLUMN validation_arguments TEXT NOT NULL DEFAULT '[]'; -- JSON
ALTER TABLE offerings ADD COLUMN validation_expected TEXT NOT NULL DEFAULT ''; -- base64; '': exit code 0
ALTER TABLE offerings ADD COLUMN validation_command_timeout INTEGER NOT NULL DEFAULT 0; -- microseconds
ALTER TABLE offerings ADD COLUMN validation_screenshot_wait INTEGER NOT NULL DEFAULT 0; -- microseconds
ALTER TABLE offerings ADD COLUMN validation_ports TEXT NOT NULL DEFAULT '[]'; -- JSON

-- What came of trying a backup, each time.
CREATE TABLE validations (
	id         TEXT PRIMARY KEY, -- ULID: the order in which they ended
	backup     TEXT NOT NULL REFERENCES backups (id) ON DELETE CASCADE,
	job        TEXT NOT NULL,
	result     TEXT NOT NULL CHECK (result IN ('valid', 'not-valid', 'unable')),
	step       TEXT NOT NULL, -- that decided it; '' if none did
	cause      TEXT NOT NULL,
	findings   TEXT NOT NULL, -- JSON: of each step
	screenshot BLOB, -- PNG; NULL if none was taken, or a newer one is there
	started    INTEGER NOT NULL,
	finished   INTEGER NOT NULL
) STRICT;
CREATE INDEX validations_backup ON validations (backup, id);

-- The newest of them, which lists show.
ALTER TABLE backups ADD COLUMN validation TEXT NOT NULL DEFAULT ''; -- '' if it was never tried
ALTER TABLE backups ADD COLUMN validation_step TEXT NOT NULL DEFAULT '';
ALTER TABLE backups ADD COLUMN validation_cause TEXT NOT NULL DEFAULT '';
ALTER TABLE backups ADD COLUMN validated INTEGER NOT NULL DEFAULT 0; -- when
CREATE INDEX backups_validation ON backups (validation) WHERE validation <> '';


-- == integrity

-- Parts of disks of backups that are not what was written, by damage in the
-- image of the backup itself, or of one that it builds on.
CREATE TABLE damage (
	backup TEXT NOT NULL REFERENCES backups (id) ON DELETE CASCADE,
	target TEXT NOT NULL, -- '' if it is not known to be of a disk: of all, or another file
	start  INTEGER NOT NULL, -- bytes, as the guest sees the disk
	length INTEGER NOT NULL,
	image  TEXT NOT NULL, -- the backup whose file is damaged; no reference: it may go before its damage is looked for again
	donor  TEXT NOT NULL, -- the backup that holds the same, so that it can be repaired; '' if none is known
	PRIMARY KEY (backup, target, start, image)
) STRICT, WITHOUT ROWID;
CREATE INDEX damage_image ON damage (image);
-- When each chain was read back is found without the rows themselves.
CREATE INDEX backups_verified ON backups (chain, state, sequence, id, stored_bytes, verified, finished);
WITH RECURSIVE above (id, image) AS (
	SELECT id, id FROM backups WHERE state = 'damaged' AND error <> 'its parent is damaged'
	UNION SELECT b.id, above.image FROM backups AS b JOIN above ON b.parent = above.id)
INSERT INTO damage SELECT id, '', 0, 0, image, '' FROM above;
