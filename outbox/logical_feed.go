package outbox

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/postrider/postrider"
)

// feed is a replication connection with a temporary slot. It keeps what has come until it is taken, and then reads on.
type feed struct {
	slot        string
	snapshot    string // exported; it sees what was committed before the slot's beginning, the rest comes through the feed
	publication string // as it was before the slot was made

	conn     *pgconn.PgConn // nil once started
	net      net.Conn
	decoder  decoder
	maxRows  int
	finished sync.WaitGroup // the goroutine that reads
	came     chan struct{}  // rows, the end of a transaction, an answer or an error

	mu    sync.Mutex
	room  sync.Cond
	rows  []streamed
	size  int       // of rows, in bytes
	end   lsn       // all that was committed before is, or was, in rows
	since time.Time // rows have been too many for so long, zero: they are not
	err   error     // why no more comes
}

// publicationName is at most 63 bytes, what PostgreSQL takes, and another one for each schema of the database.
func publicationName(schema string) string {
	const limit, digits = 63, 8
	name := "postrider_outbox_" + schema
	if len(name) <= limit {
		return name
	}
	sum := sha256.Sum256([]byte(schema))
	return name[:limit-1-digits] + "_" + hex.EncodeToString(sum[:digits/2])
}

// replicationConfig is for connections beside the pool's. The limits are kept by the server, so they hold when we are gone.
func (r *Relay) replicationConfig(ctx context.Context) (*pgconn.Config, error) {
	var cfg *pgconn.Config
	if url := r.cfg.Logical.URL; url != "" {
		var err error
		if cfg, err = pgconn.ParseConfig(url); err != nil {
			return nil, err
		}
	} else {
		pool := r.pool.Config()
		if pool.BeforeConnect != nil { // it may have the password
			if err := pool.BeforeConnect(ctx, pool.ConnConfig); err != nil {
				return nil, err
			}
		}
		cfg = pool.ConnConfig.Config.Copy()
	}
	cfg.AfterConnect, cfg.ValidateConnect = nil, nil // may use what a replication connection does not know
	cfg.RuntimeParams["replication"] = "database"
	cfg.RuntimeParams["wal_sender_timeout"] = milliseconds(feedTimeout)
	cfg.RuntimeParams["lock_timeout"] = milliseconds(slotWait)
	return cfg, nil
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) + "ms" }

