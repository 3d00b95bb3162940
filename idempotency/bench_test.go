package idempotency

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
)

// BenchmarkHandler compares a handler that updates one row in a transaction of its own with the same one behind the
// inbox, with a duplicate, and with an action that stores its reply. Eight at once.
func BenchmarkHandler(b *testing.B) {
	env := setup(b)
	env.exec(`create table account (id int primary key, due bigint not null) with (fillfactor = 50);
		insert into account select i, 0 from generate_series(0, 9999) i`)
	s := env.store(Config{})
	pay := func(ctx context.Context, tx pgx.Tx, n int64) error {
		_, err := tx.Exec(ctx, `update account set due = due + 1 where id = $1`, n%10_000)
		return err
	}
	var n atomic.Int64
	plain := env.placed.Handler(func(ctx context.Context, _ postrider.Event[order]) error {
		return pgx.BeginFunc(ctx, env.pool, func(tx pgx.Tx) error { return pay(ctx, tx, n.Add(1)) })
	})
	once := Handler(s, "billing", env.placed, func(ctx context.Context, tx pgx.Tx, _ postrider.Event[order]) error {
		return pay(ctx, tx, n.Add(1))
	})
	action := Action(s, env.reserve, func(ctx context.Context, tx pgx.Tx, req *order) (*hold, error) {
		return &hold{ID: req.ID}, pay(ctx, tx, n.Add(1))
	})
	event, command := env.event("m", time.Now()), env.command(env.reserve, "", order{ID: "o-1"})
	must(b, handle(b, once, event))

	for _, bm := range []struct {
		name     string
		h        postrider.Handler
		m        *postrider.Message
		repeated bool
	}{{"plain", plain, event, false}, {"once", once, event, false}, {"duplicate", once, event, true}, {"action", action, command, false}} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					m := *bm.m
					if !bm.repeated {
						m.ID, m.Time = strconv.FormatInt(n.Add(1), 36), time.Now()
					}
					if err := handle(b, bm.h, &m); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkDo measures a request whose outcome is known, and a first one. Eight at once, and one alone.
func BenchmarkDo(b *testing.B) {
	env := setup(b)
	s := env.store(Config{})
	pay := func(_ context.Context, req *order) (*hold, error) { return &hold{ID: req.ID}, nil }
	var n atomic.Int64
	do := func(key string) error {
		_, err := Do(b.Context(), s, env.reserve, key, &order{ID: "o-1"}, pay)
		return err
	}
	must(b, do("known"))
	for _, bm := range []struct {
		name string
		key  func() string
	}{
		{"known", func() string { return "known" }},
		{"first", func() string { return strconv.FormatInt(n.Add(1), 36) }},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(4)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := do(bm.key()); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
		b.Run(bm.name+"/alone", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				must(b, do(bm.key()))
			}
		})
	}
	b.Run("select 1", func(b *testing.B) { // a round trip
		b.ReportAllocs()
		for b.Loop() {
			var one int
			must(b, env.pool.QueryRow(b.Context(), `select 1`).Scan(&one))
		}
	})
}

// instant is a store that costs nothing.
type instant struct {
	away

	claim Claim
}

func (s instant) Claim(context.Context, string, string, []byte, time.Duration) (Claim, error) {
	return s.claim, nil
}

func (instant) Complete(context.Context, string, int64, Outcome) error { return nil }

// BenchmarkHTTP measures what the middleware adds to a handler, beside its store: a request of 1 KiB, a response of 1 KiB.
func BenchmarkHTTP(b *testing.B) {
	body := strings.Repeat("0123456789abcdef", 64)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/plain")
		_, _ = io.WriteString(w, body)
	})
	behind := func(c Claim) http.Handler {
		mw, err := HTTP(instant{claim: c}, func(*http.Request) string { return "ada" }, HTTPConfig{})
		must(b, err)
		return mw(handler)
	}
	known := Claim{
		Request: fingerprint(nil, []byte{0}, []byte(body)),
		Outcome: &Outcome{
			ContentType: wholeResponse,
			Data:        formatResponse(200, http.Header{"Content-Type": {"text/plain"}}, []byte(body)),
		},
	}
	for _, bm := range []struct {
		name string
		h    http.Handler
	}{{"plain", handler}, {"first", behind(Claim{Fence: 1})}, {"known", behind(known)}} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				req := httptest.NewRequest(http.MethodPost, "/charges", strings.NewReader(body))
				req.Header.Set(KeyHeader, `"8e03978e-40d5-43dd-bc93-6894a57f9324"`)
				res := httptest.NewRecorder()
				bm.h.ServeHTTP(res, req)
				if res.Code != 200 || res.Body.Len() != len(body) {
					b.Fatalf("status %d, %d bytes", res.Code, res.Body.Len())
				}
			}
		})
	}
}
