package outbox

import (
	"strings"

	"github.com/postrider/postrider/internal/migrate"
)

// queries are the statements of one outbox. The database's clock decides everything that is compared with its rows. Who may create
// functions and operators in a schema of the search path can have them called in the place of those of pg_catalog where they fit the
// types better (CVE-2018-1058): so the types are written where they would be converted, or pg_catalog is.
type queries struct {
	lockKeys, insertOne, insertKeyed               string // in the user's transaction
	insertMany, insertManyKeyed, depth, returning  string // the same
	sequence, acquire, probe, plan, page, write    string // the relay's ordinary work
	dead, adopt, adoptCursor, covered              string // what happens seldom
	mark, marks, toMark, dropMarks                 string // what the broker had when
	status, pause, resume                          string // for operators
	deadList, deadTake                             string // the same
	resendEnd, resendRows, resendNote              string // the same
	ringState, ringLock, ringCovered, ringTruncate string // one slot of the ring; %d is its number
	ringPeriodLock, ringPeriod, ringPeriodNote     string // another Retain
	auditLock, auditBegin, auditRows, auditFind    string // for who looks
}

const lockKeys = `
			select pg_advisory_xact_lock(h) from (
				select distinct pg_catalog.hashtextextended('postrider_outbox.' || k, 0) as h from unnest($1::text[]) as k order by h
			) as sorted`

