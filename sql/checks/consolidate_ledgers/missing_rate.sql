-- Lines whose currency has no rate in their period. Any row fails.
SELECT entity, journal_id, line_no FROM journal WHERE rate IS NULL
