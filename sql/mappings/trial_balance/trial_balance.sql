-- Debits, credits and balance of each group account in each period.
--
-- inputs: journal (published by consolidate_ledgers)
-- key:    period, group_account
SELECT
    period,
    group_account,
    sum(CASE WHEN amount_group > 0 THEN amount_group ELSE 0.00 END)  AS debit,
    sum(CASE WHEN amount_group < 0 THEN -amount_group ELSE 0.00 END) AS credit,
    sum(amount_group)                                                AS balance,
    count(*)                                                         AS lines
FROM journal
GROUP BY period, group_account
ORDER BY period, group_account