func newQueries(schema string) queries {
	in := func(sql string) string { return migrate.In(schema, sql) }
	return queries{
		// Takes the transaction-scoped advisory locks of some keys, in the order of their hashes, so that two of these
		// statements cannot deadlock. A key is prefixed by its schema. The package's documentation tells SQL writers of it.
		lockKeys: lockKeys,

		// Writers lock nothing but their keys and their own new rows, and share the table. With keys, a row draws its number
		// when it comes out of the CTE, which is after the locks are held, and the order by comes before it as well.
		insertOne: in(`insert into :"schema".postrider_outbox (topic, attributes, data) values ($1, $2, $3)`),
		insertKeyed: in(`
			with locked as materialized (select pg_advisory_xact_lock(pg_catalog.hashtextextended('postrider_outbox.' || $4::text, 0)))
			insert into :"schema".postrider_outbox (topic, attributes, data)
			select $1::text, $2::bytea, $3::bytea from locked`),
		insertMany: in(`
			insert into :"schema".postrider_outbox (topic, attributes, data)
			select t, a, d from unnest($1::text[], $2::bytea[], $3::bytea[]) with ordinality as u (t, a, d, n) order by n`),
		insertManyKeyed: in(`
			with locked as materialized (select count(*) from (` + strings.Replace(lockKeys, "$1", "$4", 1) + ` offset 0) as l)
			insert into :"schema".postrider_outbox (topic, attributes, data)
			select t, a, d from locked, unnest($1::text[], $2::bytea[], $3::bytea[]) with ordinality as u (t, a, d, n) order by n`),

		// Added to an insert it returns the numbers in the order of the rows, and whether the outbox is paused. One row by its
		// key.
		returning: in(` returning id, (select paused_at is not null from :"schema".postrider_outbox_relay)`),

		// About how many messages wait: the highest number drawn less the one up to which the cursor is written. One row.
		depth: in(`
			select (select last_value - (not is_called)::int from :"schema".postrider_outbox_seq)
				- case when cur is null then floor else greatest(floor, last) end
			from :"schema".postrider_outbox_relay`),

		sequence: `select seqcache from pg_sequence where seqrelid = to_regclass($1)`,

		// Takes the lease if it is free, has run out or is our own from a term that ended badly. One that ends later than it
		// can is from before the database's clock was set back: its holder, if it lives, is fenced. One row by its key;
		// waits for a concurrent write of it, that is a moment.
		acquire: in(`
			update :"schema".postrider_outbox_relay
			set owner = $1, fence = fence + 1, expires = clock_timestamp() + make_interval(secs => $2), ttl = $2
			where expires not between clock_timestamp() and clock_timestamp() + make_interval(secs => ttl) or owner = $1
			returning fence, identity::text, period, system_id = (select system_identifier from pg_control_system()),
				pg_postmaster_start_time(), prev::text, coalesce(cur::text, ''), last, floor, floors`),

		// What can be seen now, the highest number drawn, and whether the outbox is paused: the cost of an idle poll, which
		// touches no table but that of one row. The snapshot of a statement is taken before the sequence is read, so that a
		// number that is not higher than the floor proves that the snapshot sees nothing new.
		probe: in(`
			select pg_current_snapshot()::text, last_value - (not is_called)::int, pg_postmaster_start_time(), clock_timestamp(),
				(select paused_at is not null from :"schema".postrider_outbox_relay)
			from :"schema".postrider_outbox_seq`),

		// Goes ahead of page, in the same implicit transaction. Only the walk along the index stops after a page; statistics
		// that lag behind a growing backlog make the planner read and sort all of it. That one plan is made once for a
		// connection: to make it takes longer than to read a small page. It does not know the limit, and its cost for
		// millions of rows would have it compiled anew for each page, which takes longer still.
		plan: `
			select set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
				set_config('enable_sort', 'off', true), set_config('plan_cache_mode', 'force_generic_plan', true),
				set_config('jit', 'off', true)`,

		// The rows above $1 that snapshot $4 sees and the cursor's does not: their transactions came later ($2, its xmax) or
		// were open then and have ended since ($3). The index on id of each slot, merged; no row is locked. The parameters
		// stand in subqueries, which are evaluated once: the texts would be parsed again for every row.
		page: in(`
			select id, at, topic, attributes, data from :"schema".postrider_outbox
			where id > $1 and (xid >= (select $2::text::xid8) or xid = any((select $3::text[]::xid8[])::xid8[]))
				and pg_visible_in_snapshot(xid, (select $4::text::pg_snapshot))
			order by id limit $5`),

		// Writes the cursor and renews the lease, or gives it back ($3 null), if it is still ours. One row by its key. The
		// number is read after this transaction has its xid; see cursor.begin for what that means.
		write: in(`
			update :"schema".postrider_outbox_relay
			set expires = coalesce(clock_timestamp() + make_interval(secs => $3), '-infinity'),
				prev = $4::text::pg_snapshot, cur = nullif($5, '')::pg_snapshot, last = $6, floor = $7, floors = $8,
				sent = sent + $9, rate = $10, failure = coalesce($11, failure),
				failed_at = case when $11::text is null then failed_at else clock_timestamp() end
			where fence = $1 and owner = $2
			returning (select last_value - (not is_called)::int from :"schema".postrider_outbox_seq), paused_at is not null`),

		// What Status tells. Waiting are the rows that the cursor as written does not see: the walk begins where the page
		// query would begin and ends after 10,001 rows. What transactions that ended late left below it is not counted. The
		// index on id; no lock but that of reading.
		status: in(`
			with r as materialized (
				select *, case when cur is not null then last else least(floor, (
						select min(f.value::bigint) from jsonb_each_text(floors) as f
						where pg_visible_in_snapshot(f.key::xid8, pg_current_snapshot()))) end as low,
					(select last_value - (not is_called)::int from :"schema".postrider_outbox_seq) as highest
				from :"schema".postrider_outbox_relay
			), waiting as materialized (
				select at from :"schema".postrider_outbox
				where id > (select low from r) and not pg_visible_in_snapshot(xid, (select prev from r))
				order by id limit 10001
			)
			select case when w.n <= 10000 then w.n else greatest(w.n, r.highest - r.low) end,
				coalesce(extract(epoch from clock_timestamp() - w.oldest), 0)::double precision,
				case when r.expires > clock_timestamp() then r.rate else 0 end, r.sent,
				(select count(*) from :"schema".postrider_outbox_dead),
				case when r.expires > clock_timestamp() then r.owner else '' end, r.fence,
				extract(epoch from greatest(case when isfinite(r.expires) then r.expires - clock_timestamp() end, '0'))::double precision,
				r.failure, r.failed_at, r.paused_at, r.paused_by, r.paused_for,
				array[pg_total_relation_size(':"schema".postrider_outbox_0'::regclass), pg_total_relation_size(':"schema".postrider_outbox_1'::regclass),
					pg_total_relation_size(':"schema".postrider_outbox_2'::regclass)]
			from r, (select count(*) as n, min(at) as oldest from waiting) as w`),

		// Dead letters that a filter selects, a page of them by the primary key.
		deadList: in(`
			select id, at, topic, attributes, data, cause, died_at from :"schema".postrider_outbox_dead
			where ($1 = '' or topic ~ $1) and strpos(cause, $2) > 0
				and ($3::timestamptz is null or at >= $3) and ($4::timestamptz is null or at < $4) and id > $5
			order by id limit $6`),
		// Takes dead letters away and notes who did it. Locks them; who comes second finds none.
		deadTake: in(`
			with gone as (
				delete from :"schema".postrider_outbox_dead where id = any($1::bigint[])
				returning id, at, topic, attributes, data, cause, died_at
			), noted as (
				insert into :"schema".postrider_outbox_log (done, by, why, messages, letter, topic, attributes, cause)
				select $2, $3, $4, 1, id, topic, attributes, cause from gone order by id
			)
			select * from gone order by id`),

		// What was sent and is retained still, a page by the index on id. It keeps the ring from being truncated meanwhile.
		resendEnd: in(`
			select identity::text, (select last_value from :"schema".postrider_outbox_seq) from :"schema".postrider_outbox_relay`),
		resendRows: in(`
			select id, at, topic, attributes, data from :"schema".postrider_outbox as o
			where ($1 = '' or topic ~ $1) and $2::text is not null
				and ($3::timestamptz is null or at >= $3) and ($4::timestamptz is null or at < $4) and id > $5
				and (pg_visible_in_snapshot(xid, (select prev from :"schema".postrider_outbox_relay))
					or pg_visible_in_snapshot(xid, (select cur from :"schema".postrider_outbox_relay))
						and id <= (select last from :"schema".postrider_outbox_relay))
				and id <= $7 and not exists (select from :"schema".postrider_outbox_dead as d where d.id = o.id)
			order by id limit $6`),
		resendNote: in(`
			insert into :"schema".postrider_outbox_log (done, by, why, topic, messages) values ('resend', $1, $2, $3, $4)`),

		// One row by its key. The relay reads it with its next poll.
		pause: in(`
			with noted as (insert into :"schema".postrider_outbox_log (done, by, why) values ('pause', $1, $2))
			update :"schema".postrider_outbox_relay
			set paused_at = coalesce(paused_at, clock_timestamp()), paused_by = $1, paused_for = $2`),
		resume: in(`
			with noted as (insert into :"schema".postrider_outbox_log (done, by, why) values ('resume', $1, $2))
			update :"schema".postrider_outbox_relay set paused_at = null, paused_by = '', paused_for = ''`),

		// Copies rows to the dead letters; one that is there from before a crash stays. The index on id.
		dead: in(`
			insert into :"schema".postrider_outbox_dead (id, at, topic, attributes, data, cause)
			select o.id, o.at, o.topic, o.attributes, o.data, c.cause
			from unnest($1::bigint[], $2::text[]) as c (id, cause) join :"schema".postrider_outbox as o on o.id = c.id
			on conflict (id) do nothing`),

		// Which of some rows the cursor of a mark covers. The index on id.
		covered: in(`
			select id from :"schema".postrider_outbox
			where id = any($1::bigint[]) and (pg_visible_in_snapshot(xid, (select $2::text::pg_snapshot))
				or id <= $4 and pg_visible_in_snapshot(xid, (select nullif($3::text, '')::pg_snapshot)))`),

		// Adds a mark, if the lease is still ours, and removes those that are $9 older. By the primary key.
		mark: in(`
			with old as (
				delete from :"schema".postrider_outbox_mark where n < (select max(n) - $9 from :"schema".postrider_outbox_mark)
			)
			insert into :"schema".postrider_outbox_mark (prev, cur, last, floor, floors, tails)
			select $3::text::pg_snapshot, nullif($4, '')::pg_snapshot, $5, $6, $7, $8
			from :"schema".postrider_outbox_relay where fence = $1 and owner = $2`),
		marks: in(`
			select n, at, tails, prev::text, coalesce(cur::text, ''), last, floor, floors
			from :"schema".postrider_outbox_mark order by n desc limit $1`),
		// Puts the cursor back to a mark, and removes those behind it.
		toMark: in(`
			update :"schema".postrider_outbox_relay as r
			set prev = m.prev, cur = m.cur, last = m.last, floor = m.floor, floors = m.floors
			from :"schema".postrider_outbox_mark as m where fence = $1 and owner = $2 and n = $3`),
		dropMarks: in(`delete from :"schema".postrider_outbox_mark where n > $1`),

		// Makes the rows of another cluster, whose xids mean nothing here, rows of this transaction, and forgets the cursor.
		// Both run under an exclusive lock of the outbox.
		adopt: in(`
			lock table :"schema".postrider_outbox in access exclusive mode;
			update :"schema".postrider_outbox set xid = pg_current_xact_id()`),
		adoptCursor: in(`
			update :"schema".postrider_outbox_relay
			set prev = '1:1:', cur = null, last = 0, floor = 0, floors = '{}',
				system_id = (select system_identifier from pg_control_system())
			where fence = $1 and owner = $2`),

		// The slot whose turn it is to be emptied, the next to be filled, and whether there is something in it.
		ringState: in(`
			select n, case n
				when 0 then exists (select from :"schema".postrider_outbox_0)
				when 1 then exists (select from :"schema".postrider_outbox_1)
				else exists (select from :"schema".postrider_outbox_2) end
			from (select (floor(date_part('epoch', clock_timestamp()) / $1::double precision) + 1::double precision)::bigint % 3::bigint as n) as s`),
		ringLock: in(`lock table :"schema".postrider_outbox_%d in access exclusive mode nowait`),

		// Under the lock there is no row of an open transaction, so what the durable cursor sees is all there is.
		ringCovered: in(`
			select not exists (select from :"schema".postrider_outbox_%d where not pg_visible_in_snapshot(xid, r.prev))
			from :"schema".postrider_outbox_relay as r where fence = $1 and owner = $2`),
		ringTruncate: in(`truncate :"schema".postrider_outbox_%d`),

		// All writers need this lock of the parent, so it is asked for only for a moment.
		ringPeriodLock: in(`set local lock_timeout = '50ms'; lock table only :"schema".postrider_outbox in access exclusive mode`),
		ringPeriod: in(`
			alter table only :"schema".postrider_outbox
			alter slot set default floor(date_part('epoch', clock_timestamp()) / '%g'::double precision)::bigint %% 3::bigint`),
		ringPeriodNote: in(`update :"schema".postrider_outbox_relay set period = $3 where fence = $1 and owner = $2`),

		// Ahead of the audit's snapshot, which does not see that a table was truncated: from here on none is, and the relay
		// tries again later. Nobody else waits.
		auditLock: in(`lock table :"schema".postrider_outbox, :"schema".postrider_outbox_dead in access share mode`),
		auditBegin: in(`
			select identity::text, system_id = (select system_identifier from pg_control_system()), clock_timestamp(),
				(select count(*) from :"schema".postrider_outbox) + (select count(*) from :"schema".postrider_outbox_dead)
			from :"schema".postrider_outbox_relay`),

		// All rows of a time, and whether the relay is done with them: its written cursor covers them, or they are dead.
		// Reads the tables from end to end.
		auditRows: in(`
			select o.id, o.at, o.topic, o.attributes, pg_visible_in_snapshot(o.xid, r.prev)
					or r.cur is not null and pg_visible_in_snapshot(o.xid, r.cur) and o.id <= r.last,
				exists (select from :"schema".postrider_outbox_dead as d where d.id = o.id)
			from :"schema".postrider_outbox as o cross join :"schema".postrider_outbox_relay as r
			where o.at >= coalesce($1::timestamptz, '-infinity') and o.at < coalesce($2::timestamptz, 'infinity')
			union all
			select d.id, d.at, d.topic, d.attributes, true, true
			from :"schema".postrider_outbox_dead as d
			where d.at >= coalesce($1::timestamptz, '-infinity') and d.at < coalesce($2::timestamptz, 'infinity')
				and not exists (select from :"schema".postrider_outbox as o where o.id = d.id)`),

		// Some rows by their numbers.
		auditFind: in(`
			select id, at, topic, attributes from :"schema".postrider_outbox where id = any($1)
			union
			select id, at, topic, attributes from :"schema".postrider_outbox_dead where id = any($1)`),
	}
}
