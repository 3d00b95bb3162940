package encrypt

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/internal/wrap"
)

// ErrUnknownKey is returned for the id of a key that a [KeyProvider] does not have and will not have: no retry mends it.
var ErrUnknownKey = errors.New("unknown key")

// KeySize is the length of a secret, in bytes.
const KeySize = 32

// Key is an AES-256 key with its id. It is immutable, safe for concurrent use, and prints as its id only.
type Key struct {
	id   string
	aead cipher.AEAD // puts a random nonce before the ciphertext
}

// NewKey makes a key of 32 secret bytes. Its id, 1 to 255 bytes, stands readable in every payload. The secret may be wiped
// afterwards. The error is InvalidArgument.
func NewKey(id string, secret []byte) (*Key, error) {
	if id == "" || len(id) > wrap.MaxString {
		return nil, postrider.Errorf(postrider.InvalidArgument, "encrypt: key id %q: want 1 to %d bytes", id, wrap.MaxString)
	}
	if len(secret) != KeySize {
		return nil, postrider.Errorf(postrider.InvalidArgument, "encrypt: key %q has %d bytes: AES-256 wants %d", id, len(secret), KeySize)
	}
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "encrypt: key %q: %w", id, err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, postrider.Errorf(postrider.InvalidArgument, "encrypt: key %q: %w", id, err)
	}
	return &Key{id, aead}, nil
}

// ID returns the id.
func (k *Key) ID() string { return k.id }

// String returns the id, so that logs hold no secret.
func (k *Key) String() string { return "key " + k.id }

// GoString is String.
func (k *Key) GoString() string { return k.String() }

// KeyProvider knows keys: a [Ring], or a key service behind a cache, since it is asked for every message and without a
// context. An error that wraps [ErrUnknownKey], or that [postrider.Retryable] calls hopeless, is final and sends the message
// to the dead letters; any other means that the provider is away, and the message is tried again later. Implementations are
// safe for concurrent use.
type KeyProvider interface {
	// Current returns the key that encrypts now.
	Current() (*Key, error)

	// Key returns the key with an id that stands in a payload, which may be forged.
	Key(id string) (*Key, error)
}

// Ring is a [KeyProvider] in memory. It is safe for concurrent use.
type Ring struct {
	mu      sync.RWMutex
	current *Key
	keys    map[string]*Key
}

// NewRing returns a ring that encrypts with current and decrypts with all. Two keys with one id are AlreadyExists.
func NewRing(current *Key, others ...*Key) (*Ring, error) {
	r := &Ring{current: current, keys: map[string]*Key{current.id: current}}
	for _, k := range others {
		if err := r.Add(k); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Current implements [KeyProvider].
func (r *Ring) Current() (*Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.current, nil
}

// Key implements [KeyProvider]. The error wraps [ErrUnknownKey] and names the keys that are there.
func (r *Ring) Key(id string) (*Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if k := r.keys[id]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("%w: the ring has %q", ErrUnknownKey, slices.Sorted(maps.Keys(r.keys)))
}

// Add adds a key that decrypts. Another key with its id is AlreadyExists.
func (r *Ring) Add(k *Key) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keys[k.id] != nil {
		return postrider.Errorf(postrider.AlreadyExists, "encrypt: add key %q: the ring has a key with this id", k.id)
	}
	r.keys[k.id] = k
	return nil
}

// Use makes an added key the one that encrypts. An id that was not added is NotFound.
func (r *Ring) Use(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.keys[id]
	if k == nil {
		return postrider.Errorf(postrider.NotFound, "encrypt: use key %q: %w: add it first", id, ErrUnknownKey)
	}
	r.current = k
	return nil
}

// Remove forgets a key: its messages cannot be read any more. The current key is FailedPrecondition; an id that is not
// there is no error.
func (r *Ring) Remove(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.current.id == id {
		return postrider.Errorf(postrider.FailedPrecondition, "encrypt: remove key %q: it is the current one: use another first", id)
	}
	delete(r.keys, id)
	return nil
}
