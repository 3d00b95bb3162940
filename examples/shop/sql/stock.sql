create table if not exists product (
	sku      bigint primary key,
	name     text   not null,
	initial  bigint not null,
	in_stock bigint not null check (in_stock >= 0)
);

create table if not exists reservation (
	order_id bigint not null,
	sku      bigint not null references product,
	qty      bigint not null
);
create index if not exists reservation_order on reservation (order_id);

-- What was asked for, whether there was enough of it or not. Nothing here keeps an order from being written down twice:
-- that is the business of the handler, and the books look whether it was.
create table if not exists demand (
	order_id bigint not null,
	units    bigint not null
);
