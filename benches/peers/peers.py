"""Runs every contender on the same work and checks what each made; writes RESULTS.md. `run` calls it.

A contender is a process: its wall time is from start to exit (what a user waits for), its processor time is that of `wait4`, its peak memory the
kernel's high-water mark. The server's processor time is that of its processes, before and after. The contenders take turns, so that a busy machine is busy for all;
what is told are medians. A contender that fails, or whose result is not the source's, is shown as such."""

import argparse
import glob
import json
import os
import platform
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLES = ["lineitem", "orders", "customer"]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Measured:
    wall: float
    client: float
    server: float
    peak_mib: float
    wrong: str = ""


@dataclass
class Contender:
    name: str
    argv: list
    env: dict = field(default_factory=dict)
    before: object = None
    stdout: str = os.devnull
    stdin: str = ""


class Server:
    """The PostgreSQL server of the tests, with a database of our own."""

    def __init__(self):
        script = HERE.parents[1] / "tests/services/postgres"
        self.port, self.password, authority = subprocess.run([script], capture_output=True, text=True, check=True).stdout.split()
        home = Path(authority).parent
        self.bin = (home / "bin").read_text().strip()
        self.pid = int((home / "data/postmaster.pid").read_text().split()[0])
        self.uri = f"postgresql://admin:{self.password}@127.0.0.1:{self.port}/peers?sslmode=disable"

    def psql(self, sql, database="peers"):
        uri = self.uri.replace("/peers?", f"/{database}?")
        return subprocess.run([f"{self.bin}/psql", "-XAtqv", "ON_ERROR_STOP=1", uri, "-c", sql], check=True, env={**os.environ, "PGOPTIONS": "-c client_min_messages=warning"},
                              stdout=subprocess.PIPE, text=True).stdout.strip()

    def seconds(self):
        """Processor time of all its processes, those that have ended too."""
        total = 0
        for stat in glob.glob("/proc/[0-9]*/stat"):
            try:
                text = Path(stat).read_text()
            except OSError:
                continue
            fields = text.rsplit(") ", 1)[1].split()
            pid, parent = int(text.split()[0]), int(fields[1])
            if self.pid in (pid, parent):
                total += sum(int(fields[at]) for at in ([11, 12, 13, 14] if pid == self.pid else [11, 12]))
        return total / TICKS


class Store:
    """The S3 server of the tests."""

    def __init__(self):
        script = HERE.parents[1] / "tests/services/s3"
        self.port, self.key, self.secret, *_ = subprocess.run([script], capture_output=True, text=True, check=True).stdout.split()

    def files(self):
        import pyarrow.fs

        store = pyarrow.fs.S3FileSystem(access_key=self.key, secret_key=self.secret, endpoint_override=f"127.0.0.1:{self.port}", scheme="http", region="us-east-1")
        below = pyarrow.fs.FileSelector("floodmark/peers", recursive=True, allow_not_found=True)
        return store, [file for file in store.get_file_info(below) if file.is_file]

    def clear(self):
        store, files = self.files()
        for file in files:
            store.delete_file(file.path)

    def download(self, path):
        """The one Parquet file that is there."""
        store, files = self.files()
        [file] = [file for file in files if file.path.endswith(".parquet")]
        with store.open_input_stream(file.path) as found:
            path.write_bytes(found.read())
        return path


def high_water(pid):
    """The most memory that a process has had, in MiB."""
    try:
        about = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kib = next((line.split()[1] for line in about.splitlines() if line.startswith("VmHWM:")), 0)
    return int(kib) / 1024


def run(contender, server):
    if contender.before:
        contender.before()
    before = server.seconds() if server else 0
    environment = {**os.environ, **contender.env}
    began = time.perf_counter()
    with open(contender.stdout, "w") as out, tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as given:
        given.write(contender.stdin)
        given.seek(0)
        process = subprocess.Popen(contender.argv, env=environment, stdin=given, stdout=out, stderr=told)
        # Its own high-water mark: that of `wait4` begins with this process's memory, from before the child became another program. Who looks
        # often is in the way of all, on two cores.
        ended, peak = select.poll(), 0
        handle = os.pidfd_open(process.pid)
        ended.register(handle, select.POLLIN)
        while not ended.poll(2 if time.perf_counter() - began < 0.2 else 20):
            peak = max(peak, high_water(process.pid))
        os.close(handle)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        wrong = ""
        if process.returncode != 0:
            told.seek(0)
            lines = told.read().strip().splitlines() or [f"exit code {process.returncode}"]
            wrong = "failed: " + lines[-1][:160]
    time.sleep(0.2)
    after = server.seconds() if server else 0
    return Measured(wall, usage.ru_utime + usage.ru_stime, after - before, peak, wrong)


MONEY = ["l_quantity", "l_extendedprice", "l_discount", "l_tax"]
CHECK = ", ".join(["count(*)", *(f"sum({key})" for key in ["l_orderkey", "l_partkey", "l_suppkey", "l_linenumber"]),
                   *(f"sum(CAST({column} AS DECIMAL(38,2)))" for column in MONEY), "min(l_shipdate)", "max(l_receiptdate)",
                   "sum(length(l_comment))", "count(DISTINCT l_shipmode)", "sum(length(l_shipinstruct))"])
