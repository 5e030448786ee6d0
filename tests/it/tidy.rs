//! Rules of the house.

use std::{collections::BTreeSet, fs, path::Path};

#[test]
fn one_version_of_the_data_plane() {
    let lock: toml::Table = fs::read_to_string("Cargo.lock").unwrap().parse().unwrap();
    for name in ["arrow-schema", "datafusion", "parquet", "object_store", "sqlparser"] {
        let versions: BTreeSet<_> = lock["package"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|package| package["name"].as_str() == Some(name))
            .map(|package| package["version"].as_str().unwrap())
            .collect();
        assert_eq!(versions.len(), 1, "{name} is in Cargo.lock as {versions:?}");
    }
}

/// A module's folder or file under `src/`, and what it may not name.
const MAY_NOT_IMPORT: &[(&str, &[&str])] = &[
    ("error.rs", &["crate::"]),
    ("types.rs", &["crate::"]),
    ("watermark.rs", &["crate::"]),
    ("names.rs", &["crate::connector", "crate::job", "crate::plan", "crate::run"]),
    (
        "connector",
        &[
            "crate::job",
            "crate::plan",
            "crate::run",
            "crate::project",
            "crate::cli",
            "crate::check",
            "crate::state",
        ],
    ),
    (
        "functions",
        &["crate::job", "crate::plan", "crate::run", "crate::project", "crate::cli", "crate::check"],
    ),
    ("record", &["crate::job", "crate::plan", "crate::run", "crate::project", "crate::cli"]),
    ("job", &["crate::plan", "crate::run", "crate::project", "crate::cli", "crate::state", "std::fs"]),
    ("check", &["crate::run::", "crate::project", "crate::cli", "crate::state", "std::fs"]),
    ("plan", &["crate::run", "crate::cli", "crate::state", "std::fs"]),
    ("run.rs", &["crate::cli"]),
];

#[test]
fn layers_are_kept() {
    let mut offences = Vec::new();
    for (module, forbidden) in MAY_NOT_IMPORT {
        each_file(&Path::new("src").join(module), &mut |path, text| {
            let code = text.split("#[cfg(test)]").next().unwrap();
            for (number, line) in code.lines().enumerate() {
                let line = line.trim_start();
                if line.starts_with("//") {
                    continue;
                }
                for name in *forbidden {
                    let exact = line.find(name).is_some_and(|at| {
                        !line
                            .get(at + name.len()..)
                            .unwrap()
                            .starts_with(|c: char| c.is_alphanumeric() || c == '_')
                    });
                    if exact || (name.ends_with("::") && line.contains(name)) {
                        offences.push(format!("{path}:{}: names {name}", number + 1));
                    }
                }
            }
        });
    }
    assert!(offences.is_empty(), "{}", offences.join("\n"));
}

#[test]
fn only_the_renderer_prints_and_only_the_runtime_spawns() {
    let mut offences = Vec::new();
    each_file(Path::new("src"), &mut |path, text| {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for (word, only) in [
            ("println!", "cli/render.rs"),
            ("print!", "cli/render.rs"),
            ("task::spawn", "runtime.rs"),
            ("env::var(", "project/mod.rs"),
            ("Utc::now(", "runtime.rs"),
        ] {
            if code.contains(word) && !path.ends_with(only) {
                offences.push(format!("{path} has {word}, which belongs to {only}"));
            }
        }
    });
    assert!(offences.is_empty(), "{}", offences.join("\n"));
}

#[test]
fn every_file_of_sql_is_used() {
    let jobs: String = fs::read_dir("jobs")
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    each_file(Path::new("sql"), &mut |path, _| {
        let stem = Path::new(path).file_stem().unwrap().to_str().unwrap();
        assert!(jobs.contains(path) || jobs.contains(&format!("  {stem}:")), "{path} is used by no job");
    });
}

fn each_file(path: &Path, visit: &mut impl FnMut(&str, &str)) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            each_file(&entry.unwrap().path(), visit);
        }
    } else {
        visit(path.to_str().unwrap(), &fs::read_to_string(path).unwrap());
    }
}