// openFeed connects and makes what is missing of publication and slot, the latter only if it is wanted. It may take long: a slot
// begins where no transaction is open that was open when it was asked for.
func (r *Relay) openFeed(ctx context.Context, slot bool) (*feed, error) {
	cfg, err := r.replicationConfig(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	f := &feed{
		slot: "postrider_" + strings.ReplaceAll(postrider.NewID(), "-", ""), conn: conn,
		decoder: decoder{schema: r.outbox.cfg.Schema}, maxRows: r.cfg.BatchSize, came: make(chan struct{}, 1),
	}
	f.room.L = &f.mu
	err = f.publish(ctx, r.feedQueries) // first: the slot knows of the publications that were there before it
	if err == nil && slot {
		err = f.makeSlot(ctx)
	}
	if err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

// publish makes the publication, if there is none.
func (f *feed) publish(ctx context.Context, q feedQueries) error {
	var err error
	if f.publication, err = f.ask(ctx, q.publication); err != nil {
		return fmt.Errorf("look for publication: %w", err)
	}
	if f.publication == "" {
		if _, err := f.ask(ctx, q.publish); err != nil && !hasState(err, duplicateObject) {
			return fmt.Errorf("make publication: %w", err)
		}
		if f.publication, err = f.ask(ctx, q.publication); err != nil {
			return fmt.Errorf("look for publication: %w", err)
		}
		if f.publication == "" {
			return postrider.Errorf(postrider.FailedPrecondition, "publication %s does not publish the inserts of the outbox, all of them: "+
				"drop it, the relay makes a new one; or a table of the outbox is unlogged", publicationName(f.decoder.schema))
		}
	}
	return nil
}

func (f *feed) makeSlot(ctx context.Context) error {
	results, err := f.conn.Exec(ctx, `CREATE_REPLICATION_SLOT `+f.slot+` TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT`).ReadAll()
	if err != nil {
		return fmt.Errorf("make replication slot: %w", err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) < 3 {
		return errors.New("make replication slot: the server's answer has no snapshot")
	}
	f.snapshot = string(results[0].Rows[0][2])
	return nil
}

// mayFeed fails with FailedPrecondition if there is no logical replication before somebody has done something for it.
func (r *Relay) mayFeed(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, slotWait)
	defer cancel()
	problem, err := r.feedProblem(ctx, r.pool)
	if err != nil {
		return err
	}
	if problem == nil {
		var f *feed
		if f, problem = r.openFeed(ctx, false); problem == nil {
			f.close()
			return nil
		}
	}
	if errors.Is(problem, postrider.FailedPrecondition) || hasState(problem, noRight, undefinedTable, undefinedSchema, readOnly) {
		return postrider.Errorf(postrider.FailedPrecondition, "outbox: LogicalConfig.Mode is LogicalOn: no logical replication: %w", problem)
	}
	return nil // it may pass; the term says what it is
}

// rower is a pool or a connection.
type rower interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// feedProblem says what is missing for logical replication by the settings of the server and the rights of the role.
func (r *Relay) feedProblem(ctx context.Context, db rower) (problem, err error) {
	var level string
	var may, room bool
	if err := db.QueryRow(ctx, r.feedQueries.mayReplicate).Scan(&level, &may, &room); err != nil {
		return nil, fmt.Errorf("outbox: read wal_level: %w", err)
	}
	missing := func(format string, args ...any) (error, error) {
		return postrider.Errorf(postrider.FailedPrecondition, format, args...), nil
	}
	switch {
	case level != "logical":
		return missing("wal_level is %s: it needs logical, and a restart of the server", level)
	case !room:
		return missing("max_replication_slots or max_wal_senders is 0: it needs one of each, and a restart of the server")
	case !may && r.cfg.Logical.URL == "":
		return missing("the role may not replicate: ALTER ROLE ... REPLICATION")
	default:
		return nil, nil
	}
}

// ask returns the first value of the first row, "" if there is none. Replication connections know only the simple protocol.
func (f *feed) ask(ctx context.Context, sql string) (string, error) {
	results, err := f.conn.Exec(ctx, sql).ReadAll()
	if err != nil || len(results) == 0 || len(results[0].Rows) == 0 {
		return "", err
	}
	return string(results[0].Rows[0][0]), nil
}

// start has the server send. The exported snapshot ends.
func (f *feed) start() error {
	hijacked, err := f.conn.Hijack()
	if err != nil {
		return err
	}
	f.conn, f.net = nil, hijacked.Conn
	frontend := hijacked.Frontend
	frontend.Send(&pgproto3.Query{String: fmt.Sprintf(
		`START_REPLICATION SLOT %s LOGICAL 0/0 (proto_version '1', publication_names '%s', binary 'true')`,
		f.slot, pgx.Identifier{publicationName(f.decoder.schema)}.Sanitize())})
	if err := frontend.Flush(); err != nil {
		return err
	}
	f.finished.Go(func() {
		err := f.read(frontend)
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.err == nil {
			f.err = err
		}
		f.tell()
	})
	return nil
}

// read takes what the server sends until the connection ends.
func (f *feed) read(frontend *pgproto3.Frontend) error {
	for {
		msg, err := frontend.Receive()
		if err != nil {
			return err
		}
		switch msg := msg.(type) {
		case *pgproto3.CopyData:
			if err := f.take(msg.Data); err != nil {
				return err
			}
		case *pgproto3.ErrorResponse:
			return pgconn.ErrorResponseToPgError(msg)
		case *pgproto3.CopyDone:
			return errors.New("the server ended the replication")
		}
	}
}

// take keeps what a message says.
func (f *feed) take(data []byte) error {
	r := &reader{buf: data}
	var e event
	switch kind := r.byte(); kind {
	case 'w':
		r.skip(8 + 8 + 8) // places in the WAL, the server's time
		if r.err != nil {
			return r.err
		}
		var err error
		if e, err = f.decoder.decode(r.buf); err != nil {
			return err
		}
	case 'k': // what ends before this place has been sent
		if e.end = lsn(r.uint64()); r.err != nil {
			return r.err
		}
	default:
		return fmt.Errorf("unexpected message %q on the replication connection", kind)
	}
	if e == (event{}) {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if e.row == nil {
		f.end = max(f.end, e.end)
		f.tell()
		return f.err
	}
	for f.err == nil && len(f.rows) > 0 && (len(f.rows) >= f.maxRows || f.size+e.row.size() > pageBytes) {
		if f.since.IsZero() {
			f.since = time.Now()
		}
		f.tell()
		f.room.Wait()
	}
	f.since = time.Time{}
	f.rows = append(f.rows, *e.row)
	f.size += e.row.size()
	return f.err
}

func (f *feed) tell() {
	select {
	case f.came <- struct{}{}:
	default:
	}
}

// batch returns the rows that have come, in the order of their commits, and how far that is: all that was committed before end is
// in them or in those of earlier calls.
func (f *feed) batch() (rows []streamed, end lsn, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	rows, f.rows, f.size = f.rows, nil, 0
	f.room.Signal()
	return rows, f.end, f.err
}

// stuck is for how long the rows have been too many.
func (f *feed) stuck() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.since.IsZero() {
		return 0
	}
	return time.Since(f.since)
}

// status tells the server how far we are, so that it need not keep the WAL, and may ask it to say how far it is. That all was
// received is enough: the cursor in the table knows what was sent.
func (f *feed) status(answer bool) error {
	f.mu.Lock()
	end := uint64(f.end)
	f.mu.Unlock()
	msg := make([]byte, 0, 5+1+8*4+1)
	msg = append(msg, 'd')
	msg = binary.BigEndian.AppendUint32(msg, 4+1+8*4+1)
	msg = append(msg, 'r')
	for range 3 { // written, flushed, applied
		msg = binary.BigEndian.AppendUint64(msg, end)
	}
	msg = binary.BigEndian.AppendUint64(msg, uint64(time.Since(pgEpoch).Microseconds()))
	if answer {
		msg = append(msg, 1)
	} else {
		msg = append(msg, 0)
	}
	if err := f.net.SetWriteDeadline(time.Now().Add(feedStatus)); err != nil {
		return err
	}
	_, err := f.net.Write(msg)
	return err
}

// close ends the connection, and with it the slot. It waits for the goroutine that reads.
func (f *feed) close() {
	if f.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), feedStatus)
		defer cancel()
		_ = f.conn.Close(ctx)
		select {
		case <-f.conn.CleanupDone(): // after it was interrupted
		case <-ctx.Done():
		}
		return
	}
	if f.net == nil {
		return
	}
	f.mu.Lock()
	if f.err == nil {
		f.err = net.ErrClosed
	}
	f.room.Signal()
	f.mu.Unlock()
	_ = f.net.Close()
	f.finished.Wait()
}
