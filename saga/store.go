package saga

import (
	"cmp"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/migrate"
)

//go:embed migrations
var migrations embed.FS

// line names the migrations of this package in the table postrider_migration.
const line = "saga"

// DefaultSchema is where the tables are unless a Config names another schema.
const DefaultSchema = "postrider"

// Migrate creates or updates the tables of sagas in schema, and the schema itself; "" means [DefaultSchema]. Any number
// of instances may call it at once; where nothing is to be done it only reads.
func Migrate(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	return migrate.Run(ctx, pool, cmp.Or(schema, DefaultSchema), line, migrations)
}

// MigrateDown drops the tables, with all sagas in them. No engine may run.
func MigrateDown(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	return migrate.Down(ctx, pool, cmp.Or(schema, DefaultSchema), line, migrations)
}

// MigrateSQL returns what Migrate does to a database without sagas, as a script for another tool.
func MigrateSQL(schema string) (string, error) {
	return migrate.SQL(cmp.Or(schema, DefaultSchema), line, migrations)
}

// statements holds the SQL, with the tables of a schema for SAGA and HISTORY.
type statements struct {
	peek, insert, load, claim, save, postpone, park, nextWake, get, find, history string
}

func newStatements(quoted string) statements {
	fill := strings.NewReplacer("SAGA", quoted+".postrider_saga", "HISTORY", quoted+".postrider_saga_history").Replace
	const (
		columns = `id::text, plan, version, hash, key, state, data, epoch, entries, correlation, traceparent, tracestate, clock_timestamp()`
		shown   = `select id::text, plan, version, key, state, data, parked, wake_at, started_at, updated_at, ended_at, hash from SAGA `
		logged  = `
insert into HISTORY (saga, seq, kind, step, op, attempt, cause)
select saga.id, h.* from saga, unnest($1::int[], $2::text[], $3::text[], $4::text[], $5::int[], $6::text[]) h`
	)
	return statements{
		// The database's time, and the saga that has the key already. By the unique index, no lock.
		peek: fill(`select clock_timestamp(), (select id::text from SAGA where engine = $1 and plan = $2 and key = $3)`),

		// A new saga with its first history. A concurrent start of the same key waits on the unique index for the other
		// transaction's end and then inserts nothing; that is no error, so that the caller's transaction lives on.
		insert: fill(`with saga as (
	insert into SAGA (id, engine, plan, version, hash, key, status, state, data, epoch, entries,
		correlation, traceparent, tracestate, wake_at, ended_at)
	values ($7, $8, $9, $10, $11, $12, $13, $14, $15, 1, $16, $17, $18, $19, $20, case when $21 then clock_timestamp() end)
	on conflict (engine, plan, key) do nothing returning id)` + logged),

		// One saga by its primary key; locks the row until the transition's end.
		load: fill(`select ` + columns + ` from SAGA where id = $1 and engine = $2 for update`),

		// The saga that has been due for longest, of the plans this engine knows, by the index on wake_at. Rows that another
		// transition holds are passed over: it will see to their timer.
		claim: fill(`select ` + columns + ` from SAGA where engine = $1 and wake_at <= now() and hash = any($2)
order by wake_at limit 1 for update skip locked`),

		// The new state, fenced by the epoch that was read, with the history that led to it.
		save: fill(`with saga as (
	update SAGA set status = $9, state = $10, data = $11, epoch = epoch + 1, entries = $12, parked = '', wake_at = $13,
		updated_at = clock_timestamp(), ended_at = case when $14 then coalesce(ended_at, clock_timestamp()) end
	where id = $7 and epoch = $8 returning id)` + logged),

		// The timer of a saga whose transition failed, so that it holds up no other. By the primary key, locks the row.
		postpone: fill(`update SAGA set wake_at = clock_timestamp() + $3::interval where id = $1 and epoch = $2`),

		// Sagas that have been due for a while and whose plan this engine does not know, nor, it seems, any other. They stay
		// due, so that an engine that does know the plan takes them up at once. By the index on wake_at, locks the rows.
		park: fill(`with saga as (
	update SAGA set parked = $3, epoch = epoch + 1, entries = entries + 1, updated_at = clock_timestamp()
	where engine = $1 and wake_at < now() - $4::interval and parked = '' and hash <> all($2)
	returning id, entries, plan, version, hash), logged as (
	insert into HISTORY (saga, seq, kind, step, op, attempt, cause) select id, entries, 'parked', '', '', 0, $3 from saga)
select id::text, plan, version, hash from saga`),

		// Seconds until the next timer, by the index on wake_at; null for none.
		nextWake: fill(`select extract(epoch from min(wake_at) - clock_timestamp())::float8 from SAGA
where engine = $1 and wake_at is not null and hash = any($2)`),

		get:     fill(shown + `where id = $1`),
		find:    fill(shown + `where engine = $1 and plan = $2 and key = $3`),
		history: fill(`select seq, at, kind, step, op, attempt, cause from HISTORY where saga = $1 order by seq`),
	}
}

