package idempotency

import (
	"fmt"
	"time"

	"github.com/postrider/postrider/internal/migrate"
)

// The statements of a handler's transaction. Each of them finds its row by the primary key.
const (
	// Waits for a transaction that has inserted the same key and not ended. No row affected: a duplicate.
	claimSQL = `insert into :"schema".postrider_inbox (k) values ($1) on conflict do nothing`

	// The same for the barrier: an action claims its key as done, a compensation as nulled.
	actSQL  = `insert into :"schema".postrider_barrier (key, state, request) values ($1, 1, $2) on conflict do nothing`
	nullSQL = `insert into :"schema".postrider_barrier (key, state) values ($1, 3) on conflict do nothing`

	// What is there of some keys. For who looks from outside: a handler that asked first would know nothing sooner.
	handledSQL = `select k from :"schema".postrider_inbox where k = any($1::uuid[])`

	readSQL = `select state, request, coalesce(content_type, ''), reply from :"schema".postrider_barrier where key = $1`

	// Locks the row, so that of two compensations one runs and the other sees what became of it.
	lockSQL = readSQL + ` for update`

	answerSQL = `update :"schema".postrider_barrier set state = $2, content_type = $3, reply = $4 where key = $1`
	undoneSQL = `update :"schema".postrider_barrier set state = 4 where key = $1`
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
)

// statements are the above for one schema.
type statements struct {
	schema      string // quoted
	lockTimeout string

	claim, handled, act, null, read, lock, answer, undone                 string
	state, raise, now, lease, partition, list, sweepUntimed, sweepBarrier string
}

func newStatements(schema string, lockTimeout time.Duration) statements {
	in := func(sql string) string { return migrate.In(schema, sql) }
	return statements{
		schema:      schema,
		lockTimeout: fmt.Sprintf("set local lock_timeout = %d", max(lockTimeout.Milliseconds(), 0)),

		claim: in(claimSQL), handled: in(handledSQL), act: in(actSQL), null: in(nullSQL), read: in(readSQL), lock: in(lockSQL),
		answer: in(answerSQL), undone: in(undoneSQL),

		state: in(stateSQL), raise: in(raiseSQL), now: nowSQL, lease: in(leaseSQL), partition: partitionSQL, list: listSQL,
		sweepUntimed: in(sweepUntimedSQL), sweepBarrier: in(sweepBarrierSQL),
	}
}