MAPPING = (HERE / "mapping.sql").read_text()
ORDERS = "count(*), sum(o_orderkey), sum(o_custkey), sum(o_totalprice), min(o_orderdate), max(o_orderdate), sum(length(o_comment)), count(DISTINCT o_clerk)"
LINEITEM = ("l_orderkey bigint NOT NULL, l_partkey bigint NOT NULL, l_suppkey bigint NOT NULL, l_linenumber integer NOT NULL, "
            "l_quantity numeric(15,2) NOT NULL, l_extendedprice numeric(15,2) NOT NULL, l_discount numeric(15,2) NOT NULL, l_tax numeric(15,2) NOT NULL, "
            "l_returnflag varchar NOT NULL, l_linestatus varchar NOT NULL, l_shipdate date NOT NULL, l_commitdate date NOT NULL, "
            "l_receiptdate date NOT NULL, l_shipinstruct varchar NOT NULL, l_shipmode varchar NOT NULL, l_comment varchar NOT NULL")

# A column of the wide table: its name, its type, what it holds in row n, and what of it is compared.
WIDE = [
    ("id", "bigint NOT NULL", "n", "sum"),
    ("small", "smallint", "nullif(n % 60000 - 30000, 7)", "sum"),
    ("whole", "integer", "nullif(n * 2 - 1000000, 8)", "sum"),
    *[(f"money{at}", "numeric(15,2)", f"nullif((n * {at * 7919} % 99999999) / 100.0 - 500000, 0)", "sum") for at in range(1, 6)],
    ("rate", "numeric(38,10)", "n / 7.0", "sum"),
    ("large", "numeric(30,0)", "n::numeric * 1000000000000000", "sum"),
    *[(f"share{at}", "numeric(9,4)", f"n % {at * 97} / 3.0", "sum") for at in range(1, 4)],
    ("free", "numeric", "n / (n % 13 + 1)::numeric", "digits"),
    ("single", "real", "CASE WHEN n % 1000 = 0 THEN 'NaN' ELSE (n % 4096) / 8.0 END", "count"),
    ("double", "double precision", "CASE WHEN n % 1000 = 0 THEN 'Infinity' ELSE (n % 4096) / 8.0 END", "count"),
    ("flag", "boolean", "CASE n % 3 WHEN 0 THEN true WHEN 1 THEN false END", "true"),
    *[(f"day{at}", "date", f"DATE '{start}' + (n % {at * 1000})::int", "days") for at, start in [(1, "0001-01-01"), (2, "1970-01-01"), (3, "9990-01-01")]],
    *[(f"clock{at}", "timestamp", f"TIMESTAMP '{start}' + n * INTERVAL '1.000001 seconds'", "micros")
      for at, start in [(1, "0044-03-15"), (2, "1969-12-31"), (3, "2026-10-25"), (4, "9999-01-01")]],
    *[(f"at{at}", "timestamptz", f"TIMESTAMPTZ '{start}+02' + n * INTERVAL '1.000001 seconds'", "micros") for at, start in [(1, "1700-01-01"), (2, "2026-10-25")]],
    ("hour", "time", "TIME '00:00' + n % 86400 * INTERVAL '1.000001 seconds' - INTERVAL '0'", "count"),
    ("uid", "uuid", "md5(n::text)::uuid", "text"),
    ("doc", "jsonb", "jsonb_build_object('n', n, 'text', 'ä\"' || n)", "count"),
    ("empty", "text", "CASE n % 3 WHEN 0 THEN '' WHEN 1 THEN NULL ELSE n::text END", "text"),
    ("lines", "text", "E'a\\nb\\t\"c\", ' || n", "text"),
    ("accents", "text", "'äöü€😀 ' || n % 1000", "text"),
    ("long", "text", "repeat(md5(n::text), 8)", "text"),
    ("code", "varchar(20)", "'C' || lpad(n::text, 10, '0')", "text"),
    ("kind", "character(5)", "chr((65 + n % 26)::int)", "length"),
    ("few", "text", "(ARRAY['new', 'open', 'paid', 'lost'])[(n % 4 + 1)::int]", "text"),
    ("bytes", "bytea", "decode(md5(n::text), 'hex')", "count"),
]


def wide_check(of, kinds=()):
    """What the wide table's columns come to, in the words of PostgreSQL or of DuckDB; or the names of what is compared."""
    checks = []
    for name, _, _, what in WIDE:
        column = f'"{name}"'
        in_postgres, in_duckdb = {
            "sum": (f"sum({column})", f"sum({column}::DECIMAL(38,10))" if name == "rate" else f"sum({column}::DECIMAL(38,4))" if name.startswith("share") else f"sum({column}::DECIMAL(38,2))" if name.startswith("money") else f"sum({column}::DECIMAL(38,0))"),
            "digits": (f"sum(('x' || substr(md5({column}::text), 1, 8))::bit(32)::bigint)", f"sum(('0x' || substr(md5({column}::VARCHAR), 1, 8))::BIGINT)"),
            "text": (f"sum(('x' || substr(md5({column}::text), 1, 8))::bit(32)::bigint)", f"sum(('0x' || substr(md5({column}::VARCHAR), 1, 8))::BIGINT)"),
            "true": (f"count(*) FILTER (WHERE {column}) || '/' || count({column})", f"count(*) FILTER (WHERE {column}) || '/' || count({column})"),
            "days": (f"sum({column} - DATE '1970-01-01')", f"sum(({column} - DATE '1970-01-01')::BIGINT)"),
            "micros": (f"sum((extract(epoch FROM {column}) * 1000000)::numeric(30,0))", f"sum(epoch_us({column})::DECIMAL(38,0))"),
            "length": (f"sum(octet_length({column}))", f"sum(strlen({column}))"),
            "count": (f"count({column})", f"count({column})"),
        }[what]
        checks.append({"postgres": in_postgres, "duckdb": in_duckdb, "names": name}[of])
    return {"postgres": ", ", "duckdb": " ;; ", "names": ", "}[of].join(checks)


