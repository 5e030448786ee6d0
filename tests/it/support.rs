//! A copy of the example project, or a small project of a test's own, in a folder of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    /// The worked example, copied.
    pub(crate) fn example() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for part in ["floodmark.yaml", "connections.yaml", "jobs", "sql", "fixtures"] {
            copy(Path::new(part), &folder.path().join(part));
        }
        folder
    }

    /// The example of a whole platform, copied.
    pub(crate) fn platform() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        copy(Path::new("examples/platform"), folder.path());
        folder
    }

    /// A project of these files, over a small one that works.
    pub(crate) fn with(files: &[(&str, &str)]) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for (path, text) in SMALL.iter().chain(files) {
            folder.write(path, text.as_bytes());
        }
        folder
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, path: &str, bytes: &[u8]) {
        let full = self.path().join(path);
        fs::create_dir_all(full.parent().unwrap()).unwrap();
        fs::write(full, bytes).unwrap();
    }

    pub(crate) fn floodmark(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_floodmark"));
        command.args(arguments).current_dir(self.path()).env_remove("RUST_BACKTRACE").env("NO_COLOR", "1");
        for (variable, _) in std::env::vars().filter(|(name, _)| name.starts_with("FLOODMARK_")) {
            command.env_remove(variable);
        }
        command
    }

    /// Runs, and gives the documents of the jobs.
    pub(crate) fn run(&self, arguments: &[&str]) -> (i32, Vec<serde_json::Value>) {
        let arguments = [&["run", "--output", "json"], arguments].concat();
        let output = self.floodmark(&arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        println!("{text}{}", String::from_utf8_lossy(&output.stderr));
        (
            output.status.code().unwrap(),
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        )
    }

    /// Every file below `out`, with its content: what must not change when a run is refused.
    pub(crate) fn published(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        walk(&self.path().join("out"), &mut files);
        files.sort();
        files
    }
}

fn walk(folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            files.push((
                path.clone(),
                fs::read_link(&path).unwrap().to_string_lossy().into_owned().into_bytes(),
            ));
        } else if path.is_dir() {
            walk(&path, files);
        } else {
            files.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).unwrap();
    }
}

const SMALL: &[(&str, &str)] = &[
    ("floodmark.yaml", "project: small\nlimits: { retries: 0 }\n"),
    ("connections.yaml", "data: { kind: files, root: data }\nlake: { kind: files, root: out }\n"),
    (
        "jobs/load.yaml",
        "job: load\nsources:\n  orders: { connection: data, file: orders.csv, columns: { amount: \"decimal(18,2)\" } }\nmodels:\n  clean:\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean, mode: merge, key: [id] }\n",
    ),
    ("sql/mappings/load/clean.sql", "SELECT id, customer, amount FROM orders\n"),
    ("data/orders.csv", "id,customer,amount\n1,ada,1.50\n2,grace,2.25\n"),
];
