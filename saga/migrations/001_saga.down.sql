drop table :"schema".postrider_saga_history;
drop table :"schema".postrider_saga;
