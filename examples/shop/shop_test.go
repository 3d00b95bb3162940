package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

const balancedBooks = "The books balance."

func TestSample(t *testing.T) {
	t.Parallel()
	b := setup(t)
	code, out := b.shop("")
	wantCode(t, code, 0)
	wantText(t, out, "60 lines", "reserve was refused", "charge was refused", "ship was refused", balancedBooks)
	b.wantNames()
}

// wantNames checks that each label of a shipment is what stood in the input, letter by letter.
func (b *bench) wantNames() {
	b.Helper()
	want := map[int64]Order{}
	for _, line := range sampleLines(b.T) {
		var o Order
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			b.Fatal(err)
		}
		want[o.ID] = o
	}
	rows, err := b.db.Query(b.Context(), `select order_id, name, city, country from shop_shipping.shipment`)
	if err != nil {
		b.Fatal(err)
	}
	type label struct {
		ID                  int64
		Name, City, Country string
	}
	labels, err := pgx.CollectRows(rows, pgx.RowToStructByPos[label])
	if err != nil {
		b.Fatal(err)
	}
	if len(labels) == 0 {
		b.Fatal("nothing was shipped")
	}
	for _, l := range labels {
		if o := want[l.ID]; o.ShipName != l.Name || o.City != l.City || o.Country != l.Country {
			b.Errorf("order %d is labelled %q, %q, %q, want %q, %q, %q", l.ID, l.Name, l.City, l.Country, o.ShipName, o.City, o.Country)
		}
	}
}

func TestBadInput(t *testing.T) {
	t.Parallel()
	b := setup(t)
	order := func(id int, sku, qty int) string {
		return fmt.Sprintf(`{"order": %d, "customer": "Ørsted", "ship_via": 1, "lines": [{"sku": %d, "unit_cents": 100, "qty": %d}]}`, id, sku, qty)
	}
	products := filepath.Join(t.TempDir(), "products.jsonl")
	if err := os.WriteFile(products, []byte(`{"sku": 1, "name": "Käse", "in_stock": 50}`), 0o600); err != nil {
		t.Fatal(err)
	}
	input := []string{
		order(1, 1, 5),
		`{"order": 2, "customer": `, // malformed
		order(3, 99, 1),             // unknown product
		order(4, 1, 0),
		order(5, 1, -3),
		"",
		order(1, 1, 5), // the same again
		order(1, 1, 6), // another of the same number
		`{"order": 6, "customer": "x", "ship_via": 1, "lines": []}`,
		`{"order": 7, "customer": "` + strings.Repeat("x", maxLine) + `"}`,
		`{"order": 8, "customer": "x", "ship_via": 1, "lines": [{"sku": 1, "qty": 1.5}]}`,
		order(9, 1, 2),
	}
	code, out := b.shop(strings.Join(input, "\n"), "-orders", "-", "-products", products, "-parallel", "1")
	wantCode(t, code, 1)
	wantText(t, out,
		"11 lines: 2 completed, 0 compensated, 1 repeated, 8 rejected",
		"line 2: unexpected end of JSON input",
		"line 3: call orders.v1/Place: lines: the product with sku 99 is unknown (INVALID_ARGUMENT)",
		"line 4: call orders.v1/Place: lines[0].qty is 0: want 1 to 1000000 (INVALID_ARGUMENT)",
		"line 5: call orders.v1/Place: lines[0].qty is -3",
		"line 9: call orders.v1/Place: lines are 0",
		"line 10: longer than 1048576 bytes",
		"line 11: json: cannot unmarshal number 1.5 into Go struct field",
		"was placed before with other contents (ALREADY_EXISTS)",
		"7 pieces of 1 products", balancedBooks)
}

func TestUndecodableEventGoesToTheDeadLetters(t *testing.T) {
	t.Parallel()
	b := setup(t)
	all := sampleLines(t)
	files := sampleFiles(t)
	code, _ := b.shop(strings.Join(all[:20], "\n"), files...)
	wantCode(t, code, 0)
	nc := b.nats.Connect()
	for _, garbage := range []string{"no event at all", `{"specversion": "1.0"`} {
		if _, err := nc.Request("shop.orders.completed.v1", []byte(garbage), patience); err != nil { // the stream acknowledges
			t.Fatal(err)
		}
	}
	code, out := b.shop(strings.Join(all, "\n"), files...)
	wantCode(t, code, 0)
	wantText(t, out, "2 dead letters", "60 of 60", balancedBooks)
}

// sampleFiles are the flags for the sample's files with orders from standard input.
func sampleFiles(t *testing.T) []string {
	t.Helper()
	args := []string{"-orders", "-"}
	for _, name := range []string{"products", "customers"} {
		data, err := sample.ReadFile("sample/" + name + ".jsonl")
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-"+name, path)
	}
	return args
}

func TestChaos(t *testing.T) {
	t.Parallel()
	b := setup(t)
	code, out := b.shop("", "-chaos", "-seed", "42")
	wantCode(t, code, 0)
	wantText(t, out, "chaos with -seed 42", "60 lines", balancedBooks)
	b.wantNames()
}

func TestNorthwind(t *testing.T) {
	t.Parallel()
	// Beside the repository, when it is there.
	data := filepath.Join("..", "..", "..", "shared", "data", "northwind")
	if _, err := os.Stat(data); err != nil {
		t.Skip("the Northwind data are not there: ", err)
	}
	b := setup(t)
	args := []string{"-stock-factor", "1"}
	for _, name := range []string{"orders", "products", "customers"} {
		args = append(args, "-"+name, filepath.Join(data, name+".jsonl"))
	}
	code, out := b.shop("", args...)
	wantCode(t, code, 0)
	wantText(t, out, "830 lines", "830 of 830", balancedBooks)
}

func TestServersThatAreAway(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const nobody = "127.0.0.1:1"
	for name, args := range map[string][]string{
		"PostgreSQL":              {"-postgres", "postgres://x:y@" + nobody + "/z"},
		"PostgreSQL of a service": {"-postgres", "postgres://x:y@" + nobody + "/z", "-service", "stock"},
		"NATS":                    {"-nats", "nats://" + nobody},
		"NATS of a service":       {"-nats", "nats://" + nobody, "-service", "stock"},
		"NATS of the loader":      {"-nats", "nats://" + nobody, "-service", "loader"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, out := (&bench{t, b.nats, b.db}).shop("", args...)
			wantCode(t, code, 1)
			kind, _, _ := strings.Cut(name, " ")
			wantText(t, strings.ToLower(out), strings.ToLower(kind))
		})
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	for text, args := range map[string]string{
		"-service \"x\"":          "-service x",
		"-service needs -nats":    "-service stock",
		"loader needs -nats":      "-service loader",
		"-health needs":           "-health",
		"go together":             "-orders x",
		"-stock-factor 0":         "-stock-factor 0",
		"-parallel 0":             "-parallel 0",
		"unknown argument":        "hello",
		"all services in one":     "-service stock -nats x -postgres y -chaos",
		"flag provided but not":   "-nonsense",
		"invalid value \"a\"":     "-seed a",
		"-stock-factor 100000000": "-stock-factor 100000000",
	} {
		var out strings.Builder
		code := run(t.Context(), strings.Fields(args), nil, &out, &out)
		if code != 2 || !strings.Contains(out.String(), text) {
			t.Errorf("%s: exit code %d, want 2, output %q, want it to say %q", args, code, out.String(), text)
		}
	}
}
