package outbox_test

import (
	"database/sql"
	"strings"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/outbox"
	"github.com/postrider/postrider/postridertest"
)

// What is nil, or over, is refused with an error that says so.
func TestMisuseIsRefused(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	ctx := t.Context()
	ended, err := pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := ended.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what string
		code postrider.Code
		text string
		call func() error
	}{
		{"tx", postrider.InvalidArgument, "Outbox.In is nil", func() error { return ob.In(nil).Publish(ctx, message("a", "")) }},
		{"sql tx", postrider.InvalidArgument, "Outbox.InSQL is nil", func() error { return ob.InSQL((*sql.Tx)(nil)).Publish(ctx, message("a", "")) }},
		{"pool", postrider.InvalidArgument, "Outbox.On is nil", func() error { return ob.On(nil).Publish(ctx, message("a", "")) }},
		{"begin", postrider.InvalidArgument, "Outbox.On is nil", func() error { _, err := ob.On(nil).Begin(ctx); return err }},
		{"message", postrider.InvalidArgument, "the message is nil", func() error { return ob.On(pool).Publish(ctx, nil) }},
		{"ended tx", postrider.FailedPrecondition, "publish before its commit", func() error { return ob.In(ended).Publish(ctx, message("a", "")) }},
		{"relay's pool", postrider.InvalidArgument, "nil", func() error {
			_, err := outbox.NewRelay(nil, new(postridertest.Recorder), outbox.RelayConfig{Outbox: ob})
			return err
		}},
		{"relay's publisher", postrider.InvalidArgument, "nil", func() error {
			_, err := outbox.NewRelay(pool, nil, outbox.RelayConfig{Outbox: ob})
			return err
		}},
		{"migrate", postrider.InvalidArgument, "the pool is nil", func() error { return outbox.Migrate(ctx, nil, "") }},
		{"migrate down", postrider.InvalidArgument, "the pool is nil", func() error { return outbox.MigrateDown(ctx, nil, "") }},
	} {
		t.Run(tt.what, func(t *testing.T) {
			err := tt.call()
			wantCode(t, err, tt.code)
			if !strings.Contains(err.Error(), tt.text) || postrider.Retryable(err) {
				t.Errorf("%v, want an error for good that says %q", err, tt.text)
			}
		})
	}
}

// A database that cannot be reached is an error to be tried again that says what was being done.
func TestDatabaseGone(t *testing.T) {
	t.Parallel()
	pool, ob := setup(t)
	pool.Close()
	for op, call := range map[string]func() error{
		"outbox: migrate schema postrider":   func() error { return outbox.Migrate(t.Context(), pool, "") },
		"outbox: take down schema postrider": func() error { return outbox.MigrateDown(t.Context(), pool, "") },
		"outbox: read status":                func() error { _, err := ob.Status(t.Context(), pool); return err },
		"outbox: pause":                      func() error { return ob.Pause(t.Context(), pool, outbox.Action{By: "Ada", Why: "test"}) },
	} {
		err := call()
		wantCode(t, err, postrider.Unavailable)
		if !strings.HasPrefix(err.Error(), op+": ") {
			t.Errorf("%v, want it to begin with %s", err, op)
		}
	}
}
