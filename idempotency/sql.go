package idempotency

import (
	"strconv"
	"time"

	"github.com/postrider/postrider/internal/migrate"
)

// waiting sets, for the rest of the transaction, how long a statement waits for a lock, $1, in milliseconds. It is part of the
// statement that claims, and so takes less than SET LOCAL before it: a tenth of what the whole claim does.
const waiting = ` from set_config('lock_timeout', $1, true) `

// The statements of a handler's transaction. Each of them finds its row by the primary key.
const (
	// Waits for a transaction that has inserted the same key and not ended. No row affected: a duplicate.
	claimSQL = `insert into :"schema".postrider_inbox (k) select $2::uuid` + waiting + `on conflict do nothing`

	// The same for many, in the order of $2, and tells which are new.
	claimAllSQL = `insert into :"schema".postrider_inbox (k) select k` + waiting + `cross join unnest($2::uuid[]) as k
		on conflict do nothing returning k`

	// The same for the barrier: an action claims its key as done, a compensation as nulled.
	actSQL = `insert into :"schema".postrider_barrier (key, state, request) select $2::text, 1, $3::bytea` + waiting + `
		on conflict do nothing`
	nullSQL = `insert into :"schema".postrider_barrier (key, state) select $2::text, 3` + waiting + `on conflict do nothing`

	// After a claim that was to wait less than the handler is.
	waitSQL = `select` + waiting

	// What is there of some keys. For who looks from outside: a handler that asked first would know nothing sooner.
	handledSQL = `select k from :"schema".postrider_inbox where k = any($1::uuid[])`

	readSQL = `select state, request, coalesce(content_type, ''), reply from :"schema".postrider_barrier where key = $1`

	// Locks the row, so that of two compensations one runs and the other sees what became of it.
	lockSQL = readSQL + ` for update`

	answerSQL = `update :"schema".postrider_barrier set state = $2, content_type = $3, reply = $4 where key = $1`
	undoneSQL = `update :"schema".postrider_barrier set state = 4 where key = $1`
)

// The statements of requests with a key. Each of them finds its row by the primary key and is a transaction of its own.
const (
	// One round trip, and for a key that is there no write and no lock. Its own insertion is invisible to the second part.
	// No row at all: another one inserted the key after the statement had begun.
	claimRequestSQL = `with mine as (
			insert into :"schema".postrider_request (key, request, until, owner)
			values ($1, $2, clock_timestamp() + $3::bigint * interval '1 microsecond', nullif($4::text, ''))
			on conflict do nothing returning fence)
		select -1::smallint, fence, 0::bigint, true, null::bytea, '', null::bytea from mine
		union all
		select state, fence, (extract(epoch from until - clock_timestamp()) * 1000000)::bigint,
			coalesce(owner = $4::text, false), request, coalesce(content_type, ''), reply
		from :"schema".postrider_request where key = $1`

	// Takes a key whose lease has ended from the owner that $4 names.
	takeRequestSQL = `update :"schema".postrider_request
		set fence = fence + 1, request = $2, until = clock_timestamp() + $3::bigint * interval '1 microsecond', owner = nullif($5::text, '')
		where key = $1 and fence = $4 and state = 0 and until <= clock_timestamp() and (request is null or request = $2)
		returning fence`

	renewRequestSQL = `update :"schema".postrider_request set until = clock_timestamp() + $3::bigint * interval '1 microsecond'
		where key = $1 and fence = $2 and state = 0`
	completeRequestSQL = `update :"schema".postrider_request set state = $3, content_type = $4, reply = $5
		where key = $1 and fence = $2`

	// The fence rises so that a late statement of the owner changes nothing.
	releaseRequestSQL = `update :"schema".postrider_request set fence = fence + 1, request = null, until = clock_timestamp(), owner = null
		where key = $1 and fence = $2 and state = 0`
)

// The statements of maintenance. They run once an hour, or when a partition is missing.
const (
	// The row's lock makes those who create partitions, or raise the floor, wait for each other.
	stateSQL = `select floor, clock_timestamp() from :"schema".postrider_inbox_state for update`
	nowSQL   = `select clock_timestamp()`
	raiseSQL = `update :"schema".postrider_inbox_state set floor = greatest(floor, $1::date)`

	// Of all instances one gets the hour's sweep.
	leaseSQL = `update :"schema".postrider_inbox_state set swept = clock_timestamp()
		where swept < clock_timestamp() - $1::bigint * interval '1 microsecond'`

	partitionSQL = `select exists (select from pg_tables where schemaname = $1 and tablename = $2)`

	// All partitions, with what a sweep that died has left: detached tables, and those that wait for the end of a
	// detachment.
	listSQL = `select c.relname, i.inhrelid is not null, coalesce(i.inhdetachpending, false)
		from pg_class c
		join pg_namespace n on n.oid = c.relnamespace
		left join pg_inherits i on i.inhrelid = c.oid
		where n.nspname = $1 and c.relkind = 'r' and c.relname ~ '^postrider_inbox_[0-9]{8}$'
		order by 1`

	// In small pieces, so that no transaction is long. The first scans the untimed bucket, the second uses its BRIN index.
	sweepUntimedSQL = `delete from :"schema".postrider_inbox_untimed where k in (select k from :"schema".postrider_inbox_untimed
		where handled_at < clock_timestamp() - $1::bigint * interval '1 microsecond' limit $2)`
	sweepBarrierSQL = `delete from :"schema".postrider_barrier where key in (select key from :"schema".postrider_barrier
		where at < clock_timestamp() - $1::bigint * interval '1 microsecond' limit $2)`
	sweepRequestSQL = `delete from :"schema".postrider_request where key in (select key from :"schema".postrider_request
		where at < clock_timestamp() - $1::bigint * interval '1 microsecond' and (state > 0 or until < clock_timestamp()) limit $2)`
)

// statements are the above for one schema.
type statements struct {
	schema string // quoted

	lockTimeout, briefLockTimeout string // in milliseconds

	claim, claimAll, handled, act, null, wait, read, lock, answer, undone    string
	claimRequest, takeRequest, renewRequest, completeRequest, releaseRequest string
	state, raise, now, lease, partition, list                                string
	sweepUntimed, sweepBarrier, sweepRequest                                 string
}

func newStatements(schema string, lockTimeout time.Duration) statements {
	in := func(sql string) string { return migrate.In(schema, sql) }
	ms := func(d time.Duration) string { return strconv.FormatInt(max(d.Milliseconds(), 0), 10) }
	return statements{
		schema: schema,

		lockTimeout: ms(lockTimeout), briefLockTimeout: ms(min(lockTimeout, briefLock)),

		claim: in(claimSQL), claimAll: in(claimAllSQL), handled: in(handledSQL),
		act: in(actSQL), null: in(nullSQL), wait: waitSQL, read: in(readSQL), lock: in(lockSQL),
		answer: in(answerSQL), undone: in(undoneSQL),

		claimRequest: in(claimRequestSQL), takeRequest: in(takeRequestSQL), renewRequest: in(renewRequestSQL),
		completeRequest: in(completeRequestSQL), releaseRequest: in(releaseRequestSQL),

		state: in(stateSQL), raise: in(raiseSQL), now: nowSQL, lease: in(leaseSQL), partition: partitionSQL, list: listSQL,
		sweepUntimed: in(sweepUntimedSQL), sweepBarrier: in(sweepBarrierSQL), sweepRequest: in(sweepRequestSQL),
	}
}
