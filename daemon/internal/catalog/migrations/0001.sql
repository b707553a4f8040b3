-- Times are microseconds since the epoch, sizes are bytes, ids are ULIDs unless said otherwise.

CREATE TABLE repositories (
	id           TEXT PRIMARY KEY,
	name         TEXT NOT NULL UNIQUE,
	type         TEXT NOT NULL,
	path         TEXT NOT NULL UNIQUE,
	minimum_free INTEGER NOT NULL,
	created      INTEGER NOT NULL,
	identity     TEXT NOT NULL, -- as in virtbackup-repository.json; '' until a worker has seen it
	problem      TEXT NOT NULL, -- why it could not be used when it was last looked at; '' if it could
	total        INTEGER NOT NULL,
	free         INTEGER NOT NULL,
	checked      INTEGER NOT NULL -- 0 until then
) STRICT;

CREATE TABLE offerings (
	name        TEXT PRIMARY KEY,
	id          TEXT NOT NULL UNIQUE,
	repository  TEXT NOT NULL REFERENCES repositories (id) ON DELETE RESTRICT,
	mode        TEXT NOT NULL CHECK (mode IN ('full', 'incremental')),
	compression TEXT NOT NULL,
	level       INTEGER NOT NULL,
	threads     INTEGER NOT NULL,
	chain_size  INTEGER NOT NULL,
	quiesce     TEXT NOT NULL,
	created     INTEGER NOT NULL
) STRICT;
CREATE INDEX offerings_repository ON offerings (repository);

CREATE TABLE domains (
	uuid     TEXT PRIMARY KEY,
	name     TEXT NOT NULL, -- last seen
	offering TEXT REFERENCES offerings (name) ON DELETE RESTRICT
) STRICT;
CREATE INDEX domains_offering ON domains (offering);

CREATE TABLE chains (
	id         TEXT PRIMARY KEY, -- the id of its full backup
	domain     TEXT NOT NULL REFERENCES domains (uuid),
	repository TEXT NOT NULL REFERENCES repositories (id) ON DELETE RESTRICT,
	offering   TEXT NOT NULL, -- name, as it was
	isolated   INTEGER NOT NULL,
	state      TEXT NOT NULL CHECK (state IN ('open', 'finished', 'broken')),
	cause      TEXT NOT NULL, -- why it ended; '' while open
	created    INTEGER NOT NULL,
	CHECK (state <> 'open' OR (cause = '' AND isolated = 0))
) STRICT;
CREATE UNIQUE INDEX chains_one_open ON chains (domain, repository) WHERE state = 'open';
CREATE INDEX chains_repository ON chains (repository);

CREATE TABLE backups (
	id           TEXT PRIMARY KEY,
	domain       TEXT NOT NULL REFERENCES domains (uuid),
	domain_name  TEXT NOT NULL, -- at the time
	chain        TEXT REFERENCES chains (id), -- NULL until a full backup is committed, and when one failed
	parent       TEXT REFERENCES backups (id) DEFERRABLE INITIALLY DEFERRED,
	repository   TEXT NOT NULL REFERENCES repositories (id) ON DELETE RESTRICT,
	job          TEXT NOT NULL, -- jobs are forgotten before backups: no reference
	kind         TEXT NOT NULL CHECK (kind IN ('full', 'incremental')),
	state        TEXT NOT NULL CHECK (state IN ('running', 'complete', 'failed', 'damaged', 'deleting')),
	cause        TEXT NOT NULL, -- why it is full; '' for an increment
	isolated     INTEGER NOT NULL,
	consistency  TEXT NOT NULL,
	created      INTEGER NOT NULL,
	finished     INTEGER NOT NULL,
	size         INTEGER NOT NULL,
	stored_bytes INTEGER NOT NULL,
	data_bytes   INTEGER NOT NULL,
	error        TEXT NOT NULL,
	offering     TEXT NOT NULL, -- name, as it was; '' if none
	mode         TEXT NOT NULL,
	compression  TEXT NOT NULL,
	level        INTEGER NOT NULL,
	threads      INTEGER NOT NULL,
	chain_size   INTEGER NOT NULL,
	quiesce      TEXT NOT NULL,
	manifest     TEXT NOT NULL, -- JSON; '' until complete
	verified     INTEGER NOT NULL DEFAULT 0,
	-- A failed increment has no place in a chain, so that it holds on to nothing.
	CHECK (CASE WHEN kind = 'full' OR state = 'failed' THEN parent IS NULL ELSE parent IS NOT NULL OR state = 'deleting' END),
	CHECK (isolated = 0 OR kind = 'full')
) STRICT;
CREATE INDEX backups_domain ON backups (domain, id);
CREATE INDEX backups_chain ON backups (chain, id);
CREATE INDEX backups_parent ON backups (parent);
CREATE INDEX backups_repository ON backups (repository, id);
CREATE INDEX backups_job ON backups (job);

