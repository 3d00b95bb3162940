package envelope

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// ContentTypeProtoBatch and ContentTypeJSONBatch are the media types of several events in one message.
const (
	ContentTypeProtoBatch = "application/cloudevents-batch+protobuf"
	ContentTypeJSONBatch  = "application/cloudevents-batch+json"
)

// SplitJSON returns the events of a batch in the JSON batch format (cloudevents/spec: cloudevents/formats/json-format.md,
// section 4), each for [ParseJSON].
func SplitJSON(b []byte) ([][]byte, error) {
	var raw []json.RawMessage
	err := json.Unmarshal(b, &raw)
	if err == nil && raw == nil {
		err = errors.New("null is no array")
	}
	if err != nil {
		return nil, fmt.Errorf("cloudevents JSON batch format: %w", err)
	}
	events := make([][]byte, len(raw))
	for i, event := range raw {
		events[i] = event
	}
	return events, nil
}

// SplitProto returns the events of a batch in the protobuf batch format (cloudevents/spec: cloudevents/formats/protobuf-format.md,
// section 5), each for [ParseProto]. They are parts of b.
func SplitProto(b []byte) ([][]byte, error) {
	var events [][]byte
	err := fields(b, 0, func(num protowire.Number, v value) error {
		if num == 1 && v.kind == protowire.BytesType {
			events = append(events, slices.Clip(v.bytes))
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cloudevents protobuf batch format: %w", err)
	}
	return events, nil
}
