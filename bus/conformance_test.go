package bus_test

import (
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/postridertest"
	"github.com/postrider/postrider/postridertest/bustest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	t.Run("Binary", func(t *testing.T) { conformance(t, bus.Binary) })
	t.Run("Compact", func(t *testing.T) { conformance(t, bus.Compact) })
}

func conformance(t *testing.T, mode bus.Mode) {
	t.Helper()
	t.Parallel()
	bustest.Suite{Start: func(t testing.TB) bustest.Broker {
		srv := postridertest.NewNATS(t)
		other := srv.Connect() // another program
		conns := map[bustest.Bus]*nats.Conn{}
		return bustest.Broker{
			Open: func(cfg bus.Config) (bustest.Bus, error) {
				nc := srv.Connect()
				cfg.Mode = mode
				b, err := bus.New(nc, cfg)
				conns[b] = nc
				return b, err
			},
			DeadLetters: func(b bustest.Bus) bustest.DeadLetters { return b.(*bus.Bus).DeadLetters() },
			Parked:      func(b bustest.Bus) bustest.Parked { return b.(*bus.Bus).Parked() },
			Async: func(b bustest.Bus, window int, result func(*postrider.Message, error)) bustest.Async {
				return b.(*bus.Bus).Async(window, result)
			},
			Crash: func(b bustest.Bus) { conns[b].Close() },
			Inject: func(topic string, data []byte) error {
				_, err := other.Request(topic, data, nats.DefaultTimeout)
				return err
			},
			Restart: func() { srv.Stop(); srv.Start() },
		}
	}}.Run(t)
}
