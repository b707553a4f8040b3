-- What offerings want when changes are not known, and when a guest cannot be quiesced.
ALTER TABLE offerings ADD COLUMN tracking TEXT NOT NULL DEFAULT 'cbt' CHECK (tracking IN ('cbt', 'digest', 'snapshot'));
ALTER TABLE offerings ADD COLUMN fallback TEXT NOT NULL DEFAULT 'digest' CHECK (fallback IN ('digest', 'full'));
ALTER TABLE offerings ADD COLUMN quiesce_policy TEXT NOT NULL DEFAULT 'require' CHECK (quiesce_policy IN ('require', 'prefer'));

ALTER TABLE backups ADD COLUMN tracking TEXT NOT NULL DEFAULT 'cbt';
ALTER TABLE backups ADD COLUMN fallback TEXT NOT NULL DEFAULT 'digest';
ALTER TABLE backups ADD COLUMN quiesce_policy TEXT NOT NULL DEFAULT 'require';
ALTER TABLE backups ADD COLUMN held INTEGER NOT NULL DEFAULT 0; -- microseconds that the guest was held still
ALTER TABLE backups ADD COLUMN shortfall TEXT NOT NULL DEFAULT ''; -- why it is less consistent than asked for
ALTER TABLE backups ADD COLUMN mark INTEGER NOT NULL DEFAULT 0; -- the newest of marks before its point in time

ALTER TABLE images ADD COLUMN changes TEXT NOT NULL DEFAULT '' CHECK (changes IN ('', 'cbt', 'snapshot', 'digest')); -- how an increment's were found
ALTER TABLE images ADD COLUMN read_bytes INTEGER NOT NULL DEFAULT 0; -- from the source
ALTER TABLE images ADD COLUMN backing TEXT NOT NULL DEFAULT '[]'; -- JSON: paths of the source's layers below the top
ALTER TABLE images ADD COLUMN run TEXT NOT NULL DEFAULT ''; -- of QEMU, '' when the domain was off
ALTER TABLE images ADD COLUMN node INTEGER NOT NULL DEFAULT 0; -- libvirt's index of the top layer in that run

-- What lifecycle knows of each domain.
CREATE TABLE tracking (
	domain TEXT PRIMARY KEY, -- UUID; no reference: hooks tell of domains that were never backed up
	known  TEXT NOT NULL -- JSON, see daemon/internal/lifecycle
) STRICT;

-- Disks that changed unseen, or may have.
CREATE TABLE marks (
	number INTEGER PRIMARY KEY AUTOINCREMENT,
	domain TEXT NOT NULL, -- UUID
	target TEXT NOT NULL, -- '' for all disks
	cause  TEXT NOT NULL,
	detail TEXT NOT NULL, -- for people
	time   INTEGER NOT NULL
) STRICT;
CREATE INDEX marks_domain ON marks (domain, number);

-- Overlays that we put on disks of domains (tracking by snapshot), recorded
-- before they are made and until they are gone.
CREATE TABLE overlays (
	path       TEXT PRIMARY KEY,
	domain     TEXT NOT NULL, -- UUID
	backup     TEXT NOT NULL, -- at whose point in time it was made; no reference: it may outlive the backup
	target     TEXT NOT NULL,
	committing INTEGER NOT NULL DEFAULT 0, -- it is being committed into the layer below, or was
	committed  INTEGER NOT NULL DEFAULT 0 -- its mtime, ns since the epoch, when all that it held was in the layer below
) STRICT;
CREATE INDEX overlays_domain ON overlays (domain);
