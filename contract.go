package postrider

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/postrider/postrider/codec"
)

// contract is what a Topic and a Method have in common: a name, an encoding, a key.
type contract struct {
	name   string
	codecs codec.Set
	key    func(any) string
}

// ContractOption sets how the values of a [Topic] or the requests of a [Method] are encoded and keyed.
type ContractOption func(*contract)

// Encoding names the codecs of a contract: the first writes, all are read. The default is [codec.Standard].
func Encoding(codecs ...codec.Codec) ContractOption {
	return func(c *contract) {
		if len(codecs) == 0 || slices.Contains(codecs, nil) {
			panic("postrider: contract " + c.name + ": Encoding needs at least one codec, and none that is nil")
		}
		c.codecs = codecs
	}
}

// KeyBy gives every message a partition key taken from its value (T is the contract's type). Messages with the same key
// keep their order: they are handled in the order in which their transactions committed. An empty key means none.
func KeyBy[T any](key func(*T) string) ContractOption {
	return func(c *contract) {
		if key == nil {
			panic("postrider: contract " + c.name + ": the function of KeyBy is nil")
		}
		c.key = func(v any) string {
			t, ok := v.(*T)
			if !ok {
				panic(fmt.Sprintf("postrider: contract %s: KeyBy takes %T, the contract's values are %T", c.name, t, v))
			}
			return key(t)
		}
	}
}

// newContract makes the contract of a name. zero is a pointer to the zero value of its type.
func newContract(name string, zero any, opts []ContractOption) contract {
	if t := reflect.TypeOf(zero).Elem(); t.Kind() == reflect.Pointer {
		panic(fmt.Sprintf("postrider: contract %s is one of %v: name the type itself, %v; its values travel as pointers", name, t, t.Elem()))
	}
	c := contract{name: name, codecs: codec.Standard()}
	for i, opt := range opts {
		if opt == nil {
			panic(fmt.Sprintf("postrider: contract %s: option %d is nil", name, i+1))
		}
		opt(&c)
	}
	if c.key != nil {
		func() { // a KeyBy of another type must fail at start, and a key function need not bear a zero value
			defer func() {
				if r := recover(); r != nil && strings.HasPrefix(fmt.Sprint(r), "postrider: ") {
					panic(r)
				}
			}()
			c.key(zero)
		}()
	}
	return c
}

// message builds the message that carries v.
func (c *contract) message(ctx context.Context, v any, opts []PublishOption) (*Message, error) {
	data, err := c.codecs[0].Append(nil, v)
	if err != nil {
		return nil, codecError("encode "+c.name, err)
	}
	m := &Message{ID: NewID(), Type: c.name, Time: time.Now(), ContentType: c.codecs[0].ContentType(), Data: data}
	if c.key != nil {
		if key := c.key(v); key != "" {
			if err := m.SetExtension(ExtPartitionKey, key); err != nil {
				return nil, err
			}
		}
	}
	for i, opt := range opts {
		if opt == nil {
			return nil, Permanent(Errorf(InvalidArgument, "message of %s: option %d is nil", c.name, i+1))
		}
		if err := opt(m); err != nil {
			return nil, err
		}
	}
	m.link(ctx)
	return m, nil
}

// send publishes what message made, if it made one.
func (c *contract) send(ctx context.Context, p Publisher, msgs ...*Message) error {
	if p == nil {
		return Permanent(Errorf(InvalidArgument, "publish %s: the Publisher is nil", c.name))
	}
	return p.Publish(ctx, msgs...)
}

// nilValue is the error for a message without a value: a codec would make one of it that decodes to zeros.
func (c *contract) nilValue() error {
	return Permanent(Errorf(InvalidArgument, "message of %s: the value is nil", c.name))
}

// decode reads m's data into v.
func (c *contract) decode(m *Message, v any) error {
	op := func() string { return "decode " + c.name + " " + m.ID }
	if ref := m.Extension(ExtDataRef); ref != "" && len(m.Data) == 0 { // an empty value would pass in many a codec
		return &Error{
			Code: FailedPrecondition, Op: op(),
			Msg: "the data is not in the message but at " + ref + ": give the handler the middleware that fetches it (bus/claimcheck)",
		}
	}
	cd, err := c.codecs.For(m.ContentType)
	if err == nil {
		err = cd.Unmarshal(m.Data, v)
	}
	if err != nil {
		return codecError(op(), err)
	}
	return nil
}

// codecError gives the error of a codec its class. What cannot be encoded or decoded now cannot be later either, unless the
// codec says that something it needs, such as a key, is Unavailable.
func codecError(op string, err error) error {
	if errors.Is(err, Unavailable) {
		return &Error{Code: Unavailable, Op: op, Err: err}
	}
	return Permanent(&Error{Code: InvalidArgument, Op: op, Err: err})
}

// checkName panics unless name is made of tokens of letters, digits, "-" and "_", joined by dots.
func checkName(kind, name string) {
	if len(name) > 200 {
		panic(fmt.Sprintf("postrider: %s name %q is longer than 200 bytes", kind, name))
	}
	for token := range strings.SplitSeq(name, ".") {
		ok := token != ""
		for i := range len(token) {
			c := token[i]
			ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
		}
		if !ok {
			panic(fmt.Sprintf("postrider: %s name %q: want tokens of letters, digits, - and _, joined by dots", kind, name))
		}
	}
}
