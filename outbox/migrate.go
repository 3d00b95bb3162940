package outbox

import (
	"context"
	"embed"

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

// MigrateDown drops the tables of an outbox, with all messages that are not sent yet. No relay may run.
func MigrateDown(ctx context.Context, pool *pgxpool.Pool, schema string) error {
	return migrate.Down(ctx, pool, schemaOrDefault(schema), line, migrations)
}

// MigrateSQL returns what Migrate does to a database without an outbox, as a script for another tool.
func MigrateSQL(schema string) (string, error) {
	return migrate.SQL(schemaOrDefault(schema), line, migrations)
}

func schemaOrDefault(schema string) string {
	if schema == "" {
		return DefaultSchema
	}
	return schema
}
