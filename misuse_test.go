package postrider_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/postridertest"
)

type parcel struct{ ID string }

// What cannot work panics when the program starts, and says where and why.
func TestMistakesPanicAtStart(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[parcel]("parcels.sent.v1")
	method := postrider.NewMethod[parcel, parcel]("parcels.v1/Send")
	for name, tt := range map[string]struct {
		make func()
		text string
	}{
		"pointer":        {func() { postrider.NewTopic[*parcel]("parcels.sent.v1") }, "contract parcels.sent.v1 is one of *postrider_test.parcel"},
		"pointer reply":  {func() { postrider.NewMethod[parcel, *parcel]("parcels.v1/Send") }, "contract parcels.v1/Send is one of"},
		"option":         {func() { postrider.NewTopic[parcel]("parcels.sent.v1", nil) }, "contract parcels.sent.v1: option 1 is nil"},
		"no codec":       {func() { postrider.NewTopic[parcel]("parcels.sent.v1", postrider.Encoding()) }, "Encoding needs"},
		"nil codec":      {func() { postrider.NewTopic[parcel]("parcels.sent.v1", postrider.Encoding(codec.JSON, nil)) }, "Encoding needs"},
		"key":            {func() { postrider.NewTopic[parcel]("parcels.sent.v1", postrider.KeyBy[parcel](nil)) }, "the function of KeyBy is nil"},
		"handler":        {func() { topic.Handler(nil) }, "handler of parcels.sent.v1: the function is nil"},
		"batch handler":  {func() { topic.BatchHandler(nil) }, "handler of parcels.sent.v1: the function is nil"},
		"method handler": {func() { method.Handler(nil) }, "handler of parcels.v1/Send: the function is nil"},
		"raw handler":    {func() { postrider.RawHandler("parcels.>", nil) }, "handler of parcels.>: the function is nil"},
		"middleware": {func() {
			postrider.RawHandler("parcels.>", func(context.Context, *postrider.Message) error { return nil }).With(nil)
		}, "handler of parcels.>: middleware 1 is nil"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			defer func() {
				if text := fmt.Sprint(recover()); !strings.HasPrefix(text, "postrider: ") || !strings.Contains(text, tt.text) {
					t.Errorf("panic %q, want one that says %q", text, tt.text)
				}
			}()
			tt.make()
		})
	}
}

// What is nil later on is an error that no retry mends.
func TestNilIsRefused(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	topic := postrider.NewTopic[parcel]("parcels.sent.v1")
	method := postrider.NewMethod[parcel, parcel]("parcels.v1/Send")
	handler := topic.Handler(func(context.Context, postrider.Event[parcel]) error { return nil })
	var to postridertest.Recorder
	for name, call := range map[string]func() error{
		"value":           func() error { return topic.Publish(ctx, &to, nil) },
		"one of several":  func() error { return topic.PublishAll(ctx, &to, []*parcel{{}, nil}) },
		"request":         func() error { return method.Send(ctx, &to, nil) },
		"option":          func() error { return topic.Publish(ctx, &to, &parcel{}, nil) },
		"publisher":       func() error { return topic.Publish(ctx, nil, &parcel{}) },
		"publisher (all)": func() error { return topic.PublishAll(ctx, nil, []*parcel{{}}) },
		"command":         func() error { return method.Send(ctx, nil, &parcel{}) },
		"message":         func() error { return to.Publish(ctx, nil) },
		"handled message": func() error { _, err := handler.Handle(ctx, nil); return err },
		"part":            func() error { return postrider.Run(ctx, mustNotRun(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := call()
			if !errors.Is(err, postrider.InvalidArgument) || postrider.Retryable(err) || !strings.Contains(err.Error(), "nil") {
				t.Errorf("%v, want InvalidArgument that says what is nil", err)
			}
		})
	}
	if n := len(to.Messages()); n != 0 {
		t.Errorf("%d messages were published", n)
	}
}

// mustNotRun is a Runner that fails.
func mustNotRun() postrider.Runner {
	return runner(func(context.Context) error { return errors.New("a part ran beside one that is nil") })
}

// A handler that returns neither response nor error answers with the zero response, in every encoding.
func TestNilResponseIsZero(t *testing.T) {
	t.Parallel()
	method := postrider.NewMethod[parcel, []byte]("parcels.v1/Label", postrider.Encoding(codec.JSON))
	req, err := method.Request(t.Context(), &parcel{})
	if err != nil {
		t.Fatal(err)
	}
	reply, err := method.Handler(func(context.Context, *parcel) (*[]byte, error) { return nil, nil }).Handle(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if res, err := method.Response(reply); err != nil || len(*res) != 0 {
		t.Errorf("response %v, %v", res, err)
	}
}

func TestErrorSaysItsCodeOnce(t *testing.T) {
	t.Parallel()
	inner := postrider.Errorf(postrider.NotFound, "no such thing")
	for _, err := range []error{
		&postrider.Error{Code: postrider.NotFound, Op: "get o-1", Err: inner},
		postrider.Errorf(postrider.NotFound, "get o-1: %w", inner),
	} {
		if got, want := err.Error(), "get o-1: no such thing (NOT_FOUND)"; got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
