-- Backups that run themselves: offerings, schedules, the queue, retention, and storage that is mounted.


-- == offerings and domains

ALTER TABLE offerings ADD COLUMN description TEXT NOT NULL DEFAULT '';
ALTER TABLE offerings ADD COLUMN origin TEXT NOT NULL DEFAULT ''; -- the file that it is read from; '' if it was made by a call
ALTER TABLE offerings ADD COLUMN disabled INTEGER NOT NULL DEFAULT 0; -- it makes no backups
ALTER TABLE offerings ADD COLUMN users TEXT NOT NULL DEFAULT '[]'; -- JSON: users, and groups with an @ before; empty: everybody
ALTER TABLE offerings ADD COLUMN user_backups INTEGER NOT NULL DEFAULT 1;
ALTER TABLE offerings ADD COLUMN user_schedules INTEGER NOT NULL DEFAULT 1;
ALTER TABLE offerings ADD COLUMN quick_restore INTEGER NOT NULL DEFAULT 1;
ALTER TABLE offerings ADD COLUMN file_extraction INTEGER NOT NULL DEFAULT 1;
ALTER TABLE offerings ADD COLUMN validate INTEGER NOT NULL DEFAULT 0;
ALTER TABLE offerings ADD COLUMN validation_steps TEXT NOT NULL DEFAULT '[]'; -- JSON
ALTER TABLE offerings ADD COLUMN compression_time TEXT NOT NULL DEFAULT 'inline' CHECK (compression_time IN ('inline', 'deferred'));
ALTER TABLE offerings ADD COLUMN include_disks TEXT NOT NULL DEFAULT '[]'; -- JSON: targets; empty: all
ALTER TABLE offerings ADD COLUMN exclude_disks TEXT NOT NULL DEFAULT '[]'; -- JSON: targets
ALTER TABLE offerings ADD COLUMN volatile_disks INTEGER NOT NULL DEFAULT 0; -- transient disks are backed up too
ALTER TABLE offerings ADD COLUMN keep_last INTEGER NOT NULL DEFAULT 0; -- backups; all of these 0: nothing is ever removed
ALTER TABLE offerings ADD COLUMN keep_hourly INTEGER NOT NULL DEFAULT 0;
ALTER TABLE offerings ADD COLUMN keep_daily INTEGER NOT NULL DEFAULT 0;
ALTER TABLE offerings ADD COLUMN keep_weekly INTEGER NOT NULL DEFAULT 0;
ALTER TABLE offerings ADD COLUMN keep_monthly INTEGER NOT NULL DEFAULT 0;
ALTER TABLE offerings ADD COLUMN keep_yearly INTEGER NOT NULL DEFAULT 0;

ALTER TABLE domains ADD COLUMN overrides TEXT NOT NULL DEFAULT ''; -- JSON: what it has in place of its offering's settings

ALTER TABLE backups ADD COLUMN compression_time TEXT NOT NULL DEFAULT 'inline';


-- == schedules

-- Offerings and domains are no references: a schedule outlives what it is for, and says so.
CREATE TABLE schedules (
	id               TEXT PRIMARY KEY,
	name             TEXT NOT NULL UNIQUE,
	domain           TEXT NOT NULL, -- UUID; '' if it is for an offering's domains
	offering         TEXT NOT NULL, -- name; '' if it is for a domain
	repository       TEXT REFERENCES repositories (id) ON DELETE RESTRICT, -- in place of the offering's; NULL for that
	calendars        TEXT NOT NULL, -- JSON list of systemd's OnCalendar=
	randomized_delay INTEGER NOT NULL, -- microseconds
	persistent       INTEGER NOT NULL, -- a run that was missed is made up for
	isolated         INTEGER NOT NULL,
	quiesce          TEXT NOT NULL, -- in place of the offering's; '' for that
	overlap          TEXT NOT NULL CHECK (overlap IN ('skip', 'queue')),
	enabled          INTEGER NOT NULL,
	uid              INTEGER NOT NULL, -- who made it
	created          INTEGER NOT NULL,
	CHECK ((domain = '') <> (offering = ''))
) STRICT;
CREATE INDEX schedules_domain ON schedules (domain);
CREATE INDEX schedules_offering ON schedules (offering);
CREATE INDEX schedules_repository ON schedules (repository);

-- What became of each time that a schedule was due, or was triggered by somebody.
CREATE TABLE schedule_runs (
	id       TEXT PRIMARY KEY,
	schedule TEXT NOT NULL REFERENCES schedules (id) ON DELETE CASCADE,
	state    TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'succeeded', 'failed', 'skipped', 'cancelled')),
	reason   TEXT NOT NULL, -- why it waits, was skipped, or failed
	jobs     TEXT NOT NULL, -- JSON list of ids
	timer    INTEGER NOT NULL, -- its timer was due; otherwise somebody triggered it
	uid      INTEGER NOT NULL,
	created  INTEGER NOT NULL,
	finished INTEGER NOT NULL -- 0 until then
) STRICT;
CREATE INDEX schedule_runs_schedule ON schedule_runs (schedule, id);
CREATE INDEX schedule_runs_state ON schedule_runs (schedule, state, id);
-- Runs never pile up.
CREATE UNIQUE INDEX schedule_runs_one_waiting ON schedule_runs (schedule) WHERE state = 'waiting';
CREATE UNIQUE INDEX schedule_runs_one_running ON schedule_runs (schedule) WHERE state = 'running';

