//! `floodmark init`: a project that runs at once.

use std::{fs, path::Path};

use crate::error::{Error, Result};

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