def sums_of(path):
    """What the rows of Parquet files come to, and their columns' types."""
    import duckdb

    rows = duckdb.sql(f"SELECT {CHECK} FROM '{path}'").fetchone()
    kinds = duckdb.sql(f"DESCRIBE SELECT * FROM '{path}'").fetchall()
    return "|".join(str(value) for value in rows), {row[0]: row[1] for row in kinds}


class Work:
    """One row of the table: what is done, by whom, and against what it is held."""

    def __init__(self, name, title, contenders, check, yardstick):
        self.name, self.title, self.contenders, self.check, self.yardstick = name, title, contenders, check, yardstick


def floodmark_project(folder, connections, job, files=()):
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in [("floodmark.yaml", "project: peers\n"), ("connections.yaml", connections), ("jobs/load.yaml", job), *files]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def works(options, server, data, out):
    python = [sys.executable, str(HERE / "contenders.py")]
    binary = str(options.floodmark)
    env = {"DATA": str(data), "OUT": str(out), "SERVER": server.uri, "PASSWORD": server.password}
    project = out / "project"
    erp = (f"{{ kind: postgres, host: 127.0.0.1, port: {server.port}, database: peers, user: admin, "
           "password: \"${env:PASSWORD}\", sslmode: disable }")

    def other(name, function, threads=2, before=None, **more):
        return Contender(name, [*python, function], {**env, "THREADS": str(threads), **more}, before)

    def fresh():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)

    def floodmark(connections, job, files=(), before=None, name="floodmark"):
        def prepare():
            (before or fresh)()
            floodmark_project(project, connections, job, files)

        return Contender(name, [binary, "run", "--project", str(project)], env, prepare)

    def parquet_of(contender, name):
        ours = contender.startswith("floodmark")
        return f"{project}/out/{name}/current/*.parquet" if ours else f"{out}/{name}.parquet"

    source = server.psql(f"SELECT {CHECK} FROM lineitem")
    typed = sums_of(f"{data}/lineitem.parquet")[1]

    def same_lines(contender):
        sums, kinds = sums_of(parquet_of(contender, "lineitem"))
        if sums != source:
            return f"other values: {sums} instead of {source}"
        changed = [f"{name} is {kinds[name]}" for name, kind in typed.items() if kinds[name] != kind]
        return "values right; " + ", ".join(changed) if changed else ""

    lake = "lake: { kind: files, root: out }\n"
    whole = "job: load\nsources:\n  lineitem: { connection: erp, table: lineitem }\ntarget:\n  connection: lake\n  outputs: { lineitem: { from: lineitem, mode: replace } }\n"
    psql = [f"{server.bin}/psql", "-Xq", server.uri, "-c"]
    yield Work("pg_to_parquet", "PostgreSQL → Parquet zstd, lineitem", [
        Contender("psql COPY binary > /dev/null", [*psql, "COPY (SELECT * FROM lineitem) TO STDOUT (FORMAT binary)"], env),
        floodmark(f"erp: {erp}\n{lake}", whole),
        floodmark(f"erp: {erp.replace('disable }', 'disable, readers: 1 }')}\n{lake}", whole, name="floodmark, one session"),
        other("DuckDB, 1 thread", "duckdb_pg_to_parquet", 1, fresh),
        other("DuckDB, 2 threads", "duckdb_pg_to_parquet", 2, fresh),
        other("ConnectorX + pyarrow", "connectorx_pg_to_parquet", 2, fresh),
        other("ADBC + pyarrow", "adbc_pg_to_parquet", 1, fresh),
        *([other("Sling", "sling_pg_to_parquet", 1, fresh)] if options.slow else []),
    ], same_lines, "psql COPY binary > /dev/null")

    def prepared():
        fresh()
        floodmark_project(project, f"erp: {erp}\n{lake}", whole)

    whole_numbers = ["l_linenumber", "l_orderkey", "l_partkey", "l_suppkey"]
    told = server.psql(f"SELECT concat_ws(' ', count(*), {', '.join(f'sum({name})' for name in whole_numbers)}) FROM lineitem")

    def same_sums(contender):
        found = (out / "told").read_text().strip()
        return "" if found == told else f"other sums: {found} instead of {told}"

    def telling(contender):
        contender.stdout = str(out / "told")
        return contender

    yield Work("pg_to_arrow", "PostgreSQL → Arrow in memory, lineitem, and nothing else", [
        Contender("psql COPY binary > /dev/null", [*psql, "COPY (SELECT * FROM lineitem) TO STDOUT (FORMAT binary)"], env, fresh),
        telling(Contender("floodmark's source", [str(options.parts), "--scan", str(project), "erp", "lineitem"], env, prepared)),
        telling(other("ConnectorX", "connectorx_pg_to_arrow", 2, fresh)),
        telling(other("ADBC", "adbc_pg_to_arrow", 1, fresh)),
    ], same_sums, "psql COPY binary > /dev/null")

    create = "DROP TABLE IF EXISTS loaded; CREATE TABLE loaded (LIKE lineitem)"
    ready = data / "lineitem.copy"

    def emptied():
        fresh()
        server.psql(f"{create}; DROP TABLE IF EXISTS floodmark_state, floodmark_log, floodmark_quarantine; CHECKPOINT")

    def loaded(_):
        found = server.psql(f"SELECT {CHECK} FROM loaded")
        return "" if found == source else f"other values: {found} instead of {source}"

    def nothing_there():
        emptied()
        server.psql("DROP TABLE loaded")

    into = "job: load\nsources:\n  lines: { connection: data, file: lineitem.parquet }\ntarget:\n  connection: dw\n  outputs: { loaded: { from: lines, mode: append } }\n"
    yield Work("parquet_to_pg", "Parquet → PostgreSQL append, lineitem", [
        Contender("psql \\copy of a ready binary file", [*psql, f"\\copy loaded FROM '{ready}' (FORMAT binary)"], env, emptied),
        floodmark(f"dw: {erp}\ndata: {{ kind: files, root: {data} }}\n", into, before=nothing_there),
        other("DuckDB", "duckdb_parquet_to_pg", 2, emptied),
        other("ADBC", "adbc_parquet_to_pg", 1, emptied),
    ], loaded, "psql \\copy of a ready binary file")

    orders = server.psql(f"SELECT {ORDERS} FROM orders")

    def orders_gone():
        emptied()
        server.psql("DROP TABLE IF EXISTS orders_loaded")

    def orders_there():
        orders_gone()
        server.psql("CREATE TABLE orders_loaded (LIKE orders)")

    def same_orders(_):
        found = server.psql(f"SELECT {ORDERS} FROM orders_loaded")
        return "" if found == orders else f"other values: {found} instead of {orders}"

    copy_orders = "job: load\nsources:\n  orders: { connection: erp, table: orders }\ntarget:\n  connection: dw\n  outputs: { orders_loaded: { from: orders, mode: append } }\n"
    both = f"erp: {erp}\ndw: {erp}\n"
    pipe = (f"{server.bin}/psql -Xq '{server.uri}' -c 'COPY orders TO STDOUT (FORMAT binary)' | "
            f"{server.bin}/psql -Xq '{server.uri}' -c 'COPY orders_loaded FROM STDIN (FORMAT binary)'")
    yield Work("pg_to_pg", "PostgreSQL → PostgreSQL, orders", [
        Contender("psql COPY | psql COPY, binary", ["bash", "-c", pipe], env, orders_there),
        floodmark(both, copy_orders, before=orders_gone),
        other("DuckDB", "duckdb_pg_to_pg", 2, orders_there),
    ], same_orders, "psql COPY | psql COPY, binary")

    key, columns = "l_orderkey, l_linenumber", [line.split()[0] for line in LINEITEM.split(", ")]
    changes = ", ".join(f"{column} = excluded.{column}" for column in columns if column not in key)
    upsert = f"INSERT INTO merged SELECT * FROM stage ON CONFLICT ({key}) DO UPDATE SET {changes}"
    ready_delta = data / "delta.copy"

    def unmerged():
        fresh()
        server.psql("DROP TABLE IF EXISTS stage")
        reset("merged")
        server.psql("CHECKPOINT")

    after = server.psql(f"""SELECT {CHECK} FROM (SELECT * FROM delta UNION ALL SELECT * FROM lineitem AS l
        WHERE NOT EXISTS (SELECT FROM delta AS d WHERE d.l_orderkey = l.l_orderkey AND d.l_linenumber = l.l_linenumber)) AS x""")

    def merged_before():
        """What we merge into is ours: loaded by the same job, once; then as it was."""
        table = "of_floodmark.merged"
        if server.psql(f"SELECT to_regclass('{table}') IS NULL OR to_regclass('of_floodmark.floodmark_state') IS NULL") == "t":
            emptied()
            server.psql("DROP SCHEMA IF EXISTS of_floodmark CASCADE; CREATE SCHEMA of_floodmark")
            loads = merge.replace("delta.parquet", "lineitem.parquet")
            floodmark_project(project, here, loads)
            done = run(Contender("floodmark", [binary, "run", "--project", str(project)], env), server)
            print(f"merge: the first load by floodmark: {done.wall:.2f} s {done.wrong}", flush=True)
        unmerged()
        reset(table)
        # Rows were taken away behind its back: it is told that this is right.
        floodmark_project(project, here, merge)
        subprocess.run([binary, "state", "adopt", "merge", "--project", str(project)], check=True, env={**os.environ, **env}, stdout=subprocess.DEVNULL)

    def reset(table):
        same = "m.l_orderkey = d.l_orderkey AND m.l_linenumber = d.l_linenumber"
        server.psql(f"""DELETE FROM {table} AS m USING delta AS d WHERE {same} AND d.l_orderkey > 100000000;
            UPDATE {table} AS m SET l_quantity = m.l_quantity - 1 FROM delta AS d WHERE {same} AND m.l_quantity = d.l_quantity""")
        server.psql(f"VACUUM {table}")

    def merged(contender):
        table = "of_floodmark.merged" if contender == "floodmark" else "merged"
        found = server.psql(f"SELECT {CHECK} FROM {table}")
        return "" if found == after else f"other values: {found} instead of {after}"

    merge = f"job: merge\nsources:\n  lines: {{ connection: data, file: delta.parquet }}\ntarget:\n  connection: dw\n  outputs: {{ merged: {{ from: lines, mode: merge, key: [{key}] }} }}\n"
    here = f"dw: {erp.replace('disable }', 'disable, schema: of_floodmark }')}\ndata: {{ kind: files, root: {data} }}\n"
    by_hand = f"CREATE TEMP TABLE stage (LIKE merged); \\copy stage FROM '{ready_delta}' (FORMAT binary)\n{upsert}"
    yield Work("merge", "100 000 rows, of which 90 000 change one and 10 000 are new, merged into lineitem with a key", [
        Contender("psql COPY to a stage, INSERT … ON CONFLICT", [f"{server.bin}/psql", "-Xq", server.uri, "-f", "-"], env, unmerged, stdin=by_hand),
        floodmark(here, merge, before=merged_before),
        other("DuckDB, SQL by hand", "duckdb_merge", 2, unmerged, UPSERT=upsert),
    ], merged, "psql COPY to a stage, INSERT … ON CONFLICT")

    mapped_job = (whole.replace("target:", "models: { mapped: sql/mapped.sql }\nchecks:\n  mapped:\n    - not_null: [l_orderkey, l_partkey, net]\n    - expression: 'l_quantity > 0'\n    - expression: 'l_discount between 0 and 1'\ntarget:")
                  .replace("from: lineitem,", "from: mapped,"))
    net = "SELECT *, l_extendedprice * (1 - l_discount) AS net FROM lineitem WHERE l_shipdate >= DATE '1992-01-01'\n"

    def same_mapped(contender):
        sums, _ = sums_of(parquet_of(contender, "lineitem"))
        return "" if sums == source else f"other values: {sums} instead of {source}"

    yield Work("checked", "PostgreSQL → Parquet, lineitem, with a mapping and checks, and without", [
        floodmark(f"erp: {erp}\n{lake}", whole, name="floodmark, a copy"),
        floodmark(f"erp: {erp}\n{lake}", mapped_job, [("sql/mapped.sql", net)], name="floodmark, a mapping and three checks"),
    ], same_mapped, "floodmark, a copy")

    wide = server.psql(f"SELECT {wide_check('postgres')} FROM wide")

    def same_wide(contender):
        import duckdb

        path = parquet_of(contender, "wide")
        kinds = {row[0]: row[1] for row in duckdb.sql(f"DESCRIBE SELECT * FROM '{path}'").fetchall()}
        names = wide_check("names").split(", ")
        wrong = []
        expected = dict(zip(names, wide.split("|")))
        for name in names:
            sql = wide_check("duckdb", kinds).split(" ;; ")[names.index(name)]
            try:
                found = str(duckdb.sql(f"SELECT {sql} FROM '{path}'").fetchone()[0])
            except duckdb.Error as error:
                found = f"cannot be compared ({kinds.get(name.split('.')[0])}: {str(error).splitlines()[0][:60]})"
            if found != expected[name]:
                wrong.append(f"{name}: {found[:40]} instead of {expected[name][:40]}")
        return "" if not wrong else f"{len(wrong)} of {len(names)} differ: " + "; ".join(wrong[:6])

    ugly = "job: load\nsources:\n  wide: { connection: erp, table: wide }\ntarget:\n  connection: lake\n  outputs: { wide: { from: wide, mode: replace } }\n"
    yield Work("wide", "PostgreSQL → Parquet zstd, a million wide rows of many types", [
        Contender("psql COPY binary > /dev/null", [*psql, "COPY (SELECT * FROM wide) TO STDOUT (FORMAT binary)"], env),
        floodmark(f"erp: {erp}\n{lake}", ugly),
        other("DuckDB, 2 threads", "duckdb_pg_to_parquet", 2, fresh, TABLE="wide"),
        other("ConnectorX + pyarrow", "connectorx_pg_to_parquet", 2, fresh, TABLE="wide", KEY="id"),
        other("ADBC + pyarrow", "adbc_pg_to_parquet", 1, fresh, TABLE="wide"),
    ], same_wide, "psql COPY binary > /dev/null")

    nightly = out.parent / "nightly"

    def changed_source():
        """One in a hundred rows changed, and one in a hundred new; then time for every clock to be beyond it."""
        server.psql("""WITH top AS (SELECT max(o_orderkey) AS key FROM bookings)
            INSERT INTO bookings SELECT key + row_number() OVER (), o_custkey, o_totalprice, now() FROM bookings, top ORDER BY o_orderkey LIMIT 15000;
            UPDATE bookings SET o_totalprice = o_totalprice + 1, updated_at = clock_timestamp() WHERE o_orderkey % 100 = (SELECT count(*) % 100 FROM bookings)""")
        server.psql("VACUUM ANALYZE bookings")
        server.psql("CHECKPOINT")
        time.sleep(6)

    nightly_job = ("job: load\nsources:\n  bookings: { connection: erp, table: bookings, incremental: { cursor: updated_at } }\ntarget:\n  connection: dw\n"
                   "  outputs: { bookings: { from: bookings, mode: merge, key: [o_orderkey] } }\n")
    where = {"floodmark": "of_floodmark", "Sling": "of_sling", "dlt": "of_dlt", "ingestr": "of_ingestr"}
    ingestr = [options.ingestr, "ingest", "--source-uri", server.uri, "--source-table", "public.bookings", "--dest-uri", server.uri,
               "--dest-table", "of_ingestr.bookings", "--incremental-strategy", "merge", "--incremental-key", "updated_at",
               "--primary-key", "o_orderkey", "--progress", "log", "--yes"]
    incremental = [
        Contender("floodmark", [binary, "run", "--project", str(nightly / "project")], env),
        other("Sling", "sling_incremental", 1, NIGHTLY=str(nightly)),
        other("dlt", "dlt_incremental", 1, NIGHTLY=str(nightly)),
        Contender("ingestr", ingestr, {**env, "DISABLE_TELEMETRY": "true"}),
    ]

    def first_night():
        """What every run after it builds on: everybody has loaded everything once."""
        shutil.rmtree(nightly, ignore_errors=True)
        nightly.mkdir(parents=True)
        server.psql("DROP TABLE IF EXISTS floodmark_state, floodmark_log, floodmark_quarantine")
        for schema in where.values():
            server.psql(f"SET client_min_messages = warning; DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}")
        server.psql("""DROP TABLE IF EXISTS bookings; CREATE TABLE bookings (o_orderkey bigint PRIMARY KEY, o_custkey bigint NOT NULL,
            o_totalprice numeric(15,2) NOT NULL, updated_at timestamptz NOT NULL)""")
        server.psql("INSERT INTO bookings SELECT o_orderkey, o_custkey, o_totalprice, now() - INTERVAL '1 day' FROM orders ORDER BY 1")
        server.psql("CREATE INDEX ON bookings (updated_at)")
        server.psql("VACUUM ANALYZE bookings")
        target = erp.replace("disable }", "disable, schema: of_floodmark }")
        floodmark_project(nightly / "project", f"erp: {erp}\ndw: {target}\n", nightly_job)
        for contender in incremental:
            done = run(contender, server)
            print(f"incremental: the first load by {contender.name}: {done.wall:.2f} s {done.wrong}", flush=True)

    def once_a_round(change, state={"begun": False}):
        def before():
            if not state["begun"]:
                state["begun"] = True
                first_night()
            change()
        return before

    def same_bookings(contender):
        columns = "count(*), sum(o_orderkey), sum(o_totalprice)"
        expected = server.psql(f"SELECT {columns} FROM bookings")
        found = server.psql(f"SELECT {columns} FROM {where[contender]}.bookings")
        return "" if found == expected else f"other values: {found} instead of {expected}"

    def first_changes(change):
        first, *rest = incremental
        return [Contender(first.name, first.argv, first.env, once_a_round(change)), *rest]

    yield Work("incremental", "PostgreSQL → PostgreSQL by a cursor, 1 % changed and 1 % new of 1.5 million rows", first_changes(changed_source), same_bookings, "Sling")
    yield Work("nothing_new", "the same with nothing new", first_changes(lambda: None), same_bookings, "Sling")

    types = ", ".join(f"{name}: {kind}" for name, kind in {
        "l_orderkey": "int", "l_partkey": "int", "l_suppkey": "int", "l_linenumber": "int", "l_quantity": '"decimal(15,2)"',
        "l_extendedprice": '"decimal(15,2)"', "l_discount": '"decimal(15,2)"', "l_tax": '"decimal(15,2)"', "l_returnflag": "string",
        "l_linestatus": "string", "l_shipdate": "date", "l_commitdate": "date", "l_receiptdate": "date", "l_shipinstruct": "string",
        "l_shipmode": "string", "l_comment": "string"}.items())
    csv_job = f"job: load\nsources:\n  lineitem: {{ connection: data, file: lineitem.csv, columns: {{ {types} }} }}\ntarget:\n  connection: lake\n  outputs: {{ lineitem: {{ from: lineitem, mode: replace }} }}\n"
    yield Work("csv_to_parquet", "CSV → Parquet zstd, lineitem, typed", [
        floodmark(f"data: {{ kind: files, root: {data} }}\n{lake}", csv_job),
        other("DuckDB", "duckdb_csv_to_parquet", 2, fresh, CSV=f"{data}/lineitem.csv"),
        other("Polars", "polars_csv_to_parquet", 2, fresh, CSV=f"{data}/lineitem.csv"),
    ], same_lines, "DuckDB")

    tables = "".join(f"  {table}: {{ connection: data, file: {table}.parquet }}\n" for table in TABLES)
    mapping = f"job: load\nsources:\n{tables}models: {{ mapped: sql/mapped.sql }}\ntarget:\n  connection: lake\n  outputs: {{ mapped: {{ from: mapped, mode: replace }} }}\n"

    def same_mapping(contender):
        import duckdb

        for table in TABLES:
            duckdb.sql(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM '{data}/{table}.parquet'")
        expected = duckdb.sql(f"SELECT * FROM ({MAPPING}) ORDER BY ALL").fetchall()
        found = duckdb.sql(f"SELECT * FROM '{parquet_of(contender, 'mapped')}' ORDER BY ALL").fetchall()
        return "" if found == expected else "other values"

    yield Work("mapping", "SQL mapping: join of three, aggregate, from Parquet", [
        floodmark(f"data: {{ kind: files, root: {data} }}\n{lake}", mapping, [("sql/mapped.sql", MAPPING)]),
        other("DuckDB", "duckdb_mapping", 2, fresh),
        other("Polars", "polars_mapping", 2, fresh),
    ], same_mapping, "DuckDB")

    store = Store()
    env |= {"STORE_KEY": store.key, "STORE_SECRET": store.secret, "STORE": f"127.0.0.1:{store.port}"}
    s3 = (f"lake: {{ kind: s3, bucket: floodmark, prefix: peers, endpoint: \"http://127.0.0.1:{store.port}\", allow_http: true, region: us-east-1, "
          "access_key_id: \"${env:STORE_KEY}\", secret_access_key: \"${env:STORE_SECRET}\" }\n")
    files = f"data: {{ kind: files, root: {data} }}\n"
    copied = "job: load\nsources:\n  lineitem: { connection: data, file: lineitem.parquet }\ntarget:\n  connection: lake\n  outputs: { lineitem: { from: lineitem, mode: replace } }\n"

    def emptied_bucket():
        fresh()
        store.clear()

    def stored_lines(contender):
        if contender.startswith("floodmark, into a folder"):
            return same_lines(contender)
        path = store.download(out / "downloaded.parquet")
        return "" if sums_of(path)[0] == source else "other values"

    floodmark(files + lake, copied).before()
    subprocess.run([binary, "run", "--project", str(project)], check=True, stdout=subprocess.DEVNULL)
    shutil.copy(next((project / "out/lineitem/current").glob("*.parquet")), data / "uploaded.parquet")
    yield Work("to_s3", "Parquet → Parquet zstd in a bucket of a local S3 server, lineitem; and what of it is the upload", [
        other("pyarrow, multipart upload of the ready file", "upload", 2, emptied_bucket),
        floodmark(files + lake, copied, name="floodmark, into a folder"),
        floodmark(files + s3, copied, before=emptied_bucket, name="floodmark, into the bucket"),
    ], stored_lines, "pyarrow, multipart upload of the ready file")

    (data / "ten.csv").write_text("id,amount\n" + "".join(f"{row},{row}.50\n" for row in range(10)))
    ten = "job: load\nsources:\n  ten: { connection: data, file: ten.csv, columns: { id: int, amount: \"decimal(18,2)\" } }\ntarget:\n  connection: lake\n  outputs: { ten: { from: ten, mode: replace } }\n"

    def ten_rows(contender):
        import duckdb

        found = duckdb.sql(f"SELECT count(*), sum(amount)::DECIMAL(18,2)::VARCHAR FROM '{parquet_of(contender, 'ten')}'").fetchone()
        return "" if found == (10, "50.00") else f"other values: {found}"

    yield Work("ten_rows", "a job of ten rows, CSV → Parquet", [
        floodmark(f"data: {{ kind: files, root: {data} }}\n{lake}", ten),
        other("DuckDB", "duckdb_ten_rows", 2, fresh),
    ], ten_rows, "DuckDB")


def prepare(options, server, data):
    """The data, once for each scale: files, and tables in the server's database."""
    done = data / "done"
    if not done.exists():
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(parents=True)
        generate = Path(sys.executable).parent / "tpchgen-cli"
        for kind in ["csv", "parquet"]:
            subprocess.run([generate, kind, "-s", str(options.scale), f"--output-dir={data}", f"--tables={','.join(TABLES)}"], check=True)
        done.touch()
    known = server.psql("SELECT count(*) FROM pg_database WHERE datname = 'peers'", "postgres")
    if known == "0":
        server.psql("CREATE DATABASE peers", "postgres")
    comment = server.psql("SELECT coalesce(obj_description(to_regclass('lineitem')), '')")
    if comment != f"scale {options.scale}, made 2":
        server.psql(f"DROP TABLE IF EXISTS lineitem, orders, merged, delta, wide; CREATE TABLE lineitem ({LINEITEM})")
        server.psql("CREATE TABLE orders (o_orderkey bigint NOT NULL, o_custkey bigint NOT NULL, o_orderstatus varchar NOT NULL, "
                    "o_totalprice numeric(15,2) NOT NULL, o_orderdate date NOT NULL, o_orderpriority varchar NOT NULL, o_clerk varchar NOT NULL, "
                    "o_shippriority integer NOT NULL, o_comment varchar NOT NULL)")
        server.psql(f"\\copy orders FROM '{data}/orders.csv' (FORMAT csv, HEADER)")
        server.psql(f"\\copy lineitem FROM '{data}/lineitem.csv' (FORMAT csv, HEADER)")
        server.psql("VACUUM (FREEZE, ANALYZE) lineitem")
        server.psql("CREATE TABLE merged (LIKE lineitem, PRIMARY KEY (l_orderkey, l_linenumber)); INSERT INTO merged SELECT * FROM lineitem ORDER BY 1, 4")
        server.psql("CREATE TABLE delta (LIKE lineitem); INSERT INTO delta SELECT * FROM lineitem WHERE l_orderkey % 64 = 1 LIMIT 90000; "
                    "UPDATE delta SET l_quantity = l_quantity + 1; "
                    "INSERT INTO delta SELECT * FROM lineitem WHERE l_orderkey % 64 = 2 LIMIT 10000; "
                    "UPDATE delta SET l_orderkey = l_orderkey + 100000000 WHERE l_orderkey % 64 = 2")
        columns = ", ".join(f'"{name}" {kind}' for name, kind, *_ in WIDE)
        server.psql(f"CREATE TABLE wide ({columns})")
        server.psql(f"INSERT INTO wide SELECT {', '.join(value for _, _, value, _ in WIDE)} FROM generate_series(1::bigint, {int(1_000_000 * options.scale)}) AS n")
        for table in ["orders", "merged", "delta", "wide"]:
            server.psql(f"VACUUM (FREEZE, ANALYZE) {table}")
        server.psql(f"\\copy delta TO '{data}/delta.copy' (FORMAT binary)")
        server.psql(f"COMMENT ON TABLE lineitem IS 'scale {options.scale}, made 2'")
        subprocess.run([sys.executable, HERE / "contenders.py", "write_delta"], check=True, env={**os.environ, "DATA": str(data), "OUT": "", "SERVER": server.uri})
    ready = data / "lineitem.copy"
    if not ready.exists():
        server.psql(f"\\copy lineitem TO '{ready}' (FORMAT binary)")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--floodmark", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True, help="the benchmark of the parts, which reads a table and nothing else")
    parser.add_argument("--ingestr", required=True, help="the program, which has an environment of its own")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs="*", help="only these")
    parser.add_argument("--only", default="", help="only contenders whose name matches this")
    parser.add_argument("--slow", action="store_true", help="also those who take minutes")
    parser.add_argument("--out", type=Path, default=HERE.parent / "RESULTS.md")
    options = parser.parse_args()
    server = Server()
    data, out = options.cache / f"data-{options.scale:g}", options.cache / "out"
    options.cache.mkdir(parents=True, exist_ok=True)
    prepare(options, server, data)
    sections = []
    for work in works(options, server, data, out):
        if options.work and work.name not in options.work:
            continue
        work.contenders = [contender for contender in work.contenders if re.search(options.only, contender.name)]
        found = {contender.name: [] for contender in work.contenders}
        for _ in range(options.rounds):
            for contender in work.contenders:
                measured = run(contender, server)
                if not measured.wrong and "/dev/null" not in contender.name:
                    measured.wrong = work.check(contender.name)
                found[contender.name].append(measured)
                print(f"{work.name}: {contender.name}: {measured.wall:.2f} s, {measured.wrong or 'right'}", flush=True)
        sections.append(section(work, found))
    if not options.work or "cancel" in options.work:
        sections.append(cancelled(options, server, out))
    version = subprocess.run([options.floodmark, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    head = (f"# The same work, by floodmark and by others\n\n`benches/peers/run --scale {options.scale:g} --rounds {options.rounds}` on "
            f"{time.strftime('%Y-%m-%d')}: {version}, {os.cpu_count()} cores, {server.psql('SHOW server_version')} of PostgreSQL on the same machine, "
            f"{platform.system()}. Medians; a ratio is to the yardstick, which has 1. Seconds are of this machine, ratios carry over. Start and end of the process are in it, "
            "for all.\n")
    options.out.write_text("\n".join([head, *sections]))
    print(f"written: {options.out}")


def cancelled(options, server, out):
    """How long a session of ours lives on the server after Ctrl-C, in the middle of a large table."""
    project = out / "project"
    job = "job: load\nsources:\n  lineitem: { connection: erp, table: lineitem }\ntarget:\n  connection: lake\n  outputs: { lineitem: { from: lineitem, mode: replace } }\n"
    erp = (f"{{ kind: postgres, host: 127.0.0.1, port: {server.port}, database: peers, user: admin, "
           "password: \"${env:PASSWORD}\", sslmode: disable }")
    alive = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'floodmark'"
    import psycopg2

    watch = psycopg2.connect(server.uri)
    watch.autocommit = True
    cursor, taken = watch.cursor(), []

    def sessions():
        cursor.execute(alive)
        return cursor.fetchone()[0]

    for _ in range(options.rounds):
        shutil.rmtree(out, ignore_errors=True)
        floodmark_project(project, f"erp: {erp}\nlake: {{ kind: files, root: out }}\n", job)
        process = subprocess.Popen([options.floodmark, "run", "--project", project], env={**os.environ, "PASSWORD": server.password},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and sessions() < 3:
            time.sleep(0.005)
        time.sleep(1)
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        while sessions():
            time.sleep(0.002)
        taken.append((time.perf_counter() - began) * 1000)
        process.wait()
    told = ", ".join(f"{each:.0f}" for each in taken)
    return f"## Ctrl-C in the middle of a table, until the server has no session of floodmark's\n\n{statistics.median(taken):.0f} ms ({told})\n"


def section(work, found):
    median = statistics.median
    base = median(measured.wall for measured in found[work.yardstick])
    rows = [f"## {work.title}\n", "| contender | wall, s | ratio | its CPU, s | server's CPU, s | peak, MiB | result |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, runs in sorted(found.items(), key=lambda item: median(measured.wall for measured in item[1])):
        wrong = next((measured.wrong for measured in runs if measured.wrong), "") or "right"
        values = [median(getattr(measured, what) for measured in runs) for what in ["wall", "client", "server", "peak_mib"]]
        wall, client, at_server, peak = values
        rows.append(f"| {name.replace('|', '&#124;')} | {wall:.2f} | {wall / base:.2f} | {client:.2f} | {at_server:.2f} | {peak:.0f} | {wrong.replace('|', '/')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
