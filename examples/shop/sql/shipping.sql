-- Nothing here keeps an order from being shipped twice: that is the business of the handler, and the books look whether
-- it was.
create table if not exists shipment (
	id       bigint generated always as identity primary key,
	order_id bigint not null,
	carrier  text   not null,
	name     text   not null,
	city     text   not null,
	country  text   not null
);

create table if not exists shipment_line (
	shipment bigint not null references shipment,
	sku      bigint not null,
	qty      bigint not null
);
