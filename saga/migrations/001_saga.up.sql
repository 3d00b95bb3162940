-- One row a saga. State and data are json, not jsonb: what was written is what is read, byte for byte, and nobody asks
-- the database for what is inside. Rows are rewritten at every transition: the free room keeps the new version on the page.
create table :"schema".postrider_saga (
	id          uuid        primary key,
	engine      text        not null,            -- the Name of the engines that run it
	plan        text        not null,
	version     integer     not null,
	hash        text        not null,            -- of the plan: it never runs on another
	key         text        not null,            -- business key
	status      text        not null,
	state       json        not null,
	data        json        not null,
	epoch       integer     not null,            -- counts the transitions, fences them
	entries     integer     not null,            -- lines of history
	parked      text        not null default '', -- why no engine runs it
	correlation text        not null,
	traceparent text        not null,
	tracestate  text        not null,
	wake_at     timestamptz,
	started_at  timestamptz not null default clock_timestamp(),
	updated_at  timestamptz not null default clock_timestamp(),
	ended_at    timestamptz
) with (fillfactor = 70);

create unique index postrider_saga_key on :"schema".postrider_saga (engine, plan, key);
create index postrider_saga_wake_at on :"schema".postrider_saga (engine, wake_at) where wake_at is not null;

-- What happened, append-only.
create table :"schema".postrider_saga_history (
	saga    uuid        not null,
	seq     integer     not null,
	at      timestamptz not null default clock_timestamp(),
	kind    text        not null,
	step    text        not null,
	op      text        not null,
	attempt integer     not null,
	cause   text        not null,
	primary key (saga, seq)
);
