-- German ledger: columns keep the names of the file, so they are quoted. A delivery may come twice under two
-- names; the first one counts.
--
-- inputs: de_lines (one row a line of a voucher)
-- key:    journal_id, line_no
SELECT
    'DE'     AS entity,
    "Beleg"  AS journal_id,
    "Zeile"  AS line_no,
    "Konto"  AS account,
    'EUR'    AS currency,
    "Betrag" AS amount_local,
    "Datum"  AS posted,
    _source_position
FROM (
    SELECT *, row_number() OVER (PARTITION BY "Beleg", "Zeile" ORDER BY _source_position) AS delivery
    FROM de_lines
)
WHERE delivery = 1
