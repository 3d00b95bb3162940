// Package cloudevents is the door between Postrider and the CloudEvents Go SDK: it turns a [postrider.Message] into an event
// of the SDK and back, for programs that hold SDK events already, or need a protocol binding that only the SDK has.
//
//	m, err := cloudevents.FromEvent(e) // received by an SDK client
//	if err == nil {
//		err = b.Publish(ctx, m)
//	}
//
// A message that goes through ToEvent and FromEvent comes back the same, but for what is no attribute: Topic, Delivery, and
// the notation of its time's zone. An event comes back with its extensions in canonical string form, which CloudEvents
// declares equal.
//
// The functions hold no state and are safe for concurrent use. This package is not for the paths of every message: nothing
// else in Postrider links the SDK.
package cloudevents

import (
	"fmt"
	"net/url"
	"strings"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/cloudevents/sdk-go/v2/types"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/envelope"
)

// ToEvent returns m as an event of version 1.0. The two share the data. An m that [postrider.Message.Validate] refuses is
// an InvalidArgument error.
func ToEvent(m *postrider.Message) (event.Event, error) {
	if err := m.Validate(); err != nil {
		return event.Event{}, err
	}
	// The attributes are set as fields: the SDK's setters would trim them.
	ec := &event.EventContextV1{ID: m.ID, Type: m.Type, Source: types.URIRef{URL: exactURL(m.Source)}}
	if m.Subject != "" {
		ec.Subject = &m.Subject
	}
	if m.ContentType != "" {
		ec.DataContentType = &m.ContentType
	}
	if m.DataSchema != "" {
		ec.DataSchema = &types.URI{URL: exactURL(m.DataSchema)}
	}
	if !m.Time.IsZero() {
		ec.Time = &types.Timestamp{Time: m.Time}
	}
	for _, x := range m.Extensions {
		if err := ec.SetExtension(x.Name, x.Value); err != nil {
			return event.Event{}, fmt.Errorf("cloudevents: extension %s: %w", x.Name, err)
		}
	}
	return event.Event{Context: ec, DataEncoded: m.Data, DataBase64: !envelope.Textual(m)}, nil
}

// exactURL returns the URL whose String is s, a valid URI reference. Where net/url has another notation for it (of %7E or
// a scheme in capitals) the URL is opaque: an event's identity is its source and id, so that the source must not change.
func exactURL(s string) url.URL {
	u, err := url.Parse(s)
	if err == nil && u.String() == s {
		return *u
	}
	if err == nil && u.Scheme != "" {
		return url.URL{Scheme: s[:len(u.Scheme)], Opaque: s[len(u.Scheme)+1:]}
	}
	return url.URL{Opaque: s}
}

// FromEvent returns e as a message. The two share the data. Events of version 0.3 are taken as 1.0. An event that
// [postrider.Message.Validate] refuses is an InvalidArgument error.
func FromEvent(e event.Event) (*postrider.Message, error) {
	if e.Context == nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "cloudevents: the event has no context")
	}
	ec := e.Context.AsV1()
	m := &postrider.Message{ID: ec.ID, Source: ec.Source.String(), Type: ec.Type, Data: e.DataEncoded}
	if ec.Subject != nil {
		m.Subject = *ec.Subject
	}
	if ec.DataContentType != nil {
		m.ContentType = *ec.DataContentType
	}
	if ec.DataSchema != nil {
		m.DataSchema = ec.DataSchema.String()
	}
	if ec.Time != nil {
		m.Time = ec.Time.Time
	}
	for name, value := range ec.Extensions {
		text, err := types.Format(value)
		if err == nil {
			err = m.SetExtension(strings.ToLower(name), text)
		}
		if err != nil {
			return nil, &postrider.Error{Code: postrider.InvalidArgument, Op: "cloudevents: extension " + name, Err: err}
		}
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return m, nil
}