CREATE TABLE images (
	backup       TEXT NOT NULL REFERENCES backups (id) ON DELETE CASCADE,
	position     INTEGER NOT NULL, -- in the domain's definition
	target       TEXT NOT NULL,
	kind         TEXT NOT NULL CHECK (kind IN ('full', 'incremental')),
	tracking     TEXT NOT NULL CHECK (tracking IN ('cbt', 'snapshot', 'digest', 'none')),
	cause        TEXT NOT NULL, -- why it is full; '' for an increment
	source       TEXT NOT NULL,
	format       TEXT NOT NULL, -- of the source
	size         INTEGER NOT NULL,
	stored_bytes INTEGER NOT NULL,
	data_bytes   INTEGER NOT NULL,
	PRIMARY KEY (backup, target)
) STRICT, WITHOUT ROWID;

-- A row outlives its backup: libvirt accepts a checkpoint of an older copy of an
-- image under a name that is used again, so a name is used once, for ever.
CREATE TABLE checkpoints (
	name   TEXT PRIMARY KEY,
	domain TEXT NOT NULL REFERENCES domains (uuid),
	backup TEXT NOT NULL UNIQUE, -- no reference: see above
	chain  TEXT NOT NULL,
	state  TEXT NOT NULL CHECK (state IN ('pending', 'current', 'obsolete', 'removed')),
	xml    TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX checkpoints_one_current ON checkpoints (chain) WHERE state = 'current';
CREATE INDEX checkpoints_domain ON checkpoints (domain, state);

CREATE TABLE jobs (
	id            TEXT PRIMARY KEY,
	kind          TEXT NOT NULL,
	domain        TEXT NOT NULL, -- '' if none; no reference: a job may be about something that goes away
	repository    TEXT NOT NULL,
	backup        TEXT NOT NULL,
	spec          TEXT NOT NULL, -- JSON
	state         TEXT NOT NULL CHECK (state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')),
	step          TEXT NOT NULL,
	step_data     TEXT NOT NULL, -- JSON
	undoing       INTEGER NOT NULL, -- it is to fail or be cancelled: only clearing up is left
	result        TEXT NOT NULL, -- JSON
	error_name    TEXT NOT NULL,
	error_message TEXT NOT NULL,
	uid           INTEGER NOT NULL,
	created       INTEGER NOT NULL,
	started       INTEGER NOT NULL, -- 0 until started
	finished      INTEGER NOT NULL, -- 0 until finished
	phase         TEXT NOT NULL, -- at the end
	done          INTEGER NOT NULL,
	total         INTEGER NOT NULL,
	CHECK ((finished <> 0) = (state IN ('succeeded', 'failed', 'cancelled')))
) STRICT;
CREATE INDEX jobs_unfinished ON jobs (state) WHERE finished = 0;
CREATE INDEX jobs_finished ON jobs (finished) WHERE finished <> 0;
CREATE INDEX jobs_domain ON jobs (domain, id);

CREATE TABLE job_messages (
	job     TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
	number  INTEGER NOT NULL,
	time    INTEGER NOT NULL,
	level   INTEGER NOT NULL, -- as log/slog
	message TEXT NOT NULL,
	PRIMARY KEY (job, number)
) STRICT, WITHOUT ROWID;
