package postrider_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/postrider/postrider"

// graph holds, for every package of the module (by its path inside the module, "." for the kernel), the packages that
// its non-test code links, itself excluded: those of the module by that path, all others by their import path.
type graph map[string][]string

// importGraph asks go list.
func importGraph(t *testing.T) graph {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-e", "-json=ImportPath,Deps", "./...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd, err, stderr.String())
	}
	g := graph{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath string
			Deps       []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return g
		} else if err != nil {
			t.Fatal(err)
		}
		for i, d := range p.Deps {
			p.Deps[i] = inModule(d)
		}
		g[inModule(p.ImportPath)] = p.Deps
	}
}

func inModule(path string) string {
	if path == module {
		return "."
	}
	return strings.TrimPrefix(path, module+"/")
}

// under says that pkg is one of the folders or lies in one.
func under(pkg string, folders ...string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return pkg == f || strings.HasPrefix(pkg, f+"/") })
}

// isStd tells the standard library by its first element, which has no dot in it.
func isStd(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// violations checks the import rules of the module:
//   - the kernel links the standard library and codec only, and codec the standard library only;
//   - bus, rpc, outbox, idempotency and saga link the kernel, codec and internal, and not each other;
//   - bus and rpc do not link pgx; outbox, idempotency and saga do not link nats.go, but idempotency/kvstore does;
//   - nothing but cmd, examples, internal/devstack and postridertest links nats-server or a test library.
func (g graph) violations() []string {
	const natsServer, natsGo, pgx = "github.com/nats-io/nats-server", "github.com/nats-io/nats.go", "github.com/jackc/pgx"
	siblings := []string{"bus", "rpc", "outbox", "idempotency", "saga"}
	var bad []string
	for _, pkg := range slices.Sorted(maps.Keys(g)) {
		for _, dep := range g[pkg] {
			_, ours := g[dep]
			reason := ""
			switch {
			case pkg == "." && dep != "codec" && (ours || !isStd(dep)):
				reason = "the kernel links the standard library and codec only"
			case pkg == "codec" && (ours || !isStd(dep)):
				reason = "codec links the standard library only"
			case under(pkg, siblings...) && ours && dep != "." && !under(dep, "codec", "internal", topFolder(pkg)):
				reason = "siblings meet in the kernel"
			case under(pkg, siblings...) && under(dep, "internal/devstack"):
				reason = "development servers are not for production code"
			case under(pkg, "bus", "rpc") && under(dep, pgx):
				reason = "a bus or rpc user needs no PostgreSQL"
			case under(pkg, "outbox", "idempotency", "saga") && pkg != "idempotency/kvstore" && under(dep, natsGo):
				reason = "a database user needs no NATS"
			case !under(pkg, "cmd", "examples", "internal/devstack", "postridertest") && under(dep, natsServer, "go.uber.org/goleak", "testing"):
				reason = "servers and test libraries stay out of production code"
			}
			if reason != "" {
				bad = append(bad, fmt.Sprintf("%s links %s: %s", pkg, dep, reason))
			}
		}
	}
	return bad
}

func topFolder(pkg string) string {
	top, _, _ := strings.Cut(pkg, "/")
	return top
}

func TestImportRules(t *testing.T) {
	t.Parallel()
	g := importGraph(t)
	if _, ok := g["."]; !ok || len(g) < 3 {
		t.Fatalf("go list knows %d packages: %v", len(g), slices.Sorted(maps.Keys(g)))
	}
	for _, v := range g.violations() {
		t.Error(v)
	}
}

// The checker itself: each rule, broken in a graph that is fine otherwise.
func TestImportRulesAreEnforced(t *testing.T) {
	t.Parallel()
	const nats, pgx, server = "github.com/nats-io/nats.go", "github.com/jackc/pgx/v5/pgxpool", "github.com/nats-io/nats-server/v2/server"
	good := func() graph {
		return graph{
			".":                   {"codec", "context", "encoding/json"},
			"codec":               {"mime"},
			"codec/protocodec":    {"codec", "google.golang.org/protobuf/proto"},
			"internal/envelope":   {".", "codec", "google.golang.org/protobuf/encoding/protowire"},
			"internal/devstack":   {server, "github.com/jackc/pgx/v5"},
			"bus":                 {".", "codec", "internal/envelope", nats},
			"bus/micro":           {".", "bus", nats},
			"rpc":                 {".", "internal/envelope", nats},
			"outbox":              {".", pgx},
			"idempotency":         {".", pgx},
			"idempotency/kvstore": {".", "idempotency", pgx, nats},
			"saga":                {".", pgx},
			"saga/sagatest":       {".", "saga", pgx},
			"postridertest":       {".", "internal/devstack", server, "testing", "go.uber.org/goleak"},
			"cmd/postrider":       {".", "bus", "outbox", "internal/devstack", server},
			"examples/shop":       {".", "bus", "rpc", "outbox", "saga", "internal/devstack", server},
		}
	}
	if bad := good().violations(); len(bad) > 0 {
		t.Fatalf("the good graph breaks %q", bad)
	}
	for _, tt := range []struct{ pkg, dep string }{
		{".", "bus"},
		{".", "internal/envelope"},
		{".", "codec/protocodec"},
		{".", "github.com/google/uuid"},
		{"codec", "google.golang.org/protobuf/proto"},
		{"codec", "."},
		{"bus", "rpc"},
		{"bus", "outbox"},
		{"bus", pgx},
		{"bus", server},
		{"bus", "internal/devstack"},
		{"bus", "postridertest"},
		{"bus/micro", "rpc"},
		{"rpc", "bus"},
		{"rpc", "github.com/jackc/pgx/v5"},
		{"rpc", "saga"},
		{"outbox", "bus"},
		{"outbox", nats},
		{"outbox", nats + "/jetstream"},
		{"idempotency", "outbox"},
		{"idempotency", nats},
		{"idempotency/kvstore", "bus"},
		{"saga", "outbox"},
		{"saga", nats},
		{"saga/sagatest", "idempotency"},
		{"internal/envelope", server},
		{"codec/protocodec", "testing"},
		{"saga/sagatest", "go.uber.org/goleak"},
	} {
		g := good()
		g[tt.pkg] = append(slices.Clone(g[tt.pkg]), tt.dep)
		bad := g.violations()
		if len(bad) != 1 || !strings.HasPrefix(bad[0], tt.pkg+" links "+tt.dep+": ") {
			t.Errorf("%s links %s: the checker says %q", tt.pkg, tt.dep, bad)
		}
	}
}