// row is a saga as a transition reads and writes it.
type row struct {
	id, plan, hash, key string
	version             int
	state               state
	data                json.RawMessage
	epoch, entries      int
	link                link
	now                 time.Time // the database's
}

// link is what all messages of a saga carry on from the message that began it.
type link struct{ correlation, traceparent, tracestate string }

// scanRow reads what load and claim select; with an error it returns the row that the error is about, if there is one.
func scanRow(r pgx.Row) (*row, error) {
	var s row
	var state []byte
	err := r.Scan(&s.id, &s.plan, &s.version, &s.hash, &s.key, &state, &s.data, &s.epoch, &s.entries,
		&s.link.correlation, &s.link.traceparent, &s.link.tracestate, &s.now)
	if err != nil {
		return nil, err
	}
	s.now = s.now.UTC()
	if err := json.Unmarshal(state, &s.state); err != nil {
		return &s, postrider.Errorf(postrider.DataLoss, "decode the state of saga %s: %w", s.id, err)
	}
	return &s, nil
}

// historyArgs are the first six parameters of the statements that append history.
func historyArgs(first int, entries []Entry) []any {
	n := len(entries)
	seq, attempt := make([]int32, n), make([]int32, n)
	text := make([]string, 4*n)
	kind, step, op, cause := text[:n], text[n:2*n], text[2*n:3*n], text[3*n:]
	for i, e := range entries {
		seq[i], attempt[i] = int32(first+i), int32(e.Attempt)
		kind[i], step[i], op[i], cause[i] = string(e.Kind), e.Step, string(e.Op), e.Cause
	}
	return []any{seq, kind, step, op, attempt, cause}
}

// insert writes a new saga. False: there is one with its key.
func (e *Engine) insert(ctx context.Context, tx pgx.Tx, r *row, entries []Entry) (bool, error) {
	encoded, err := json.Marshal(r.state)
	if err != nil {
		return false, err
	}
	tag, err := tx.Exec(ctx, e.sql.insert, append(historyArgs(1, entries),
		r.id, e.cfg.Name, r.plan, r.version, r.hash, r.key, string(r.state.Status), encoded, r.data, len(entries),
		r.link.correlation, r.link.traceparent, r.link.tracestate, nullTime(r.state.wakeAt()), r.state.Status.Ended())...)
	return tag.RowsAffected() > 0, err
}

// save writes the new state of a saga and commits, in one round trip.
func (e *Engine) save(ctx context.Context, conn *pgxpool.Conn, r *row, entries []Entry) error {
	encoded, err := json.Marshal(r.state)
	if err != nil {
		return err
	}
	var b pgx.Batch
	b.Queue(e.sql.save, append(historyArgs(r.entries+1, entries),
		r.id, r.epoch, string(r.state.Status), encoded, r.data, r.entries+len(entries), nullTime(r.state.wakeAt()),
		r.state.Status.Ended())...)
	b.Queue("commit")
	results := conn.SendBatch(ctx, &b)
	tag, err := results.Exec()
	if err == nil {
		_, err = results.Exec()
	}
	if closeErr := results.Close(); err == nil {
		err = closeErr
	}
	if err == nil && tag.RowsAffected() == 0 {
		err = fmt.Errorf("epoch %d has passed: another engine changed the saga under our lock", r.epoch)
	}
	return err
}

