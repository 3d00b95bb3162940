package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"time"

	"github.com/postrider/postrider/internal/devstack"
)

// The roles that this program starts itself in.
const (
	roleServer = "server"
	roleWorker = "worker"
)

// Values of the flag -sync.
const (
	syncAlways  = "always"
	syncDefault = "default"
)

const (
	startTimeout = 30 * time.Second
	jobTimeout   = 2 * time.Minute
)

// serve is the role of the server.
func serve(ctx context.Context, always bool, in io.Reader, out io.Writer) error {
	srv, err := devstack.StartNATS(ctx, devstack.NATSConfig{SyncDefault: !always})
	if err != nil {
		return err
	}
	err = json.NewEncoder(out).Encode(srv.URL)
	_, _ = io.Copy(io.Discard, in)
	return errors.Join(err, srv.Close())
}
