-- US ledger: cents to dollars.
--
-- inputs: us_lines (one row a journal line)
-- key:    journal_id, line_no
SELECT
    'US'                                        AS entity,
    journal_id,
    line_no,
    account,
    currency,
    cast(amount_cents * 0.01 AS decimal(18, 2)) AS amount_local,
    posted
FROM us_lines
