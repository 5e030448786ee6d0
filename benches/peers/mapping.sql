-- Gross and quantity by market segment and priority: a join of three and an aggregate.
SELECT c_mktsegment, o_orderpriority, count(*) AS lines, sum(l_extendedprice) AS gross, sum(l_quantity) AS quantity
FROM lineitem
JOIN orders ON o_orderkey = l_orderkey
JOIN customer ON c_custkey = o_custkey
WHERE l_shipdate >= DATE '1995-01-01'
GROUP BY c_mktsegment, o_orderpriority
