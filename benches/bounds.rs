//! Bounds that floodmark keeps, measured on the binary: `cargo bench --bench bounds`.
//!
//! * A job of ten rows ends within 100 ms of its start, whether it publishes or finds nothing new.
//! * A million rows are merged from PostgreSQL into PostgreSQL within 300 MiB of memory.
//! * A CSV file of 1 GB becomes Parquet within 300 MiB of memory.
//! * The hash of all rows, which every run adds up, costs less than 5 % of that.
//!
//! A number, `cargo bench --bench bounds -- 100000000`, is another size of the file. Exits with 1 if a bound is broken.
//!
//! `cargo bench --bench bounds -- instructions` counts the processor's instructions instead, which are the same on a busy machine: those of a
//! start, and those that a row takes on its way ([`FLOORS`]). `.ci/run` does that.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::indexing_slicing,
    reason = "a benchmark prints, and may panic"
)]

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, Int64Array, RecordBatch, StringArray};
use floodmark::record::rowhash::RowHash;
use nix::sys::resource::{UsageWho, getrusage};

#[path = "../tests/services/mod.rs"]
#[expect(unreachable_pub, dead_code, reason = "shared with the tests, which use the rest")]
mod services;

const START: Duration = Duration::from_millis(100);
const MEMORY_KIB: i64 = 300 << 10;
const HASH_SHARE: f64 = 0.05;

/// Instructions that a job may take: its name, what it reads, where to, its SQL, and how many a row; a sixth more than when this was
/// written. The rest of a run is that of a start, and of what has to be learned from the first rows.
const FLOORS: [Floor; 6] = [
    Floor {
        name: "CSV to Parquet",
        from: "data, file: FILE.csv, columns: { COLUMNS }",
        to: "lake",
        sql: "",
        most: 4_500,
    },
    Floor {
        name: "JSON lines to Parquet",
        from: "data, file: FILE.jsonl, columns: { COLUMNS }",
        to: "lake",
        sql: "",
        most: 9_400,
    },
    Floor { name: "Parquet to PostgreSQL", from: "lake, table: FILE", to: "erp", sql: "", most: 1_720 },
    Floor { name: "PostgreSQL to Parquet", from: "erp, table: FILE", to: "lake", sql: "", most: 3_340 },
    Floor {
        name: "PostgreSQL to Parquet, mapped and checked",
        from: "erp, table: FILE",
        to: "lake",
        sql: "SELECT id, account, posted, amount * 2 AS twice, text FROM lines WHERE account <> 'none'",
        most: 3_700,
    },
    Floor {
        name: "Parquet, grouped",
        from: "lake, table: FILE",
        to: "lake",
        sql: "SELECT account, count(*) AS lines, sum(amount) AS amount FROM lines GROUP BY account",
        most: 540,
    },
];

/// Instructions from the start of a process to its end, for a job of ten rows.
const FLOOR_OF_START: u64 = 7_700_000;

struct Floor {
    name: &'static str,
    from: &'static str,
    to: &'static str,
    sql: &'static str,
    most: u64,
}

const COLUMNS: &str = "id: int, account: string, posted: date, amount: \"decimal(18,2)\", text: string";

