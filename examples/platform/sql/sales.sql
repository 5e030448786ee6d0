-- A return is negative. The rate is the one of the day; the euro's own is 1.
WITH moved AS (
    SELECT 'order' AS kind, cast(order_id AS varchar) AS id, ordered_on AS day, currency, amount
    FROM orders
    UNION ALL
    SELECT 'return' AS kind, return_id AS id, returned_on AS day, currency, -amount AS amount
    FROM returns
)
SELECT
    moved.kind,
    moved.id,
    moved.day,
    moved.currency,
    moved.amount,
    cast(round(moved.amount * CASE WHEN moved.currency = 'EUR' THEN 1 ELSE rates.rate END, 2) AS decimal(18, 2)) AS amount_eur
FROM moved
LEFT JOIN rates ON rates.currency = moved.currency AND rates.day = moved.day
