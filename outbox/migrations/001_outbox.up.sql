-- The numbers that order the outbox. Never give it a CACHE above 1: a session that hands out numbers drawn earlier breaks
-- the order of a key, and the relay would pass over them.
create sequence :"schema".postrider_outbox_seq cache 1;

-- One row is one message to be sent. Whoever may INSERT may publish: topic and data suffice, attributes NULL means that the
-- relay makes up the CloudEvents attributes. Rows are inserted, never updated, never deleted: three tables are filled in
-- turn, each for one period, and truncated when all their rows are sent.
--
-- The order of the first two columns matters: the transaction must have its xid before it draws the id. The others stand so
-- that nothing is lost to alignment.
create table :"schema".postrider_outbox (
	xid        xid8        not null default pg_current_xact_id(),
	id         bigint      not null default nextval(':"schema".postrider_outbox_seq'),
	at         timestamptz not null default clock_timestamp(),
	slot       smallint    not null default floor(date_part('epoch', clock_timestamp()) / 300::double precision)::bigint % 3::bigint,
	topic      text        not null,
	attributes bytea,      -- CloudEvents protobuf format, without the data
	data       bytea
) partition by list (slot);

create table :"schema".postrider_outbox_0 partition of :"schema".postrider_outbox for values in (0);
create table :"schema".postrider_outbox_1 partition of :"schema".postrider_outbox for values in (1);
create table :"schema".postrider_outbox_2 partition of :"schema".postrider_outbox for values in (2);
create index postrider_outbox_id on :"schema".postrider_outbox (id);

-- The one row of the relay that leads: its lease and how far it is. It is rewritten ten times a second under load, which
-- the fill factor keeps inside one page.
create table :"schema".postrider_outbox_relay (
	only_row  boolean          primary key default true check (only_row),
	identity  uuid             not null default gen_random_uuid(), -- of this outbox, for the ids of rows without attributes
	system_id bigint           not null,                           -- of the cluster whose xids these are
	period    double precision not null default 300,               -- seconds, as in the default of slot
	owner     text             not null default '',
	fence     bigint           not null default 0,                 -- counts the terms
	expires   timestamptz      not null default '-infinity',
	ttl       double precision not null default 0,                 -- seconds, that expires is renewed by
	prev      pg_snapshot      not null default '1:1:',            -- all rows that it sees are sent
	cur       pg_snapshot,                                         -- of those that it sees ...
	last      bigint           not null default 0,                 -- ... the ones up to this id are sent
	floor     bigint           not null default 0,                 -- ids of transactions from prev's xmax on are higher
	floors    jsonb            not null default '{}',              -- the same for each transaction open in prev
	sent      bigint           not null default 0,                 -- messages, since the outbox was made
	rate      double precision not null default 0,                 -- messages a second, of about the last ten seconds
	failure   text             not null default '',                -- the last one of the relay ...
	failed_at timestamptz,                                         -- ... and when it was
	paused_at timestamptz,                                         -- since when nothing is sent, NULL: it is not paused
	paused_by text             not null default '',
	paused_for text            not null default ''                 -- why
) with (fillfactor = 20);

insert into :"schema".postrider_outbox_relay (system_id) select system_identifier from pg_control_system();

-- Where the broker's streams ended when all up to a cursor was accepted, once a second at most: by them the relay finds
-- out what a broker has lost, and goes back. They are kept as long as sent messages are.
create table :"schema".postrider_outbox_mark (
	n      bigint      primary key generated always as identity,
	at     timestamptz not null default clock_timestamp(),
	prev   pg_snapshot not null, -- the cursor, as above
	cur    pg_snapshot,
	last   bigint      not null,
	floor  bigint      not null,
	floors jsonb       not null,
	tails  jsonb       not null  -- by stream
);