fn instructions() -> bool {
    let folder = tempfile::tempdir().unwrap();
    let (server, schema) = (services::postgres(), services::Schema::new());
    project(folder.path());
    fs::remove_file(folder.path().join("jobs/load.yaml")).unwrap();
    let erp = format!(
        "erp: {{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"${{env:PASSWORD}}\", sslmode: disable, schema: {} }}\n",
        server.port, schema.name
    );
    let files = "data: { kind: files, root: data }\nlake: { kind: files, root: out }\n";
    fs::write(folder.path().join("connections.yaml"), files.to_owned() + &erp).unwrap();
    let found = Command::new("tests/services/valgrind").output().unwrap();
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    let valgrind = String::from_utf8(found.stdout).unwrap().trim().to_owned();
    let job = |name: &str, from: &str, to: &str, sql: &str, file: &str| {
        let from = from.replace("FILE", file).replace("COLUMNS", COLUMNS);
        let (models, made) = match sql {
            "" => ("", "lines"),
            _ => (
                "models: { made: sql/made.sql }\nchecks: { lines: [ { not_null: id } ], made: [ { not_null: account } ] }\n",
                "made",
            ),
        };
        let checks = if sql.contains("GROUP") {
            models.lines().next().unwrap().to_owned() + "\n"
        } else {
            models.to_owned()
        };
        fs::write(folder.path().join("sql/made.sql"), format!("{sql}\n")).unwrap();
        let job = format!(
            "job: {name}\nsources:\n  lines: {{ connection: {from} }}\n{checks}target:\n  connection: {to}\n  outputs: {{ {name}: {{ from: {made}, mode: replace }} }}\n"
        );
        fs::write(folder.path().join(format!("jobs/{name}.yaml")), job).unwrap();
    };
    // What a job takes; it is gone afterwards.
    let count = |name: &str| -> u64 {
        let mut command = Command::new(&valgrind);
        command.args(["--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]);
        command.arg(env!("CARGO_BIN_EXE_floodmark")).args(["run", name, "--project"]).arg(folder.path());
        let done = command.env("PASSWORD", server.password.as_str()).output().unwrap();
        let told = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.success(), "{told}");
        fs::remove_file(folder.path().join(format!("jobs/{name}.yaml"))).unwrap();
        let line = told.lines().find(|line| line.contains("I ") && line.contains("refs:")).unwrap();
        line.split("refs:").nth(1).unwrap().trim().replace(',', "").parse().unwrap()
    };
    for (file, rows) in [("ten", 10), ("few", FEW), ("many", MANY)] {
        let csv = folder.path().join(format!("data/{file}.csv"));
        write_lines(&csv, usize::MAX, rows);
        let json: String = fs::read_to_string(&csv).unwrap().lines().skip(1).fold(String::new(), |mut all, line| {
            let [id, account, posted, amount, text] = line.split(',').collect::<Vec<_>>().try_into().unwrap();
            writeln!(all, "{{\"id\":{id},\"account\":\"{account}\",\"posted\":\"{posted}\",\"amount\":{amount},\"text\":\"{text}\"}}").unwrap();
            all
        });
        fs::write(folder.path().join(format!("data/{file}.jsonl")), json).unwrap();
        for to in ["lake", "erp"] {
            job(file, "data, file: FILE.csv, columns: { COLUMNS }", to, "", file);
            run(folder.path());
            fs::remove_file(folder.path().join(format!("jobs/{file}.yaml"))).unwrap();
        }
    }
    let mut kept = true;
    let mut told = |name: &str, found: u64, most: u64, of: &str| {
        kept &= found <= most;
        println!(
            "{name}: {found} instructions {of}; bound {most}{}",
            if found > most { ": BROKEN" } else { "" }
        );
    };
    job("start", "data, file: ten.csv, columns: { COLUMNS }", "lake", "", "ten");
    told("a job of ten rows", count("start"), FLOOR_OF_START, "from start to end");
    for (at, floor) in FLOORS.iter().enumerate() {
        let [few, many] = ["few", "many"].map(|file| {
            let name = format!("j{at}_{file}");
            job(&name, floor.from, floor.to, floor.sql, file);
            count(&name)
        });
        told(floor.name, (many - few) / (MANY - FEW) as u64, floor.most, "a row");
    }
    kept
}

/// Rows of two files, of which the second is measured by what it takes more than the first.
const FEW: usize = 20_000;
const MANY: usize = 60_000;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "instructions") {
        return ExitCode::from(u8::from(!instructions()));
    }
    let kept = [ten_rows(), large_merge(), large_file()];
    ExitCode::from(u8::from(kept.contains(&false)))
}

/// A project that appends `data/lines.csv` to a folder of Parquet files.
fn project(folder: &Path) {
    let write = |path: &str, text: &str| {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("floodmark.yaml", "project: bounds\n");
    write("connections.yaml", "data: { kind: files, root: data }\nlake: { kind: files, root: out }\n");
    write(
        "jobs/load.yaml",
        "job: load\nsources:\n  lines:\n    connection: data\n    files: \"*.csv\"\n    \
         columns: { id: int, account: string, posted: date, amount: \"decimal(18,2)\", text: string }\n\
         models: { clean: sql/clean.sql }\ntarget:\n  connection: lake\n  \
         outputs: { lines: { from: clean, mode: append } }\n",
    );
    write("sql/clean.sql", "SELECT id, account, posted, amount * 2 AS twice, text FROM lines\n");
    fs::create_dir(folder.join("data")).unwrap();
}

fn write_lines(file: &Path, bytes: usize, rows: usize) -> usize {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file).unwrap());
    out.write_all(b"id,account,posted,amount,text\n").unwrap();
    let (mut line, mut written, mut row) = (String::new(), 0, 0_u64);
    while written < bytes && row < rows as u64 {
        line.clear();
        let (day, cents) = (row % 28 + 1, row * 7919 % 10_000_000);
        writeln!(
            line,
            "{row},{},2026-10-{day:02},{}.{:02},line {row} of the ledger",
            row % 997,
            cents / 100,
            cents % 100
        )
        .unwrap();
        out.write_all(line.as_bytes()).unwrap();
        written += line.len();
        row += 1;
    }
    out.flush().unwrap();
    written
}

fn run(folder: &Path) -> Duration {
    let start = Instant::now();
    let status = Command::new(env!("CARGO_BIN_EXE_floodmark"))
        .args(["run", "--project"])
        .arg(folder)
        .env("PASSWORD", services::postgres().password.as_str())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let took = start.elapsed();
    assert!(status.success(), "the job failed: {status}");
    took
}

