"""One run of one of the others, as a process of its own: `contenders.py NAME`. Where things are comes by the environment.

Each is written as its own documentation does such work, with the settings that make it fastest without changing values."""

import os
import sys
from pathlib import Path

TABLE, KEY = os.environ.get("TABLE", "lineitem"), os.environ.get("KEY", "l_orderkey")
DATA, OUT, SERVER = os.environ["DATA"], os.environ["OUT"], os.environ.get("SERVER", "")
THREADS = int(os.environ.get("THREADS", "2"))


def duck():
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"SET threads = {THREADS}")
    return connection


def attached():
    connection = duck()
    # The extension comes from the package registry, too.
    import duckdb_extension_postgres_scanner as extension

    file = next(Path(extension.__file__).parent.rglob("*.duckdb_extension"))
    connection.execute(f"LOAD '{file}'; ATTACH '{SERVER}' AS pg (TYPE postgres)")
    return connection


PARQUET = "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"


def duckdb_pg_to_parquet():
    attached().execute(f"COPY (SELECT * FROM pg.{TABLE}) TO '{OUT}/{TABLE}.parquet' {PARQUET}")


def connectorx_pg_to_parquet():
    import connectorx
    import pyarrow.parquet

    table = connectorx.read_sql(SERVER, f"SELECT * FROM {TABLE}", return_type="arrow", protocol="binary",
                                **({"partition_on": KEY, "partition_num": THREADS} if THREADS > 1 else {}))
    pyarrow.parquet.write_table(table, f"{OUT}/{TABLE}.parquet", compression="zstd", compression_level=1)


def connectorx_pg_to_arrow():
    import connectorx

    parts = {"partition_on": KEY, "partition_num": THREADS} if THREADS > 1 else {}
    tell_sums([connectorx.read_sql(SERVER, f"SELECT * FROM {TABLE}", return_type="arrow", protocol="binary", **parts)])


def adbc_pg_to_arrow():
    import adbc_driver_postgresql.dbapi

    with adbc_driver_postgresql.dbapi.connect(SERVER) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT * FROM {TABLE}")
        tell_sums(cursor.fetch_record_batch())


def tell_sums(batches):
    """How many rows there are, and what their whole numbers add up to."""
    import pyarrow
    import pyarrow.compute

    rows, sums = 0, {}
    for batch in batches:
        rows += batch.num_rows
        for field, column in zip(batch.schema, batch.columns):
            if pyarrow.types.is_integer(field.type):
                sums[field.name] = sums.get(field.name, 0) + pyarrow.compute.sum(column).as_py()
    print(rows, *(sums[name] for name in sorted(sums)))


def upload():
    """A plain multipart upload of a file that is there: parts of 10 MiB, several at once."""
    store = bucket()
    with open(f"{DATA}/uploaded.parquet", "rb") as file, store.open_output_stream("floodmark/peers/uploaded.parquet", buffer_size=10 << 20) as out:
        while chunk := file.read(10 << 20):
            out.write(chunk)


def bucket():
    import pyarrow.fs

    return pyarrow.fs.S3FileSystem(access_key=os.environ["STORE_KEY"], secret_key=os.environ["STORE_SECRET"],
                                   endpoint_override=os.environ["STORE"], scheme="http", region="us-east-1", background_writes=True)


def adbc_pg_to_parquet():
    import adbc_driver_postgresql.dbapi
    import pyarrow.parquet

    with adbc_driver_postgresql.dbapi.connect(SERVER) as connection, connection.cursor() as cursor:
        cursor.execute(f"SELECT * FROM {TABLE}")
        reader = cursor.fetch_record_batch()
        path = f"{OUT}/{TABLE}.parquet"
        with pyarrow.parquet.ParquetWriter(path, reader.schema, compression="zstd", compression_level=1) as writer:
            for batch in reader:
                writer.write_batch(batch)


def sling_pg_to_parquet():
    import sling_linux_amd64

    binary = Path(sling_linux_amd64.__file__).parent / "bin/sling-linux-amd64"
    binary.chmod(0o755)
    os.environ["PG"] = SERVER
    os.execv(binary, [binary, "run", "--src-conn", "PG", "--src-stream", "public.lineitem",
                      "--tgt-object", f"file://{OUT}/lineitem.parquet"])


def duckdb_parquet_to_pg():
    attached().execute(f"INSERT INTO pg.loaded SELECT * FROM '{DATA}/lineitem.parquet'")


def adbc_parquet_to_pg():
    import adbc_driver_postgresql.dbapi
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(f"{DATA}/lineitem.parquet")
    with adbc_driver_postgresql.dbapi.connect(SERVER) as connection, connection.cursor() as cursor:
        cursor.adbc_ingest("loaded", file.iter_batches(), mode="append")
        connection.commit()


