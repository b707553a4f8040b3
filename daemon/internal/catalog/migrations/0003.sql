-- Backups that run themselves: offerings, schedules, the queue, retention, and storage that is mounted.


-- == offerings and domains


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
-- Runs never pile up.
CREATE UNIQUE INDEX schedule_runs_one_waiting ON schedule_runs (schedule) WHERE state = 'waiting';
CREATE UNIQUE INDEX schedule_runs_one_running ON schedule_runs (schedule) WHERE state = 'running';

-- == jobs and groups


-- == quotas


-- == repositories


-- == retention


