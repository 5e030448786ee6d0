-- All subsidiaries' lines in one shape.
--
-- inputs: stg_us, stg_de, stg_jp
-- key:    entity, journal_id, line_no
SELECT entity, journal_id, line_no, account, currency, amount_local, posted FROM stg_us
UNION ALL
SELECT entity, journal_id, line_no, account, currency, amount_local, posted FROM stg_de
UNION ALL
SELECT entity, journal_id, line_no, account, currency, amount_local, posted FROM stg_jp
