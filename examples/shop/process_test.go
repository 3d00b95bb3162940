package main

import (
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/postrider/postrider/postridertest"
)

// patience bounds waits that only a failing test waits for.
const patience = 30 * time.Second

// waitForOrders waits until so many orders are in the books.
func (b *bench) waitForOrders(want int) {
	b.Helper()
	postridertest.Eventually(b, func() error {
		var n int
		err := b.db.QueryRow(b.Context(), `select count(*) from shop_orders.placed_order`).Scan(&n)
		if err == nil && n < want {
			err = fmt.Errorf("%d of %d orders are placed", n, want)
		}
		return err
	})
}

func TestServicesAsProcesses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	services := map[string]*exec.Cmd{}
	for _, name := range serviceNames() {
		services[name] = b.process(nil, "-service", name)
	}
	for _, name := range serviceNames() {
		postridertest.Eventually(t, func() error {
			if code, out := b.shop("", "-health", "-service", name); code != 0 {
				return fmt.Errorf("%s is not well: %s", name, out)
			}
			return nil
		})
	}
	stdin, orders := io.Pipe()
	result := make(chan string, 1)
	go func() {
		var out strings.Builder
		args := append(append(b.servers(), "-service", "loader"), sampleFiles(t)...)
		code := run(t.Context(), args, stdin, &out, &out)
		result <- fmt.Sprintf("exit code %d\n%s", code, out.String())
	}()
	all := sampleLines(t)
	half := len(all) / 2
	for i, line := range all {
		if i == half { // with half of the orders under way, two services are killed and come back
			b.waitForOrders(half)
			for _, name := range []string{"orders", "stock"} {
				kill(services[name])
				b.process(nil, "-service", name)
			}
		}
		if _, err := io.WriteString(orders, line+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	if err := orders.Close(); err != nil {
		t.Fatal(err)
	}
	out := <-result
	t.Log(out)
	wantText(t, out, "exit code 0", "60 lines", "60 of 60", balancedBooks)
	b.wantNames()

	shipping := services["shipping"]
	if err := shipping.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := shipping.Wait(); err != nil {
		t.Errorf("a service that is asked to end drains and exits with 0, this one: %v", err)
	}
	kill(services["payments"])
	if code, _ := b.shop("", "-health", "-service", "payments"); code != 1 {
		t.Errorf("a dead service is healthy: exit code %d", code)
	}
}

func TestKilledDemoGoesOnAtTheNextStart(t *testing.T) {
	t.Parallel()
	b := setup(t)
	stdin, orders := io.Pipe()
	demo := b.process(stdin, sampleFiles(t)...)
	all := sampleLines(t)
	half := len(all) / 2
	for _, line := range all[:half] {
		if _, err := io.WriteString(orders, line+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	b.waitForOrders(half)
	_ = demo.Process.Kill()
	_ = orders.Close()
	_ = demo.Wait()

	code, out := b.shop("")
	wantCode(t, code, 0)
	wantText(t, out, "60 lines", "60 of 60", balancedBooks)
	b.wantNames()
}
