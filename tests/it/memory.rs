//! P24: a join and a sort over more rows than there is memory for end right, or say what is too small; the process stays within its
//! limit and what it is made of, and nothing is half published.
//!
//! Four GiB of rows go through 512 MiB. They are few and wide, so that the bytes count and not the rows.

use std::{
    fs,
    path::Path,
    process::{Child, Output, Stdio},
    sync::Arc,
    time::Duration,
};

use arrow::{
    array::{AsArray, Int64Array, RecordBatch, StringArray},
    compute::cast,
    datatypes::{DataType, Field, Int64Type, Schema},
};
use parquet::{
    arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
    basic::{Compression, ZstdLevel},
    file::properties::WriterProperties,
};

use crate::support::Folder;

const MIB: u64 = 1 << 20;

/// The text of each row, in bytes.
const WIDTH: usize = 4096;

/// Rows of each of two tables, 2 GiB of text each.
const ROWS: i64 = (2 << 30) / 4096;

/// A table of `rows` rows in an order of its own: an id, a key, and a wide text that follows from the key.
fn table(path: &Path, rows: i64, step: i64) {
    let fields = [("id", DataType::Int64), ("k", DataType::Int64), ("wide", DataType::Utf8)];
    let schema = Arc::new(Schema::new(fields.map(|(name, of)| Field::new(name, of, false)).to_vec()));
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).unwrap()))
        .set_dictionary_enabled(false)
        .set_max_row_group_row_count(Some(4096))
        .build();
    let mut writer =
        ArrowWriter::try_new(fs::File::create(path).unwrap(), Arc::clone(&schema), Some(properties)).unwrap();
    for start in (0..rows).step_by(1024) {
        let ids: Vec<i64> = (start..(start + 1024).min(rows)).collect();
        // A step that shares no divisor with the number of rows meets each key once.
        let keys: Vec<i64> = ids.iter().map(|id| id * step % rows).collect();
        let texts = keys.iter().map(|key| format!("{key:016}").repeat(WIDTH / 16));
        let columns: Vec<Arc<dyn arrow::array::Array>> = vec![
            Arc::new(Int64Array::from(ids)),
            Arc::new(Int64Array::from(keys.clone())),
            Arc::new(texts.map(Some).collect::<StringArray>()),
        ];
        writer.write(&RecordBatch::try_new(Arc::clone(&schema), columns).unwrap()).unwrap();
    }
    writer.close().unwrap();
}

fn project(limit: &str, model: &str) -> Folder {
    let source = |name: &str| format!("  {name}: {{ connection: data, file: {name}.parquet }}\n");
    Folder::with(&[
        ("floodmark.yaml", &format!("project: small\nlimits: {{ memory: {limit}, retries: 0 }}\n")),
        (
            "jobs/load.yaml",
            &format!(
                "job: load\nsources:\n{}{}models:\n  wide:\ntarget:\n  connection: lake\n  outputs:\n    wide: {{ from: wide, mode: replace }}\n",
                source("a"),
                source("b")
            ),
        ),
        ("sql/mappings/load/clean.sql", ""),
        ("sql/mappings/load/wide.sql", model),
    ])
}

/// Runs; how it went, and the most memory that the process had.
fn measured(folder: &Folder) -> (Output, u64) {
    let mut command = folder.command(&["run", "--output", "json"]);
    let mut run: Child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (about, mut peak) = (format!("/proc/{}/status", run.id()), 0);
    while run.try_wait().unwrap().is_none() {
        let status = fs::read_to_string(&about).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or_default() * 1024);
        std::thread::sleep(Duration::from_millis(10));
    }
    (run.wait_with_output().unwrap(), peak)
}

/// The rows that readers find, as numbers: a column that is missing is 0, and so is what is false.
fn published(folder: &Folder) -> Vec<[i64; 3]> {
    let mut rows = Vec::new();
    for entry in fs::read_dir(folder.path().join("out/wide/current")).unwrap() {
        let file = fs::File::open(entry.unwrap().path()).unwrap();
        for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
            let batch = batch.unwrap();
            let number = |column: usize, row: usize| match batch.columns().get(column) {
                Some(array) if *array.data_type() == DataType::Boolean => {
                    array.as_boolean().value(row).into()
                }
                Some(array) => cast(array, &DataType::Int64).unwrap().as_primitive::<Int64Type>().value(row),
                None => 0,
            };
            rows.extend((0..batch.num_rows()).map(|row| [0, 1, 2].map(|column| number(column, row))));
        }
    }
    rows
}

