-- Which messages were handled. k is made of the message's own time and a hash of who handles what, so that all copies of
-- a message land in the same partition. A partition holds one day (UTC); the store creates and drops them.
create table :"schema".postrider_inbox (
	k          uuid        not null primary key,
	handled_at timestamptz not null default now()
) partition by range (k);

-- Messages that carry no time. Cleaned by DELETE.
create table :"schema".postrider_inbox_untimed partition of :"schema".postrider_inbox
	for values from (minvalue) to ('00000000-0001-0000-0000-000000000000');

-- One row. Days up to floor were dropped and never come back; its lock is held by who creates a partition.
create table :"schema".postrider_inbox_state (
	one   boolean     not null primary key default true check (one),
	floor date        not null default '1970-01-01',
	swept timestamptz not null default '-infinity'
);
insert into :"schema".postrider_inbox_state default values;

-- What became of the actions of saga participants and of calls with a key.
create table :"schema".postrider_barrier (
	key          text        not null primary key,
	state        smallint    not null check (state between 1 and 4), -- 1 done, 2 refused, 3 nulled, 4 undone
	request      bytea,                                              -- fingerprint of the request, where a caller chose the key
	content_type text,
	reply        bytea,                                              -- the answer, or the error if refused
	at           timestamptz not null default now()
) with (fillfactor = 70);
create index postrider_barrier_at on :"schema".postrider_barrier using brin (at);

-- What became of requests with a key whose effect is not in this database.
create table :"schema".postrider_request (
	key          text collate "C" not null primary key,
	state        smallint    not null default 0 check (state between 0 and 2), -- 0 open, 1 done, 2 refused
	fence        bigint      not null default 1,                               -- rises with each owner
	until        timestamptz not null,                                         -- the end of the owner's lease, while open
	owner        text,                                                         -- who has it, for one that has not heard so
	request      bytea,                                                        -- fingerprint of the request, null when given back
	content_type text,
	reply        bytea,                                                        -- the answer, or the error if refused
	at           timestamptz not null default now()
) with (fillfactor = 70);
create index postrider_request_at on :"schema".postrider_request using brin (at);