func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// Get reads a saga. The error is NotFound when there is none, FailedPrecondition without tables.
func (e *Engine) Get(ctx context.Context, id string) (*Instance, error) {
	if !isUUID(id) {
		return nil, noSaga("saga: get " + id)
	}
	return e.instance(e.pool.QueryRow(ctx, e.sql.get, id), "saga: get "+id)
}

// Find reads the saga of a plan with that business key, running or ended. The error is NotFound when there is none,
// FailedPrecondition without tables.
func (e *Engine) Find(ctx context.Context, plan, key string) (*Instance, error) {
	return e.instance(e.pool.QueryRow(ctx, e.sql.find, e.cfg.Name, plan, key), "saga: find "+plan+" "+key)
}

func (e *Engine) instance(r pgx.Row, op string) (*Instance, error) {
	var (
		i               Instance
		encoded         []byte
		s               state
		parked, hash    string
		wakeAt, endedAt *time.Time
	)
	err := r.Scan(&i.ID, &i.Plan, &i.Version, &i.Key, &encoded, &i.Data, &parked, &wakeAt, &i.Started, &i.Updated, &endedAt, &hash)
	if err == nil {
		err = json.Unmarshal(encoded, &s)
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, noSaga(op)
	}
	if err != nil {
		return nil, e.trouble(op, err)
	}
	i.Status, i.Cause, i.Alarm = s.Status, s.Cause, s.Alarm
	if parked != "" {
		i.Status, i.Cause, i.Alarm = Parked, parked, parked
	}
	if wakeAt != nil {
		i.WakeAt = *wakeAt
	}
	if endedAt != nil {
		i.Ended = *endedAt
	}
	i.Steps = make([]StepStatus, len(s.Steps))
	for n, step := range s.Steps {
		i.Steps[n] = StepStatus{Name: e.stepName(hash, n), Phase: step.Phase, Attempt: step.Attempt}
	}
	return &i, nil
}

// stepName is the name of a plan's step, or its number when this engine does not know the plan.
func (e *Engine) stepName(hash string, n int) string {
	if d := e.plans[hash]; d != nil {
		return d.nodes[n].name
	}
	return fmt.Sprintf("#%d", n+1)
}

// History reads what happened to a saga, the oldest first. The error is NotFound when there is none, FailedPrecondition
// without tables.
func (e *Engine) History(ctx context.Context, id string) ([]Entry, error) {
	op := "saga: history of " + id
	if !isUUID(id) {
		return nil, noSaga(op)
	}
	rows, err := e.pool.Query(ctx, e.sql.history, id)
	if err != nil {
		return nil, e.trouble(op, err)
	}
	entries, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Entry])
	switch {
	case err != nil:
		return nil, e.trouble(op, err)
	case len(entries) == 0: // each saga has its beginning there
		return nil, noSaga(op)
	}
	return entries, nil
}

func noSaga(op string) error {
	return &postrider.Error{Code: postrider.NotFound, Op: op, Msg: "there is no such saga"}
}

// trouble gives an error of a statement its class: to be tried again, unless there are no tables.
func (e *Engine) trouble(op string, err error) error {
	if withoutTables(err) {
		return &postrider.Error{
			Code: postrider.FailedPrecondition, Op: op, Err: err,
			Msg: "schema " + e.cfg.Schema + " has no tables of sagas: call saga.Migrate first",
		}
	}
	return unavailable(op, err)
}

// withoutTables says if a statement failed because its table or schema does not exist (PostgreSQL, appendix A).
func withoutTables(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (pg.Code == "42P01" || pg.Code == "3F000")
}

// unavailable is what trouble with PostgreSQL is to others: to be tried again.
func unavailable(op string, err error) error {
	return &postrider.Error{Code: postrider.Unavailable, Op: op, Err: err}
}
