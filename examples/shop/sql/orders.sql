create table if not exists placed_order (
	id      bigint primary key,
	content text   not null, -- the order as it came, to tell a repetition from another order of the same number
	cents   bigint not null,
	units   bigint not null
);
