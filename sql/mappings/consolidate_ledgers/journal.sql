-- Journal lines with group accounts and in the reporting currency.
--
-- inputs: lines, fx (rate of a currency in a period), accounts (local to group account)
-- key:    entity, journal_id, line_no
SELECT
    lines.entity,
    lines.journal_id,
    lines.line_no,
    lines.account,
    accounts.group_account,
    lines.posted,
    substr(cast(lines.posted AS varchar), 1, 7)                             AS period,
    lines.currency,
    lines.amount_local,
    fx.rate,
    $reporting_currency                                                     AS group_currency,
    cast(round(lines.amount_local * fx.rate, 2) AS decimal(18, 2))          AS amount_group
FROM lines
LEFT JOIN accounts ON accounts.entity = lines.entity AND accounts.local_account = lines.account
LEFT JOIN fx ON fx.currency = lines.currency AND fx.period = substr(cast(lines.posted AS varchar), 1, 7)