const JOIN: &str = "SELECT a.id, b.id AS other, a.wide = b.wide AS same FROM a JOIN b ON a.k = b.k\n";

const SORT: &str = "SELECT id, row_number() OVER (ORDER BY wide, id) AS place FROM (SELECT * FROM a UNION ALL SELECT * FROM b)\n";

#[test]
fn a_join_and_a_sort_of_four_gib_stay_within_their_memory() {
    let rows = ROWS;
    let data = tempfile::tempdir().unwrap();
    table(&data.path().join("a.parquet"), rows, 1);
    table(&data.path().join("b.parquet"), rows, 7919);
    for (what, model, expected) in [("join", JOIN, rows), ("sort", SORT, 2 * rows)] {
        let folder = project("512MiB", model);
        for name in ["a.parquet", "b.parquet"] {
            fs::hard_link(data.path().join(name), folder.path().join("data").join(name)).unwrap();
        }
        let began = std::time::Instant::now();
        let (output, peak) = measured(&folder);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        println!(
            "{what}: {} MiB, {:?}: {} {told}",
            peak / MIB,
            began.elapsed(),
            String::from_utf8_lossy(&output.stdout)
        );
        assert!(output.status.success(), "{what}: {told}");
        let run: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let planned_again = run["warnings"].to_string().contains("planned again");
        assert_eq!(planned_again, what == "join", "{what}: {run}");
        let published = published(&folder);
        assert_eq!(i64::try_from(published.len()), Ok(expected), "{what}");
        if what == "join" {
            // Row k of one table is where k * 7919 is in the other.
            let right = |row: &[i64; 3]| row[1] * 7919 % rows == row[0] && row[2] == 1;
            let ids: i64 = published.iter().map(|row| row[1]).sum();
            assert!(published.iter().all(right) && ids == rows * (rows - 1) / 2, "{what}");
        } else {
            // Of each key the two rows stand together, in the order of the keys' texts, which are of one length.
            let mut places: Vec<i64> = published.iter().map(|row| row[1]).collect();
            places.sort_unstable();
            assert!(places.into_iter().eq(1..=2 * rows), "{what}");
            let right = |[id, place, _]: &[i64; 3]| {
                let key = (place - 1) / 2;
                *id == key || *id * 7919 % rows == key
            };
            assert!(published.iter().all(right), "{what}");
        }
        assert!(peak <= 640 * MIB, "{what}: {} MiB", peak / MIB);
    }
}

#[test]
fn too_little_memory_is_an_error_that_says_who_asked_and_publishes_nothing() {
    let rows = 4096;
    let folder = project("512MiB", JOIN);
    table(&folder.path().join("data/a.parquet"), rows, 1);
    table(&folder.path().join("data/b.parquet"), rows, 7919);
    let (output, _) = measured(&folder);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let before = folder.published();
    folder.write("floodmark.yaml", b"project: small\nlimits: { memory: 6MiB, retries: 0 }\n");
    folder.write("sql/mappings/load/wide.sql", JOIN.replace("b.id", "b.id + 1").as_bytes());
    let refused = folder.floodmark(&["run"]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{told}");
    for part in
        ["the memory limit is too small", "asked for", "Sort", "hint: Raise `limits: { memory:", "try 2"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(folder.published(), before);
}

/// A row that is larger than what there is: its source is named. A few wide rows come in batches that have room.
#[test]
fn a_source_that_finds_no_room_for_its_rows_is_named() {
    let model = "SELECT id, length(text) AS length FROM lines\n";
    let job = "job: load\nsources:\n  lines: { connection: data, file: lines.csv, columns: { id: int, text: string } }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    lines: { from: clean, mode: replace }\n";
    let folder = Folder::with(&[
        ("floodmark.yaml", "project: small\nlimits: { memory: 24MiB, retries: 0 }\n"),
        ("jobs/load.yaml", job),
        ("sql/mappings/load/clean.sql", model),
    ]);
    let line = |id: usize, bytes: usize| format!("{id},{}\n", "x".repeat(bytes));
    let lines: String = (0..64).map(|id| line(id, 1 << 20)).collect();
    folder.write("data/lines.csv", format!("id,text\n{lines}").as_bytes());
    let (output, _) = measured(&folder);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let before = folder.published();
    folder.write("data/lines.csv", format!("id,text\n{lines}{}", line(64, 32 << 20)).as_bytes());
    let refused = folder.floodmark(&["run"]);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{told}");
    assert!(
        told.contains("the memory limit is too small") && told.contains("source `lines` asked for"),
        "{told}"
    );
    assert_eq!(folder.published(), before);
}
