drop table :"schema".postrider_request;
drop table :"schema".postrider_barrier;
drop table :"schema".postrider_inbox_state;
drop table :"schema".postrider_inbox;
