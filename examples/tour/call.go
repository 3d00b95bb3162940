package main

import (
	"context"
	"time"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/rpc"
)

func serve(srv *rpc.Server) error {
	return srv.Register(GetPrice.Handler(func(_ context.Context, req *PriceRequest) (*Price, error) {
		return lookUp(req.SKU)
	}))
}

func priceOf(ctx context.Context, client *rpc.Client, sku string) (*Price, error) {
	return rpc.Call(ctx, client, GetPrice, &PriceRequest{SKU: sku}, rpc.Timeout(2*time.Second), rpc.WaitForReady())
}

// lookUp is what the service does, calls or no calls. The error's code reaches the caller.
func lookUp(sku string) (*Price, error) {
	if sku != "chai" {
		return nil, postrider.Errorf(postrider.NotFound, "there is no %q in the catalog", sku)
	}
	return &Price{Cents: 1800}, nil
}
