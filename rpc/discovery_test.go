package rpc

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/nats-io/nats.go/micro"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/postridertest"
)

// The types and subjects are those of nats.go's micro package, which the nats command uses too.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	nc := postridertest.NATS(t)
	find := postrider.NewMethod[item, hold]("shop.orders.v1/Find")
	srv := serve(t, nc, ServerConfig{Version: "1.2.3", Queue: "workers"},
		reserve.Handler(answerOrRefuse), find.Handler(echo))
	c := dial(t, nc, ClientConfig{})
	for _, sku := range []int{1, 2, 404} {
		_, err := Call(t.Context(), c, reserve, &item{SKU: sku})
		if (err != nil) != (sku == 404) {
			t.Fatal(err)
		}
	}
	ask := func(verb micro.Verb, name, id string, into any) {
		t.Helper()
		subject, err := micro.ControlSubject(verb, name, id)
		if err != nil {
			t.Fatal(err)
		}
		msg, err := nc.Request(subject, nil, 10*time.Second)
		if err != nil {
			t.Fatalf("%s: %v", subject, err)
		}
		if err := json.Unmarshal(msg.Data, into); err != nil {
			t.Fatalf("%s: %v", subject, err)
		}
	}

	for _, id := range []string{"", srv.id} {
		var ping micro.Ping
		ask(micro.PingVerb, "stock-v1", id, &ping)
		if ping.Type != micro.PingResponseType || ping.Name != "stock-v1" || ping.ID != srv.id || ping.Version != "1.2.3" || ping.Metadata == nil {
			t.Errorf("ping %+v", ping)
		}
		var info micro.Info
		ask(micro.InfoVerb, "stock-v1", id, &info)
		if info.Type != micro.InfoResponseType || len(info.Endpoints) != 1 {
			t.Fatalf("info %+v", info)
		}
		if e := info.Endpoints[0]; e.Name != "Reserve" || e.Subject != "rpc.stock.v1.Reserve" || e.QueueGroup != "workers" {
			t.Errorf("endpoint %+v", e)
		}
		var stats micro.Stats
		ask(micro.StatsVerb, "stock-v1", id, &stats)
		if stats.Type != micro.StatsResponseType || stats.Started.IsZero() || len(stats.Endpoints) != 1 {
			t.Fatalf("stats %+v", stats)
		}
		e := stats.Endpoints[0]
		if e.NumRequests != 3 || e.NumErrors != 1 || e.LastError == "" || e.ProcessingTime <= 0 || e.AverageProcessingTime != e.ProcessingTime/3 {
			t.Errorf("figures %+v", e)
		}
	}

	// Without a name every service answers.
	for verb, subject := range map[string]string{"ping": "$SRV.PING", "info": "$SRV.INFO", "stats": "$SRV.STATS"} {
		inbox := nc.NewInbox()
		sub, err := nc.SubscribeSync(inbox)
		if err != nil {
			t.Fatal(err)
		}
		if err := nc.PublishRequest(subject, inbox, nil); err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		for range 2 {
			msg, err := sub.NextMsg(10 * time.Second)
			if err != nil {
				t.Fatalf("%s: %v", verb, err)
			}
			var id micro.ServiceIdentity
			if err := json.Unmarshal(msg.Data, &id); err != nil {
				t.Fatal(err)
			}
			names[id.Name] = true
		}
		if !names["stock-v1"] || !names["shop-orders-v1"] {
			t.Errorf("%s was answered by %v", verb, names)
		}
	}
}
