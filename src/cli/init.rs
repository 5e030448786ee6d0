//! `floodmark init`: a project that runs at once; or, from a connection of a project, a job that loads its tables.

use std::{fs, path::Path};

use crate::{
    connector::CatalogTable,
    error::{Error, Result},
    names::is_name,
    project::Project,
};

const FILES: &[(&str, &str)] = &[
    ("floodmark.yaml", "# yaml-language-server: $schema=floodmark-project.json\nproject: my_project\n"),
    ("connections.yaml", "lake: { kind: files, root: out }\n"),
    (
        "jobs/orders.yaml",
        "job: orders\ndescription: Orders by customer, as Parquet\n\nsources:\n  orders: { files: \"data/orders*.csv\", columns: { amount: \"decimal(18,2)\" } }\n\nmodels:\n  clean_orders:\n\nchecks:\n  clean_orders:\n    - unique: [order_id]\n    - { expression: \"amount >= 0\", on_fail: quarantine }\n\ntarget:\n  connection: lake\n  outputs:\n    orders: { from: clean_orders, mode: merge, key: [order_id], totals: { sum: [amount] } }\n",
    ),
    (
        "sql/mappings/orders/clean_orders.sql",
        "-- One row for each order.\nSELECT\n    order_id,\n    upper(trim(customer)) AS customer,\n    amount,\n    ordered_on\nFROM orders\n",
    ),
    (
        "data/orders_1.csv",
        "order_id,customer,amount,ordered_on\n1, ada,19.90,2026-10-01\n2,grace ,250.00,2026-10-02\n3,edsger,7.05,2026-10-02\n",
    ),
    (".gitignore", ".floodmark/\n.env\nout/\n"),
];

/// Writes the files of a new project. Their names.
pub(super) fn init(folder: &Path) -> Result<Vec<String>> {
    super::is_free(folder)?;
    for (path, text) in FILES {
        let full = folder.join(path);
        if full.exists() {
            continue;
        }
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent)
                .map_err(|error| Error::io("make the folder", parent.display(), error))?;
        }
        fs::write(&full, text).map_err(|error| Error::io("write", full.display(), error))?;
    }
    Ok(FILES.iter().map(|(path, _)| folder.join(path).display().to_string()).collect())
}

/// Writes a job that loads the tables of a connection. Its name.
///
/// # Errors
///
/// If there is such a job, nothing to load, or nowhere to load it to.
pub(super) async fn job_from(
    project: &Project,
    connection: &str,
    pattern: Option<&str>,
) -> Result<Vec<String>> {
    let known: Vec<&str> = project.connections.keys().map(String::as_str).collect();
    if !known.contains(&connection) {
        let error = Error::configuration(format!("there is no connection `{connection}`"));
        return Err(match crate::error::nearest(connection, known.iter().copied()) {
            Some(near) => error.hint(format!("Did you mean `{near}`?")),
            None => error.hint("Write it into connections.yaml first."),
        });
    }
    let path = format!("jobs/load_{connection}.yaml");
    if project.root.join(&path).exists() || project.jobs.contains_key(&format!("load_{connection}")) {
        return Err(Error::configuration(format!("the project has a job `load_{connection}` already"))
            .hint("Remove it, or go on with it by hand."));
    }
    let tables = project.connection(connection)?.discover().await?;
    let tables: Vec<CatalogTable> =
        super::discovered(tables, pattern, connection)?.into_iter().filter(|table| !table.view).collect();
    if tables.is_empty() {
        return Err(Error::configuration(format!("connection `{connection}` has no tables to load"))
            .hint(format!("`floodmark discover {connection}` shows what it has.")));
    }
    // A folder or a bucket takes every type.
    let files = ["files", "s3", "gcs", "azure"];
    let others = || project.connections.iter().filter(|(name, _)| *name != connection);
    let target = others().find(|(_, file)| files.contains(&file.connector.name)).or_else(|| others().next());
    let Some((target, _)) = target else {
        return Err(Error::configuration("the project has no other connection to load the tables into")
            .hint("Add one to connections.yaml, such as `lake: { kind: files, root: out }`."));
    };
    let full = project.root.join(&path);
    if let Some(folder) = full.parent() {
        fs::create_dir_all(folder).map_err(|error| Error::io("make the folder", folder.display(), error))?;
    }
    fs::write(&full, job_text(connection, target, &tables))
        .map_err(|error| Error::io("write", &path, error))?;
    Ok(vec![path])
}

/// The job, with what is known of each table beside it.
fn job_text(connection: &str, target: &str, tables: &[CatalogTable]) -> String {
    let (mut sources, mut outputs) = (String::new(), String::new());
    for table in tables {
        let bare = table.name.rsplit('.').next().unwrap_or(&table.name);
        let plain: String =
            bare.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let source = if is_name(&plain) { plain } else { format!("t_{plain}") };
        // Only a time with a zone that says when a row changed finds changes; a number finds new rows only.
        let changed = table.cursors().into_iter().find(|cursor| {
            ["updated", "modified", "changed"].iter().any(|word| cursor.to_lowercase().contains(word))
                && table.columns.iter().any(|(name, of)| {
                    name == cursor && matches!(of.as_str(), "timestamptz" | "timestamp with time zone")
                })
        });
        let merge = !table.key.is_empty();
        let incremental = changed
            .filter(|_| merge)
            .map(|cursor| format!(", incremental: {{ cursor: {}, overlap: 1h }}", yaml(cursor)))
            .unwrap_or_default();
        let mut notes = Vec::new();
        notes.extend(table.rows.map(|rows| format!("about {rows} rows")));
        let others: Vec<&str> =
            table.cursors().into_iter().filter(|cursor| Some(*cursor) != changed).collect();
        notes.extend((!others.is_empty()).then(|| format!("may be a cursor: {}", others.join(", "))));
        let notes = if notes.is_empty() { String::new() } else { format!("   # {}", notes.join("; ")) };
        sources.push_str(&format!(
            "  {source}: {{ connection: {connection}, table: {}{incremental} }}{notes}\n",
            yaml(&table.name)
        ));
        let key: Vec<String> = table.key.iter().map(|column| yaml(column)).collect();
        let how = if merge {
            format!("mode: merge, key: [{}]", key.join(", "))
        } else {
            "mode: replace".to_owned()
        };
        outputs.push_str(&format!("    {source}: {{ from: {source}, {how} }}\n"));
    }
    format!(
        "# Made by `floodmark init --from {connection}`. A table with a cursor is read where it changed, the others whole.\njob: load_{connection}\n\nsources:\n{sources}\ntarget:\n  connection: {target}\n  outputs:\n{outputs}"
    )
}

/// A word as YAML takes it.
fn yaml(word: &str) -> String {
    let plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'))
        && word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && !matches!(word.to_lowercase().as_str(), "true" | "false" | "null" | "yes" | "no");
    if plain { word.to_owned() } else { serde_json::Value::from(word).to_string() }
}
