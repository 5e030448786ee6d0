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

/// The words between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn section<'a>(text: &'a str, title: &str) -> &'a str {
    let (_, behind) = text.split_once(&format!("## {title}\n")).unwrap();
    behind.split("\n## ").next().unwrap()
}

#[test]
fn the_map_is_the_tree() {
    let page = fs::read_to_string("ARCHITECTURE.md").unwrap();
    let rows: Vec<(Vec<&str>, BTreeSet<&str>)> = section(&page, "Code map")
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let (place, what) = line.trim_start_matches('|').split_once('|').unwrap();
            (quoted(place).collect(), quoted(what).collect())
        })
        .collect();
    let mut offences = Vec::new();
    for (places, inside) in &rows {
        for place in places {
            if !Path::new(place).exists() {
                offences.push(format!("the map has `{place}`, and the tree has not"));
            }
            let named = inside.iter().filter(|name| name.ends_with(".rs"));
            for name in named.filter(|name| !Path::new(place).join(name).exists()) {
                offences.push(format!("the map has `{name}` in `{place}`, and the tree has not"));
            }
        }
    }
    for root in ["src", "tests", "benches"] {
        each_path(Path::new(root), &mut |path| {
            if path.extension().is_none_or(|ending| ending != "rs")
                || path.ends_with("mod.rs")
                || path.ends_with("main.rs")
            {
                return;
            }
            let (folder, name) = (path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap());
            let known = rows.iter().any(|(places, inside)| {
                places.iter().any(|place| {
                    Path::new(place) == path || Path::new(place) == folder && inside.contains(name)
                })
            });
            if !known {
                offences.push(format!("the map lacks {}", path.display()));
            }
        });
    }
    assert!(offences.is_empty(), "{}", offences.join("\n"));
}

#[test]
fn the_readme_lists_what_there_is() {
    let page = fs::read_to_string("README.md").unwrap();
    let connectors: Vec<&str> = section(&page, "Connectors")
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        .filter_map(|line| quoted(line.strip_prefix("| ")?.split('|').next()?).next())
        .collect();
    assert_eq!(
        connectors,
        floodmark::connector::CONNECTORS.iter().map(|connector| connector.name).collect::<Vec<_>>()
    );
    let help = std::process::Command::new(env!("CARGO_BIN_EXE_floodmark")).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, verbs) = help.split_once("Commands:\n").unwrap();
    for verb in verbs.lines().take_while(|line| !line.is_empty()) {
        let verb = verb.split_whitespace().next().unwrap();
        let listed = quoted(section(&page, "Verbs")).any(|listed| listed.split(' ').next() == Some(verb));
        assert!(verb == "help" || listed, "the README lacks the verb `{verb}`");
    }
}

fn each_path(path: &Path, visit: &mut impl FnMut(&Path)) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            each_path(&entry.unwrap().path(), visit);
        }
    } else {
        visit(path);
    }
}

fn each_file(path: &Path, visit: &mut impl FnMut(&str, &str)) {
    each_path(path, &mut |path| visit(path.to_str().unwrap(), &fs::read_to_string(path).unwrap()));
}

/// The names between backticks that are those of tests: words joined by at least two underscores.
fn tests_named(text: &str) -> impl Iterator<Item = &str> {
    quoted(text).filter(|name| {
        name.matches('_').count() >= 2 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    })
}

fn all_code() -> String {
    let mut code = String::new();
    for root in ["src", "tests"] {
        each_path(Path::new(root), &mut |path| {
            if path.extension().is_some_and(|ending| ending == "rs") {
                code.push_str(&fs::read_to_string(path).unwrap());
            }
        });
    }
    code
}

#[test]
fn every_promise_names_tests_that_exist() {
    let page = fs::read_to_string("docs/promises.md").unwrap();
    let code = all_code();
    let (mut promises, mut offences) = (0, Vec::new());
    for row in page
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| P ") && !line.starts_with("| ---"))
    {
        promises += 1;
        let proven: Vec<&str> = tests_named(row.rsplit('|').nth(1).unwrap()).collect();
        if proven.is_empty() {
            offences.push(format!("nothing proves: {row}"));
        }
        for test in proven.iter().filter(|test| !code.contains(&format!("fn {test}("))) {
            offences.push(format!("there is no test `{test}`"));
        }
    }
    assert!(offences.is_empty(), "{}", offences.join("\n"));
    assert!(promises >= 25, "{promises} promises");
}

/// What the README says of each target is what its code promises, and tests of that kind of target prove.
#[test]
fn the_guarantees_of_the_readme_are_those_of_the_code() {
    use floodmark::connector::{CONNECTORS, Options, spec::OutputSpec};
    let page = fs::read_to_string("README.md").unwrap();
    let rows: Vec<Vec<&str>> = section(&page, "What is promised")
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let output: OutputSpec = serde_json::from_value(serde_json::json!({
        "name": "x", "mode": "append", "key": [], "update": [], "range": [], "named_ranges": [], "partition_by": [],
        "contract": {}, "rebuild": false, "marked": false,
    }))
    .unwrap();
    let code = all_code();
    for connector in CONNECTORS {
        let values = match connector.name {
            "files" => serde_json::json!({ "root": "out" }),
            "sqlite" => serde_json::json!({ "path": "x.db" }),
            "postgres" => serde_json::json!({ "user": "x" }),
            "http" => serde_json::json!({ "url": "https://example.com" }),
            "azure" => serde_json::json!({ "container": "x", "account": "x", "access_key": "eA==" }),
            _ => {
                serde_json::json!({ "bucket": "x", "region": "x", "access_key_id": "x", "secret_access_key": "x" })
            }
        };
        let options = Options {
            name: "x".to_owned(),
            base: std::path::PathBuf::new(),
            values,
            spill: std::env::temp_dir(),
        };
        let opened = (connector.open)(options);
        let row = rows.iter().find(|row| quoted(row[0]).any(|name| name == connector.name));
        let promised = match &opened {
            Ok(connection) => connection.target().map(|target| target.guarantee(&output).to_string()),
            // Who asks is read from a file that is not there.
            Err(_) => Some("exactly once".to_owned()),
        };
        assert_eq!(row.map(|row| row[1].to_owned()), promised, "{}", connector.name);
        let Some(row) = row else { continue };
        let proven: Vec<&str> = tests_named(row[3]).collect();
        let untested = row[3].starts_with("not tested");
        assert!(untested || proven.len() >= 3, "{}: {}", connector.name, row[3]);
        for test in proven {
            assert!(code.contains(&format!("fn {test}(")), "there is no test `{test}`");
        }
    }
}