-- What the broker refused for good.
create table :"schema".postrider_outbox_dead (
	id         bigint      primary key,
	at         timestamptz not null,
	topic      text        not null,
	attributes bytea,
	data       bytea,
	cause      text        not null,
	died_at    timestamptz not null default now()
);

-- What operators did. Rows are never removed by the library.
create table :"schema".postrider_outbox_log (
	n          bigint      primary key generated always as identity,
	at         timestamptz not null default clock_timestamp(),
	done       text        not null, -- pause, resume, replay, discard, resend
	by         text        not null,
	why        text        not null,
	messages   integer,              -- how many were taken
	letter     bigint,               -- the number of the dead letter
	topic      text,                 -- its own, or the filter's
	attributes bytea,
	cause      text
);

-- The fields of a protobuf message: bytes as they are, of other kinds none.
create function :"schema".postrider_outbox_fields(message bytea) returns table (field bigint, value bytea)
language plpgsql immutable strict parallel safe set search_path = pg_catalog as $$
declare
	at integer := 0;
	n bigint;
	shift integer;
	tag bigint;
begin
	while at < length(message) loop
		tag := 0;
		shift := 0;
		loop
			n := get_byte(message, at);
			at := at + 1;
			tag := tag | ((n & 127) << shift);
			exit when n < 128;
			shift := shift + 7;
		end loop;
		field := tag >> 3;
		value := null;
		case tag & 7
		when 0 then
			while get_byte(message, at) >= 128 loop
				at := at + 1;
			end loop;
			at := at + 1;
		when 1 then
			at := at + 8;
		when 5 then
			at := at + 4;
		else
			n := 0;
			shift := 0;
			loop
				tag := get_byte(message, at);
				at := at + 1;
				n := n | ((tag & 127) << shift);
				exit when tag < 128;
				shift := shift + 7;
			end loop;
			if n < 0 or n > length(message) - at then
				raise exception 'a field ends behind the message';
			end if;
			value := substring(message from at + 1 for n::integer);
			at := at + n::integer;
		end case;
		return next;
	end loop;
end
$$;

-- An attribute of a CloudEvent in the protobuf format that is a text, NULL if it has none or cannot be read. It catches errors, for
-- which PostgreSQL begins a subtransaction, which it does not do in parallel queries.
create function :"schema".postrider_outbox_attribute(event bytea, name text) returns text
language plpgsql immutable strict parallel unsafe set search_path = pg_catalog as $$
declare
	found bytea;
begin
	if name in ('id', 'source', 'type') then
		select f.value into found from :"schema".postrider_outbox_fields(event) as f
		where f.field = case name when 'id' then 1 when 'source' then 2 else 4 end;
	else
		select text.value into found
		from :"schema".postrider_outbox_fields(event) as entry,
			lateral :"schema".postrider_outbox_fields(entry.value) as key,
			lateral :"schema".postrider_outbox_fields(entry.value) as val,
			lateral :"schema".postrider_outbox_fields(val.value) as text
		where entry.field = 5 and key.field = 1 and val.field = 2 and text.field in (3, 5, 6) and key.value = convert_to(name, 'UTF8');
	end if;
	return convert_from(found, 'UTF8');
exception when others then
	return null;
end
$$;

-- What the outbox retains, with the columns of Debezium's outbox event router, for tools that read tables.
create view :"schema".postrider_outbox_events as
select coalesce(:"schema".postrider_outbox_attribute(attributes, 'id'), r.identity::text || '-' || o.id::text) as id,
	topic as aggregatetype,
	coalesce(:"schema".postrider_outbox_attribute(attributes, 'partitionkey'),
		:"schema".postrider_outbox_attribute(attributes, 'id'), r.identity::text || '-' || o.id::text) as aggregateid,
	coalesce(:"schema".postrider_outbox_attribute(attributes, 'type'), topic) as type,
	data as payload,
	o.at as timestamp,
	o.id as number
from :"schema".postrider_outbox as o, :"schema".postrider_outbox_relay as r;
