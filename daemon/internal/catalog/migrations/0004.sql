-- Backups that are looked after once they are made: compressed, validated, verified.


-- == jobs

ALTER TABLE jobs ADD COLUMN yielded INTEGER NOT NULL DEFAULT 0; -- how often it gave way to another job of its domain


-- == compression

-- Whether data is still to be compressed, by a job after the backup; '' if none was to be.
ALTER TABLE backups ADD COLUMN compression_state TEXT NOT NULL DEFAULT '' CHECK (compression_state IN ('', 'due', 'done', 'failed'));
ALTER TABLE backups ADD COLUMN compression_error TEXT NOT NULL DEFAULT ''; -- why it failed
CREATE INDEX backups_compression ON backups (id) WHERE compression_state = 'due';


-- == validation


-- == integrity
