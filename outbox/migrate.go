package outbox

import (
	"context"
	"embed"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/postrider/postrider/internal/migrate"
)

//go:embed migrations
var migrations embed.FS

// line names the migrations of this package in the table postrider_migration.
const line = "outbox"

// DefaultSchema is where the tables are unless a Config names another schema.
const DefaultSchema = "postrider"

// Migrate creates or updates the tables of an outbox in schema, and the schema itself; "" means [DefaultSchema]. Any
// number of instances may call it at once; where nothing is to be done it only reads.
func Migrate(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	return migrate.Run(ctx, pool, schemaOrDefault(schema), line, migrations)
}

// MigrateDown drops the tables of an outbox, with all messages that are not sent yet, and the publication that a relay with
// [LogicalConfig] made. No relay may run.
func MigrateDown(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	schema = schemaOrDefault(schema)
	if err := migrate.Down(ctx, pool, schema, line, migrations); err != nil {
		return err
	}
	if _, err := pool.Exec(ctx, newFeedQueries(schema).unpublish); err != nil {
		return fmt.Errorf("outbox: drop publication: %w", err)
	}
	return nil
}

// MigrateSQL returns what Migrate does to a database without an outbox, as a script for another tool.
func MigrateSQL(schema string) (string, error) {
	return migrate.SQL(schemaOrDefault(schema), line, migrations)
}

// MigrateDownSQL returns what MigrateDown does, as a script for another tool.
func MigrateDownSQL(schema string) (string, error) {
	schema = schemaOrDefault(schema)
	sql, err := migrate.DownSQL(schema, line, migrations)
	if err != nil {
		return "", err
	}
	return sql + "\n" + newFeedQueries(schema).unpublish + ";\n", nil
}

func schemaOrDefault(schema string) string {
	if schema == "" {
		return DefaultSchema
	}
	return schema
}
