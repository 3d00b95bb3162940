package devstack

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

func TestPostgresRestart(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	pg := startPostgres(t, PostgresConfig{Private: true, Settings: map[string]string{"max_prepared_transactions": "5"}})
	url := pg.URL
	conn := connect(t, url)
	if got := setting(t, conn, "max_prepared_transactions"); got != "5" {
		t.Errorf("max_prepared_transactions = %s, want 5", got)
	}
	if _, err := conn.Exec(ctx, `create table kept (n int); insert into kept values (1)`); err != nil {
		t.Fatal(err)
	}
	for name, stop := range map[string]func() error{"stop": pg.Stop, "kill": pg.Kill} {
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		if err := refuses(url); err != nil {
			t.Error(err)
		}
		if err := pg.Start(ctx); err != nil {
			t.Fatalf("start after %s: %v", name, err)
		}
		if pg.URL != url {
			t.Errorf("URL changed over %s", name)
		}
		var n int
		if err := connect(t, url).QueryRow(ctx, `select n from kept`).Scan(&n); err != nil || n != 1 {
			t.Errorf("row after %s: %d, %v", name, n, err)
		}
	}
}

// A cluster in a folder of the caller's survives Close, with its password.
func TestPostgresDir(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	cfg := PostgresConfig{Private: true, InMemory: true, Dir: filepath.Join(sharedDir(t), "pg")}
	first := startPostgres(t, cfg)
	conn := connect(t, first.URL)
	if got := setting(t, conn, "fsync"); got != "off" {
		t.Errorf("fsync = %s with InMemory, want off", got)
	}
	if _, err := conn.Exec(ctx, `create table kept ()`); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := connect(t, startPostgres(t, cfg).URL).Exec(ctx, `select from kept`); err != nil {
		t.Error(err)
	}
}

// Anybody on the machine can connect to 127.0.0.1, so nobody may get in without the password.
func TestPostgresAsksForPassword(t *testing.T) {
	t.Parallel()
	pg := startPostgres(t, PostgresConfig{Private: true, InMemory: true})
	for _, url := range []string{
		strings.Replace(pg.URL, pg.secret, "wrong", 1),
		strings.Replace(pg.URL, ":"+pg.secret, "", 1),
	} {
		_, err := StartPostgres(t.Context(), PostgresConfig{URL: url})
		if err == nil || !strings.Contains(err.Error(), "password") {
			t.Errorf("%s: error %v, want one about the password", url, err)
		}
	}
	given := startPostgres(t, PostgresConfig{URL: pg.URL})
	if err := given.Stop(); err == nil {
		t.Error("stopped a server that was given by URL")
	}
	if err := given.Close(); err != nil {
		t.Error(err)
	}
	connect(t, pg.URL) // Close must have left it alone
}

func TestPostgresDown(t *testing.T) { // not parallel: it sets the environment
	l := httptest.NewServer(nil)
	host := l.Listener.Addr().String()
	l.Close()
	t.Setenv(PostgresURLEnv, "postgres://me:sesame@"+host+"/db")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := StartPostgres(ctx, PostgresConfig{})
	if err == nil {
		t.Fatal("no error from a server that is down")
	}
	for _, want := range []string{PostgresURLEnv, host[:strings.Index(host, ":")], "refused"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "sesame") {
		t.Errorf("error %q shows the password", err)
	}
}

func TestNoPostgres(t *testing.T) { // not parallel: it sets the environment
	cache := sharedDir(t)
	t.Setenv("TMPDIR", t.TempDir()) // the library leaves a log there
	repository := httptest.NewServer(http.NotFoundHandler())
	defer repository.Close()
	_, err := StartPostgres(t.Context(), PostgresConfig{Private: true, binaries: binaries{
		folders:    func() []string { return []string{t.TempDir()} },
		repository: repository.URL,
		cache:      cache,
	}})
	if err == nil {
		t.Fatal("no error without PostgreSQL")
	}
	for _, way := range []string{"set " + PostgresURLEnv, "install PostgreSQL", "download", string(downloadVersion)} {
		if !strings.Contains(err.Error(), way) {
			t.Errorf("error does not name %q: %v", way, err)
		}
	}
}

// The download is the real one but for the archive: its programs hand over to the ones that are installed.
func TestDownload(t *testing.T) { // not parallel: it sets the environment
	folders := installedFolders()
	i := slices.IndexFunc(folders, hasPostgres)
	if i < 0 {
		t.Skip("needs an installed PostgreSQL to stand in for the downloaded one")
	}
	archive := jar(t, folders[i])
	cache := sharedDir(t)
	t.Setenv("TMPDIR", t.TempDir()) // the library leaves a log there
	requests := make(chan string, 100)
	repository := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests <- r.URL.Path
		if !strings.HasSuffix(r.URL.Path, ".jar") {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(archive)
	}))
	defer repository.Close()
	cfg := PostgresConfig{Private: true, InMemory: true, binaries: binaries{
		folders:    func() []string { return nil },
		repository: repository.URL,
		cache:      cache,
	}}

	connect(t, startPostgres(t, cfg).URL)
	fetched := len(requests)
	connect(t, startPostgres(t, cfg).URL)
	if fetched == 0 || len(requests) != fetched {
		t.Errorf("%d requests for the first start, %d for the second: want some and none", fetched, len(requests)-fetched)
	}
	if left, _ := filepath.Glob(filepath.Join(cfg.binaries.cache, "download-*")); len(left) > 0 {
		t.Errorf("left in the cache: %v", left)
	}
}

// jar makes the archive that the library expects: a zip with an xz-compressed tar of bin.
func jar(t *testing.T, bin string) []byte {
	t.Helper()
	var tarball, packed bytes.Buffer
	tw := tar.NewWriter(&tarball)
	for _, name := range []string{"initdb", "pg_ctl", "postgres"} {
		script := fmt.Sprintf("#!/bin/sh\nexec '%s' \"$@\"\n", filepath.Join(bin, name))
		if err := tw.WriteHeader(&tar.Header{Name: "bin/" + name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(script))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(script)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	xz, err := exec.LookPath("xz")
	if err != nil {
		t.Skip("needs xz to make an archive")
	}
	cmd := exec.Command(xz, "--check=crc32", "-c")
	cmd.Stdin = &tarball
	txz, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	zw := zip.NewWriter(&packed)
	w, err := zw.Create("postgres.txz")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(txz); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return packed.Bytes()
}

func TestMajorVersion(t *testing.T) {
	t.Parallel()
	for bin, want := range map[string]int{
		"/usr/lib/postgresql/15/bin":                              15,
		"/usr/lib/postgresql/9.6/bin":                             9,
		"/usr/pgsql-17/bin":                                       17,
		"/opt/homebrew/opt/postgresql@16/bin":                     16,
		"/Applications/Postgres.app/Contents/Versions/latest/bin": 0,
	} {
		if got := majorVersion(bin); got != want {
			t.Errorf("majorVersion(%q) = %d, want %d", bin, got, want)
		}
	}
}

func BenchmarkPostgres(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		pg, err := StartPostgres(b.Context(), PostgresConfig{Private: true})
		if err != nil {
			b.Fatal(err)
		}
		if err := pg.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func startPostgres(t *testing.T, cfg PostgresConfig) *Postgres {
	t.Helper()
	pg, err := StartPostgres(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pg.Close(); err != nil {
			t.Error(err)
		}
	})
	return pg
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(t.Context()) })
	return conn
}
