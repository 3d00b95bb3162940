package encrypt_test

import (
	"bytes"
	"encoding/hex"
	"testing"

	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/codec/compress"
	"github.com/postrider/postrider/codec/encrypt"
	"github.com/postrider/postrider/internal/wiredoc"
)

// docs/wire.md shows a payload byte by byte. What it shows is read, and what is written differs from it in what is random only.
func TestWireDocument(t *testing.T) {
	t.Parallel()
	example := func(name string) []byte { return wiredoc.Bytes(t, "text "+name) }
	secret := make([]byte, encrypt.KeySize)
	for i := range secret {
		secret[i] = byte(i)
	}
	key, err := encrypt.NewKey("k1", secret)
	if err != nil {
		t.Fatal(err)
	}
	type amount struct {
		Cents int `json:"cents"`
	}
	packed := compress.New(compress.Config{}, codec.JSON)
	sealed := encrypt.New(newRing(t, key), packed)
	for name, c := range map[string]codec.Codec{"sealed": sealed, "opened": packed} {
		var got amount
		if err := c.Unmarshal(example(name), &got); err != nil || got.Cents != 1250 {
			t.Errorf("example %q is read as %+v, %v", name, got, err)
		}
	}
	if got, err := packed.Append(nil, &amount{1250}); err != nil || !bytes.Equal(got, example("opened")) {
		t.Errorf("written\n%s, %v, docs/wire.md has\n%s", hex.Dump(got), err, hex.Dump(example("opened")))
	}
	const head = 1 + 3 + 37
	got, err := sealed.Append(nil, &amount{1250})
	if want := example("sealed"); err != nil || len(got) != len(want) || !bytes.Equal(got[:head], want[:head]) {
		t.Errorf("written\n%s, %v, docs/wire.md has\n%s", hex.Dump(got), err, hex.Dump(want))
	}
}
