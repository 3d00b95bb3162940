create table if not exists account (
	customer     text   primary key,
	name         text   not null,
	credit_cents bigint -- the most that one charge may be; null: no limit
);

-- Charges are positive, refunds negative. Nothing here keeps an order from being charged twice: that is the business of
-- the handler, and the books look whether it was.
create table if not exists ledger (
	id       bigint generated always as identity primary key,
	order_id bigint not null,
	customer text   not null,
	cents    bigint not null
);

-- The sales journal, one line for each completed order.
create table if not exists sale (
	order_id bigint not null,
	cents    bigint not null
);