def sling_incremental():
    import sling_linux_amd64

    binary = Path(sling_linux_amd64.__file__).parent / "bin/sling-linux-amd64"
    binary.chmod(0o755)
    os.environ["PG"] = SERVER
    os.environ["SLING_HOME_DIR"] = os.environ["NIGHTLY"]
    os.execv(binary, [binary, "run", "--src-conn", "PG", "--src-stream", "public.bookings", "--tgt-conn", "PG", "--tgt-object", "of_sling.bookings",
                      "--mode", "incremental", "--primary-key", "o_orderkey", "--update-key", "updated_at"])


def dlt_incremental():
    os.environ.update(DLT_PROJECT_DIR=os.environ["NIGHTLY"], RUNTIME__DLTHUB_TELEMETRY="false")
    import dlt
    from dlt.sources.sql_database import sql_table

    uri = SERVER.replace("postgresql://", "postgresql+psycopg2://")
    rows = sql_table(credentials=uri, table="bookings", backend="pyarrow", chunk_size=100_000, incremental=dlt.sources.incremental("updated_at"))
    rows.apply_hints(primary_key="o_orderkey", write_disposition={"disposition": "merge", "strategy": "upsert"})
    pipeline = dlt.pipeline("peers", destination=dlt.destinations.postgres(SERVER), dataset_name="of_dlt", pipelines_dir=os.environ["NIGHTLY"])
    pipeline.run(rows)


def duckdb_pg_to_pg():
    attached().execute("INSERT INTO pg.orders_loaded SELECT * FROM pg.orders")


def duckdb_merge():
    connection = attached()
    connection.execute(f"CREATE TABLE pg.stage AS SELECT * FROM '{DATA}/delta.parquet'")
    connection.execute("CALL postgres_execute('pg', $$" + os.environ["UPSERT"] + "; DROP TABLE stage$$)")


def write_delta():
    attached().execute(f"COPY (SELECT * FROM pg.delta) TO '{DATA}/delta.parquet' {PARQUET}")


def csv_of():
    return os.environ["CSV"]


DUCK_TYPES = ("{'l_orderkey': 'BIGINT', 'l_partkey': 'BIGINT', 'l_suppkey': 'BIGINT', 'l_linenumber': 'INTEGER', "
              "'l_quantity': 'DECIMAL(15,2)', 'l_extendedprice': 'DECIMAL(15,2)', 'l_discount': 'DECIMAL(15,2)', "
              "'l_tax': 'DECIMAL(15,2)', 'l_returnflag': 'VARCHAR', 'l_linestatus': 'VARCHAR', 'l_shipdate': 'DATE', "
              "'l_commitdate': 'DATE', 'l_receiptdate': 'DATE', 'l_shipinstruct': 'VARCHAR', 'l_shipmode': 'VARCHAR', "
              "'l_comment': 'VARCHAR'}")


def duckdb_csv_to_parquet():
    duck().execute(f"COPY (SELECT * FROM read_csv('{csv_of()}', header = true, columns = {DUCK_TYPES})) "
                   f"TO '{OUT}/lineitem.parquet' {PARQUET}")


def polars_csv_to_parquet():
    os.environ["POLARS_MAX_THREADS"] = str(THREADS)
    import polars

    money, date = polars.Decimal(15, 2), polars.Date
    names = ["l_orderkey", "l_partkey", "l_suppkey"]
    types = {name: polars.Int64 for name in names} | {"l_linenumber": polars.Int32}
    types |= {name: money for name in ["l_quantity", "l_extendedprice", "l_discount", "l_tax"]}
    types |= {name: polars.String for name in ["l_returnflag", "l_linestatus"]}
    types |= {name: date for name in ["l_shipdate", "l_commitdate", "l_receiptdate"]}
    types |= {name: polars.String for name in ["l_shipinstruct", "l_shipmode", "l_comment"]}
    polars.scan_csv(csv_of(), schema=types).sink_parquet(f"{OUT}/lineitem.parquet", compression="zstd", compression_level=1)


SQL = (Path(__file__).parent / "mapping.sql").read_text()


def duckdb_mapping():
    connection = duck()
    for table in ["lineitem", "orders", "customer"]:
        connection.execute(f"CREATE VIEW {table} AS SELECT * FROM '{DATA}/{table}.parquet'")
    connection.execute(f"COPY ({SQL}) TO '{OUT}/mapped.parquet' {PARQUET}")


def polars_mapping():
    os.environ["POLARS_MAX_THREADS"] = str(THREADS)
    import polars

    context = polars.SQLContext({table: polars.scan_parquet(f"{DATA}/{table}.parquet")
                                 for table in ["lineitem", "orders", "customer"]})
    context.execute(SQL).sink_parquet(f"{OUT}/mapped.parquet", compression="zstd", compression_level=1)


def duckdb_ten_rows():
    duck().execute(f"COPY (SELECT * FROM read_csv('{DATA}/ten.csv')) TO '{OUT}/ten.parquet' {PARQUET}")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