-- == jobs and groups

ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 50; -- 0 to 99: the higher goes first
ALTER TABLE jobs ADD COLUMN origin TEXT NOT NULL DEFAULT 'user' CHECK (origin IN ('user', 'schedule', 'system'));
ALTER TABLE jobs ADD COLUMN schedule TEXT NOT NULL DEFAULT ''; -- id of the one that started it; no reference, as of what else it is about
ALTER TABLE jobs ADD COLUMN parent TEXT NOT NULL DEFAULT ''; -- the group that it is of
ALTER TABLE jobs ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1; -- how often it may be tried
ALTER TABLE jobs ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0; -- how often it was begun
ALTER TABLE jobs ADD COLUMN again INTEGER NOT NULL DEFAULT 0; -- while it is undone: it is to be tried again then
ALTER TABLE jobs ADD COLUMN next_try INTEGER NOT NULL DEFAULT 0; -- not before; 0 for at once
CREATE INDEX jobs_parent ON jobs (parent, id);


-- == quotas

CREATE TABLE quotas (
	kind    TEXT NOT NULL CHECK (kind IN ('domain', 'offering', 'user')),
	subject TEXT NOT NULL, -- UUID, name, or uid; no reference: a quota may be there before what it bounds
	bytes   INTEGER NOT NULL, -- 0 for no bound, as of the others
	backups INTEGER NOT NULL,
	chains  INTEGER NOT NULL,
	PRIMARY KEY (kind, subject)
) STRICT, WITHOUT ROWID;

ALTER TABLE backups ADD COLUMN uid INTEGER NOT NULL DEFAULT 0; -- who asked for it
UPDATE backups SET uid = coalesce((SELECT uid FROM jobs WHERE jobs.id = backups.job), 0);
-- All that usage is made of: the rows themselves hold manifests, and are too large to be read for that.
CREATE INDEX backups_usage ON backups (domain, repository, state, id, offering, uid, chain, created, size, stored_bytes);

ALTER TABLE jobs ADD COLUMN told INTEGER NOT NULL DEFAULT 0; -- its end was told outside
UPDATE jobs SET told = 1 WHERE finished <> 0;
CREATE INDEX jobs_untold ON jobs (id) WHERE told = 0 AND finished <> 0;


-- == repositories

-- The path of one that is mounted is its mount point.
ALTER TABLE repositories ADD COLUMN address TEXT NOT NULL DEFAULT ''; -- of what is mounted; '' for a directory
ALTER TABLE repositories ADD COLUMN file_system TEXT NOT NULL DEFAULT ''; -- of type mount
ALTER TABLE repositories ADD COLUMN options TEXT NOT NULL DEFAULT '[]'; -- JSON list: of the mount
ALTER TABLE repositories ADD COLUMN credentials INTEGER NOT NULL DEFAULT 0; -- there is a file with some
ALTER TABLE repositories ADD COLUMN state TEXT NOT NULL DEFAULT 'unknown'; -- as of package health
ALTER TABLE repositories ADD COLUMN since INTEGER NOT NULL DEFAULT 0; -- it has this state
CREATE UNIQUE INDEX repositories_address ON repositories (type, address, file_system, options) WHERE address <> '';


ALTER TABLE backups ADD COLUMN pin TEXT NOT NULL DEFAULT ''; -- of the manifest of one that another host made


-- == retention

ALTER TABLE backups ADD COLUMN hold TEXT NOT NULL DEFAULT ''; -- why it must stay, by somebody's word; '' if it may go
ALTER TABLE backups ADD COLUMN sequence INTEGER NOT NULL DEFAULT 0; -- the order in which backups were committed; 0 until then
UPDATE backups SET sequence = rowid WHERE state NOT IN ('running', 'failed');
CREATE INDEX backups_place ON backups (domain, repository, sequence);


-- == scale

-- What the API asks for is found without reading a whole table, see TestNoTableIsReadWhole.
CREATE INDEX backups_complete ON backups (domain, id) WHERE state = 'complete';
CREATE INDEX backups_running ON backups (id) WHERE state = 'running';
CREATE INDEX backups_deleting ON backups (id) WHERE state = 'deleting';
CREATE INDEX backups_damaged ON backups (id) WHERE state = 'damaged';
CREATE INDEX backups_sequence ON backups (sequence);
CREATE INDEX backups_created ON backups (created, id);
CREATE INDEX backups_offering ON backups (offering, id);
CREATE INDEX chains_domain ON chains (domain, repository, id);
CREATE INDEX jobs_backed_up ON jobs (domain, id) WHERE kind = 'backup' AND state IN ('succeeded', 'failed');
CREATE INDEX jobs_live ON jobs (id) WHERE finished = 0;
CREATE INDEX jobs_state ON jobs (state, id);
CREATE INDEX jobs_kind ON jobs (kind, id);
