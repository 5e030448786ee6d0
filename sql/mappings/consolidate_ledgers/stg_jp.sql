-- Japanese ledger: yen has no decimals.
--
-- inputs: jp_lines (one row a line of a voucher)
-- key:    journal_id, line_no
SELECT
    'JP'                           AS entity,
    voucher                        AS journal_id,
    line                           AS line_no,
    account,
    'JPY'                          AS currency,
    cast(amount AS decimal(18, 2)) AS amount_local,
    posted
FROM jp_lines
