package bus

import (
	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
)

// pokeTopics stand before the subjects of pokes, which no stream keeps.
const pokeTopics = "poke"

// Poker wakes who waits in other processes: core messages without content on one subject. It is an outbox's Config.Poker. Its
// methods are safe for concurrent use.
type Poker struct {
	bus     *Bus
	subject string
}

// Poker returns the Poker of a name, by custom that of the outbox: who pokes and who is poked must agree on it. The name is one token
// of letters, digits, - and _. Pokes are sent to the subject poke.<name>.
func (b *Bus) Poker(name string) (*Poker, error) {
	if !isToken(name) {
		return nil, postrider.Errorf(postrider.InvalidArgument, "bus: Poker: name %q: want letters, digits, - and _", name)
	}
	return &Poker{b, b.subject(pokeTopics + "." + name)}, nil
}

// Poke pokes whoever listens now. It does not wait, and is Unavailable without a connection: then nobody is poked later either.
func (p *Poker) Poke() error { return p.bus.pub.send(&nats.Msg{Subject: p.subject}) }

// OnPoke has f called for each poke, those of this bus included, until stop is called.
func (p *Poker) OnPoke(f func()) (stop func(), err error) {
	sub, err := p.bus.nc.Subscribe(p.subject, func(*nats.Msg) { f() })
	if err != nil {
		return nil, fromNATS("bus: subscribe to "+p.subject, err)
	}
	return func() { _ = sub.Unsubscribe() }, nil // fails only if the connection is closed
}
