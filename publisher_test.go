package postrider_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/postrider/postrider"
)

func TestTimesOfMessages(t *testing.T) {
	t.Parallel()
	topic := postrider.NewTopic[struct{}]("times.v1")
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		for name, c := range map[string]struct {
			opt       postrider.PublishOption
			extension string
			want      time.Time // zero: InvalidArgument
		}{
			"delay":          {postrider.Delay(90 * time.Minute), postrider.ExtDeliverAt, now.Add(90 * time.Minute)},
			"no delay":       {postrider.Delay(0), postrider.ExtDeliverAt, now},
			"negative delay": {postrider.Delay(-time.Nanosecond), "", time.Time{}},
			"at":             {postrider.At(now.Add(time.Nanosecond)), postrider.ExtDeliverAt, now.Add(time.Nanosecond)},
			"at another zone": {
				postrider.At(now.In(time.FixedZone("", 7200))), postrider.ExtDeliverAt, now,
			},
			"at no time":  {postrider.At(time.Time{}), "", time.Time{}},
			"at year 1e4": {postrider.At(time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)), "", time.Time{}},
			"expires":     {postrider.Expires(time.Second), postrider.ExtExpiryTime, now.Add(time.Second)},
			"expired":     {postrider.Expires(0), "", time.Time{}},
		} {
			m, err := topic.Message(t.Context(), &struct{}{}, c.opt)
			switch {
			case c.want.IsZero():
				if !errors.Is(err, postrider.InvalidArgument) {
					t.Errorf("%s: error is %v, want InvalidArgument", name, err)
				}
			case err != nil:
				t.Errorf("%s: %v", name, err)
			case m.Extension(c.extension) != c.want.UTC().Format(time.RFC3339Nano):
				t.Errorf("%s: %s is %q, want %v", name, c.extension, m.Extension(c.extension), c.want)
			}
		}
	})
}
