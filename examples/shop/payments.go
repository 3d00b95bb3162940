package main

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/postrider/postrider"
	"github.com/postrider/postrider/idempotency"
)

// payments charges customers and keeps the sales journal.
type payments struct{ *service }

func newPayments(_ context.Context, s *service) error {
	p := &payments{s}
	return errors.Join(
		s.server.Register(AddAccounts.Handler(p.add), PaymentsBooks.Handler(p.books)),
		s.handle(
			idempotency.Action(s.once, ChargeCustomer, p.charge),
			idempotency.Compensation(s.once, RefundCustomer, p.refund),
			idempotency.Handler(s.once, "sales", OrderCompleted, p.noteSale)))
}

// charge takes the money of an order, once.
func (p *payments) charge(ctx context.Context, tx pgx.Tx, c *Charge) (*Payment, error) {
	var refused bool
	err := tx.QueryRow(ctx, `select exists (select from account where customer = $1 and credit_cents < $2)`, c.Customer, c.Cents).Scan(&refused)
	if err != nil {
		return nil, err
	}
	if refused {
		return nil, postrider.Errorf(postrider.FailedPrecondition, "the credit of %s is too small", c.Customer)
	}
	paid := &Payment{Cents: c.Cents}
	err = tx.QueryRow(ctx, `insert into ledger (order_id, customer, cents) values ($1, $2, $3) returning id`, c.Order, c.Customer, c.Cents).
		Scan(&paid.ID)
	return paid, err
}

// refund gives back what charge took: it gets the answer that charge gave, even when nobody else ever saw it.
func (p *payments) refund(ctx context.Context, tx pgx.Tx, _ *OrderRef, paid *Payment) error {
	_, err := tx.Exec(ctx, `insert into ledger (order_id, customer, cents) select order_id, customer, -cents from ledger where id = $1`, paid.ID)
	return err
}

// noteSale writes a completed order into the journal, once.
func (p *payments) noteSale(ctx context.Context, tx pgx.Tx, e postrider.Event[Sale]) error {
	_, err := tx.Exec(ctx, `insert into sale (order_id, cents) values ($1, $2)`, e.Value.Order, e.Value.Cents)
	return err
}

// add opens accounts.
func (p *payments) add(ctx context.Context, c *Customers) (*Done, error) {
	var b pgx.Batch
	for _, a := range c.Customers {
		b.Queue(`insert into account (customer, name, credit_cents) values ($1, $2, $3) on conflict do nothing`, a.ID, a.Name, a.CreditCents)
	}
	return &Done{}, p.db.SendBatch(ctx, &b).Close()
}

func (p *payments) books(ctx context.Context, _ *Done) (*PaymentsFigures, error) {
	f := &PaymentsFigures{Traffic: p.traffic()}
	err := p.db.QueryRow(ctx, `select coalesce(sum(greatest(cents, 0)), 0)::bigint, coalesce(sum(greatest(-cents, 0)), 0)::bigint from ledger`).
		Scan(&f.Charged, &f.Refunded)
	if err != nil {
		return nil, err
	}
	err = p.db.QueryRow(ctx, `select count(*), count(*) - count(distinct order_id), coalesce(sum(cents), 0)::bigint from sale`).
		Scan(&f.Sales, &f.SalesTwice, &f.SalesCents)
	return f, err
}
