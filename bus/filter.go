package bus

import (
	"errors"
	"runtime/debug"

	"github.com/postrider/postrider"
)

// Filter has the group handle only the messages that want says yes to. Others are acknowledged before middleware and
// handler see them, expired ones too, and counted in [Stats]. want goes by the attributes: the data is as it was sent,
// compressed, encrypted or elsewhere. It must not change the message, and must be safe for concurrent use; if it panics, that
// is a failed attempt. The messages come over the network all the same: subscribe to fewer topics where that will do.
// Default: everything is wanted.
func Filter(want func(m *postrider.Message) bool) SubscribeOption {
	return func(c *subscribeConfig) { c.filter = want }
}

// errUnwanted is the outcome of a message that the filter does not want.
var errUnwanted = postrider.Permanent(errors.New("bus: the filter does not want the message")) //nolint:gochecknoglobals // constant

// wants asks the filter.
func (c *subscribeConfig) wants(m *postrider.Message) (err error) {
	if c.filter == nil {
		return nil
	}
	defer func() {
		if r := recover(); r != nil {
			err = postrider.Errorf(postrider.Internal, "bus: the filter panicked: %v\n%s", r, debug.Stack())
		}
	}()
	if !c.filter(m) {
		return errUnwanted
	}
	return nil
}
