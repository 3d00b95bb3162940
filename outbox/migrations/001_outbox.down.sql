drop table :"schema".postrider_outbox_mark;
drop table :"schema".postrider_outbox_log;
drop table :"schema".postrider_outbox_dead;
drop table :"schema".postrider_outbox_relay;
drop table :"schema".postrider_outbox;
drop sequence :"schema".postrider_outbox_seq;
