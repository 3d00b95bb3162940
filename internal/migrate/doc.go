// Package migrate brings the tables of a package into a schema of the user's choice and takes them out again. It is for
// Postrider's own packages: each embeds its numbered files, NNN_name.up.sql and NNN_name.down.sql, and calls [Run].
//
// The files are plain SQL in which :"schema" stands for the quoted schema, the notation of psql: a user with a tool of
// their own may run a file with psql -v schema=name, or take the whole from [SQL]. The table postrider_migration in the
// same schema holds which version of which line (outbox, idempotency, saga) is there. A file is never edited after its
// release; what changes gets the next number.
//
// Each migration runs with its note in one transaction that holds an advisory lock, so that any number of instances may
// start at once. When nothing is to be done, nothing is locked and no right beyond reading is needed.
package migrate
