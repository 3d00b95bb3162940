// Package deploy holds what the demo's containers are configured with. There is no code in it but this test.
package deploy

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
)

// Acknowledged means on disk, in everything that we ship.
func TestNATSConfigSyncsAlways(t *testing.T) {
	t.Setenv("NATS_PASSWORD", `"123456"`) // as docker-compose.yml sets it
	o, err := server.ProcessConfigFile("nats.conf")
	if err != nil {
		t.Fatal(err)
	}
	if !o.JetStream || !o.SyncAlways || o.StoreDir != "/data" || o.HTTPPort != 8222 || o.Port != 4222 || o.Password != "123456" {
		t.Errorf("JetStream %v in %s, sync_interval always %v, ports %d and %d, password %q",
			o.JetStream, o.StoreDir, o.SyncAlways, o.Port, o.HTTPPort, o.Password)
	}
}

func TestComposeIsPinnedAndLocal(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	compose := string(b)
	images := regexp.MustCompile(`(?m)^\s+image: (.+)$`).FindAllStringSubmatch(compose, -1)
	if len(images) != 3 {
		t.Errorf("images %v, want nats, postgres and our own", images)
	}
	for _, image := range images {
		if image[1] != "postrider-shop" && !regexp.MustCompile(`^\w+:\d+\.\d+(\.\d+)?-alpine$`).MatchString(image[1]) {
			t.Errorf("image %s has no exact version", image[1])
		}
	}
	for _, port := range regexp.MustCompile(`(?m)^\s+- (\S*\d+:\d+)$`).FindAllStringSubmatch(compose, -1) {
		if !strings.HasPrefix(port[1], "127.0.0.1:") {
			t.Errorf("port %s is open to the network", port[1])
		}
	}
	if !strings.Contains(compose, `NATS_PASSWORD: '"${NATS_PASSWORD:-demo}"'`) {
		t.Error("NATS_PASSWORD is not in quotes: one of digits only would stop the server")
	}
	if strings.Count(compose, "build:") != 1 || !strings.Contains(compose, "  orders:\n    <<: *shop\n    build: .\n") {
		t.Error("not orders alone builds the image: builders of one tag race")
	}
	for _, service := range []string{"orders", "stock", "payments", "shipping"} {
		for _, want := range []string{"[-service, " + service + ",", "-health, -service, " + service + ",", service + ": { condition: service_healthy }"} {
			if !strings.Contains(compose, want) {
				t.Errorf("docker-compose.yml lacks %q", want)
			}
		}
	}
}
