package claimcheck_test

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/bus"
	"github.com/postrider/postrider/bus/claimcheck"
	"github.com/postrider/postrider/codec"
	"github.com/postrider/postrider/internal/devstack"
)

var VideoUploaded = postrider.NewTopic[[]byte]("videos.uploaded.v1", postrider.Encoding(codec.Bytes))

func Example() {
	ctx, cancel := context.WithCancel(context.Background())
	stack, err := devstack.StartNATS(ctx, devstack.NATSConfig{})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()
	nc, err := nats.Connect(stack.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer nc.Close()

	const week = 7 * 24 * time.Hour
	claims, err := claimcheck.New(nc, claimcheck.Config{MaxAge: 2 * week})
	if err != nil {
		log.Fatal(err)
	}
	b, err := bus.New(nc, bus.Config{
		Source:     "//videos",
		Streams:    []bus.Stream{{Name: "VIDEOS", Topics: []string{"videos.>"}, MaxAge: week}},
		Middleware: []postrider.Middleware{claims.Middleware}, // fetches
	})
	if err != nil {
		log.Fatal(err)
	}
	err = b.Subscribe(VideoUploaded.Handler(func(_ context.Context, e postrider.Event[[]byte]) error {
		fmt.Println("a video of", len(*e.Value)>>20, "MiB")
		cancel() // the example is over: drain
		return nil
	}), bus.Group("encoder"), bus.From(bus.DeliverAll))
	if err != nil {
		log.Fatal(err)
	}
	video := bytes.Repeat([]byte("frame..."), 5<<20/8) // the server takes 1 MiB
	if err := VideoUploaded.Publish(ctx, claims.Publisher(b), &video); err != nil {
		log.Fatal(err)
	}
	if err := postrider.Run(ctx, b); err != nil {
		log.Fatal(err)
	}
	// Output: a video of 5 MiB
}
