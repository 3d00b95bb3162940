package outbox

import (
	"strings"

	"github.com/jackc/pgx/v5"
)

// feedQueries are the statements of logical replication. Those of the replication connection have no parameters.
type feedQueries struct {
	mayReplicate, probe  string // on the term's connection
	publication, publish string // on the replication connection
	unpublish            string // with the tables
}

func newFeedQueries(schema string) feedQueries {
	table := pgx.Identifier{schema, "postrider_outbox"}.Sanitize()
	in := strings.NewReplacer(
		":table", table, ":seq", pgx.Identifier{schema, "postrider_outbox_seq"}.Sanitize(),
		":relay", pgx.Identifier{schema, "postrider_outbox_relay"}.Sanitize(),
		":publication", pgx.Identifier{publicationName(schema)}.Sanitize(),
		":name", "'"+publicationName(schema)+"'", ":class", "'"+table+"'",
		// What the publication is, NULL if it is not there or passes over some inserts. Any change of it gives a row another xmin. Its
		// commit is in the WAL, where the feed obeys it, before a snapshot sees it, and with a synchronous standby that is away
		// long before; but the old version of the row, which the snapshot still sees, has its xmax from before that commit on.
		// Row filters and column lists came with PostgreSQL 15.
		":state", `(
				select pg_catalog.concat_ws(' ', p.oid, p.xmin, p.xmax, r.oid, r.xmin, r.xmax)
				from pg_publication as p join pg_publication_rel as r on r.prpubid = p.oid
				where p.pubname = :name and p.pubinsert and p.pubviaroot and r.prrelid = to_regclass(:class)
					and pg_catalog.to_jsonb(r)->>'prqual' is null and pg_catalog.to_jsonb(r)->>'prattrs' is null
					and not exists (select from pg_inherits as i join pg_class as c on c.oid = i.inhrelid
						where i.inhparent = r.prrelid and c.relpersistence <> 'p'))`,
	)
	// Twice, since the state has names in it.
	fill := func(sql string) string { return in.Replace(in.Replace(sql)) }
	return feedQueries{
		mayReplicate: `
			select current_setting('wal_level'), coalesce((select rolreplication or rolsuper from pg_roles where rolname = session_user), false),
				current_setting('max_replication_slots')::int > 0 and current_setting('max_wal_senders')::int > 0`,

		// The probe of queries with the end of the WAL, read after the snapshot, what WAL the slot $1 keeps, NULL if there is no slot,
		// and the publication in the same snapshot. Shared memory and catalogues, beside what the other one reads.
		probe: fill(`
			select pg_current_snapshot()::text, last_value - (not is_called)::int, pg_postmaster_start_time(), clock_timestamp(),
				(select paused_at is not null from :relay), (pg_current_wal_insert_lsn() - '0/0')::bigint,
				(select (pg_current_wal_lsn() - restart_lsn)::bigint from pg_replication_slots where slot_name = $1), coalesce(:state, '')
			from :seq`),

		publication: fill(`select :state`),
		publish:     fill(`create publication :publication for table :table with (publish = 'insert', publish_via_partition_root = true)`),
		unpublish:   fill(`drop publication if exists :publication`),
	}
}