fn ten_rows() -> bool {
    let (mut first, mut again) = (Vec::new(), Vec::new());
    for _ in 0..31 {
        let folder = tempfile::tempdir().unwrap();
        project(folder.path());
        write_lines(&folder.path().join("data/lines.csv"), usize::MAX, 10);
        first.push(run(folder.path()));
        again.push(run(folder.path()));
    }
    let mut kept = true;
    for (what, mut times) in [("publishes", first), ("nothing new", again)] {
        times.sort();
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        kept &= median < START;
        println!("ten rows, {what}: median {median:.1?}, worst {worst:.1?}; bound {START:?}");
    }
    kept
}

fn large_merge() -> bool {
    const ROWS: u32 = 1_000_000;
    let (from, to) = (services::Schema::new(), services::Schema::new());
    from.execute(&format!(
        "CREATE TABLE lines (id bigint PRIMARY KEY, account text, posted date, amount numeric(18,2), note text, changed_at timestamptz);
         INSERT INTO lines SELECT i, 'account ' || i % 997, date '2026-01-01' + i % 300, i % 100000 / 100.0, 'line ' || i || ' of the ledger',
             timestamptz '2026-01-01 00:00+00' + i * interval '1 second' FROM generate_series(1, {ROWS}) AS i",
    ));
    let folder = tempfile::tempdir().unwrap();
    project(folder.path());
    let server = services::postgres();
    let connection = |name: &str, schema: &services::Schema| {
        format!(
            "{name}: {{ kind: postgres, host: localhost, port: {}, database: postgres, user: admin, password: \"${{env:PASSWORD}}\", sslmode: disable, schema: {} }}\n",
            server.port, schema.name
        )
    };
    fs::write(folder.path().join("connections.yaml"), connection("erp", &from) + &connection("dw", &to))
        .unwrap();
    fs::write(
        folder.path().join("jobs/load.yaml"),
        "job: load\nsources:\n  lines: { connection: erp, table: lines }\ntarget:\n  connection: dw\n  outputs: { lines: { from: lines, mode: merge, key: [id] } }\n",
    )
    .unwrap();
    let first = run(folder.path());
    from.execute("UPDATE lines SET amount = amount + 1 WHERE id % 10 = 0");
    let again = run(folder.path());
    let changed: i64 = to.with(|client| {
        client
            .query_one("SELECT count(*) FROM lines WHERE amount <> id % 100000 / 100.0", &[])
            .unwrap()
            .get(0)
    });
    assert_eq!(changed, i64::from(ROWS) / 10);
    let peak = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss();
    println!(
        "{ROWS} rows merged from PostgreSQL to PostgreSQL: peak {} MiB of memory; bound {} MiB; {:.1} s inserted, {:.1} s with a tenth changed",
        peak >> 10,
        MEMORY_KIB >> 10,
        first.as_secs_f64(),
        again.as_secs_f64()
    );
    peak < MEMORY_KIB
}

fn large_file() -> bool {
    let bytes = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(1_000_000_000);
    let folder = tempfile::tempdir().unwrap();
    project(folder.path());
    let written = write_lines(&folder.path().join("data/lines.csv"), bytes, usize::MAX);
    let took = run(folder.path());
    let peak = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss();
    let (mb, seconds) = (written as f64 / 1e6, took.as_secs_f64());
    println!(
        "{mb:.0} MB of CSV to Parquet: peak {} MiB of memory; bound {} MiB; {seconds:.1} s, {:.0} MB/s",
        peak >> 10,
        MEMORY_KIB >> 10,
        mb / seconds
    );
    let share = hashing(written).as_secs_f64() / seconds;
    println!("the hash of its rows: {:.1} % of that; bound {:.0} %", share * 100.0, HASH_SHARE * 100.0);
    peak < MEMORY_KIB && share < HASH_SHARE
}

/// How long the hash of as many rows takes as are in a file of so many bytes: the same rows, a batch of them again and again.
fn hashing(bytes: usize) -> Duration {
    const ROWS: i64 = 8192;
    let ids: Int64Array = (0..ROWS).map(|row| row * 997).collect();
    let accounts: StringArray = (0..ROWS).map(|row| Some((row % 997).to_string())).collect();
    let days: Date32Array = (0..ROWS).map(|row| Some(20_700 + i32::try_from(row % 28).unwrap())).collect();
    let amounts: Decimal128Array = (0..ROWS).map(|row| Some(i128::from(row * 7919 * 2))).collect();
    let texts: StringArray = (0..ROWS).map(|row| Some(format!("line {} of the ledger", row * 997))).collect();
    let batch = RecordBatch::try_from_iter([
        ("id", Arc::new(ids) as ArrayRef),
        ("account", Arc::new(accounts)),
        ("posted", Arc::new(days)),
        ("twice", Arc::new(amounts.with_precision_and_scale(38, 2).unwrap())),
        ("text", Arc::new(texts)),
    ])
    .unwrap();
    // A line of the file has about fifty bytes.
    let batches = bytes / 53 / 8192;
    let mut hash = RowHash::new(&batch.schema()).unwrap();
    let began = Instant::now();
    for _ in 0..batches {
        hash.add(&batch).unwrap();
    }
    let took = began.elapsed();
    assert!(hash.finish().contains(&(batches * 8192).to_string()));
    took
}
