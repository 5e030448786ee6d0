//! Rows that come one by one, as batches of a scan's columns.

use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, RecordBatchOptions, StringBuilder};

use super::{
    columns::{ColumnBuilder, Misfit, TextRules, effective},
    scan::{POSITION_COLUMN, Scan},
    tap::Tap,
};
use crate::{
    error::{Error, Result},
    runtime::{BATCH_ROWS, BatchSender},
};

/// Builds batches of a scan's schema row by row.
#[derive(Debug)]
pub struct RowBuilder<'a> {
    scan: &'a Scan,
    /// For each column that is parsed: its index in the row, its name, its builder.
    columns: Vec<(Option<usize>, String, ColumnBuilder)>,
    positions: Option<(usize, StringBuilder)>,
    rows: usize,
    bytes: usize,
    /// The columns of values that became null since rows were taken, and of those in the row at hand.
    nulled: Vec<String>,
}

impl<'a> RowBuilder<'a> {
    /// For the columns of `scan`; `index_of` says where a row has each.
    ///
    /// # Errors
    ///
    /// If a column has a type that no text becomes.
    pub fn new(scan: &'a Scan, index_of: impl Fn(&str) -> Option<usize>) -> Result<Self> {
        let rules = TextRules::of(&scan.stream)?;
        let (mut columns, mut positions) = (Vec::new(), None);
        for (at, field) in scan.schema.fields().iter().enumerate() {
            if field.name() == POSITION_COLUMN {
                positions = Some((at, StringBuilder::new()));
                continue;
            }
            let declared = scan.stream.declared(field.name()).map(|column| effective(column, &scan.stream));
            let column = match declared {
                Some(column) => column,
                None => crate::types::describe(field.data_type()).parse().map_err(|_| {
                    Error::bug(format!("no text becomes a column of type {}", field.data_type()))
                })?,
            };
            columns.push((
                index_of(field.name()),
                field.name().clone(),
                ColumnBuilder::new(&column, &rules, BATCH_ROWS)?,
            ));
        }
        Ok(Self { scan, columns, positions, rows: 0, bytes: 0, nulled: Vec::new() })
    }

    /// A column that the row will not have.
    pub fn missing(&self) -> Option<&str> {
        self.columns.iter().find(|(index, ..)| index.is_none()).map(|(_, name, _)| name.as_str())
    }

    /// Whether the batch should be sent before the next row.
    pub fn is_full(&self) -> bool {
        self.rows >= BATCH_ROWS || self.bytes >= self.scan.batch_bytes
    }

    /// Room for rows and their bytes before the batch should be sent.
    pub fn room(&self) -> (usize, usize) {
        (BATCH_ROWS.saturating_sub(self.rows), self.scan.batch_bytes.saturating_sub(self.bytes))
    }

    /// Whether rows are built column by column: nobody wants to know where each stands.
    pub fn takes_columns(&self) -> bool {
        self.positions.is_none() && self.missing().is_none()
    }

    /// Appends so many rows, column by column; `append` gives the bytes of their values. False if a value does not fit: then none of the rows is in
    /// the batch, and the batch must be sent before the next row.
    pub fn columns(
        &mut self,
        rows: usize,
        mut append: impl FnMut(usize, &mut ColumnBuilder) -> Result<usize, Misfit>,
    ) -> bool {
        let mut bytes = 0;
        for (index, _, builder) in &mut self.columns {
            let Some(Ok(more)) = index.map(|index| append(index, builder)) else { return false };
            bytes += more;
        }
        self.rows += rows;
        self.bytes += bytes;
        true
    }

    /// Appends one row. If a value does not fit, the row is not in the batch, and the batch must be sent before
    /// the next row.
    ///
    /// # Errors
    ///
    /// The column, and why its value does not fit.
    pub fn row(
        &mut self,
        mut append: impl FnMut(usize, &mut ColumnBuilder) -> Result<usize, Misfit>,
        position: impl FnOnce() -> String,
    ) -> Result<(), String> {
        let before = self.nulled.len();
        for (index, name, builder) in &mut self.columns {
            match append(index.unwrap_or(usize::MAX), builder) {
                Ok(bytes) => self.bytes += bytes,
                Err(_) if self.scan.stream.unfit_as_null.contains(name) => {
                    builder.null();
                    self.nulled.push(name.clone());
                }
                Err(why) => {
                    self.nulled.truncate(before);
                    return Err(format!("`{name}` {why}"));
                }
            }
        }
        if let Some((_, positions)) = &mut self.positions {
            positions.append_value(position());
        }
        self.rows += 1;
        Ok(())
    }

    /// What there is, still to be counted.
    ///
    /// # Errors
    ///
    /// If Arrow does not take the columns, which is a bug.
    pub fn finish(&mut self) -> Result<Built> {
        let rows = std::mem::take(&mut self.rows);
        let nulled = std::mem::take(&mut self.nulled);
        self.bytes = 0;
        let mut arrays: Vec<ArrayRef> =
            self.columns.iter_mut().map(|(_, _, builder)| builder.finish().slice(0, rows)).collect();
        if let Some((at, positions)) = &mut self.positions {
            arrays.insert(*at, Arc::new(positions.finish()));
        }
        if rows == 0 {
            return Ok(Built { batch: None, nulled });
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = RecordBatch::try_new_with_options(Arc::clone(&self.scan.schema), arrays, &options)?;
        Ok(Built { batch: Some(batch), nulled })
    }

    /// What there is, counted; `None` if there is nothing.
    ///
    /// # Errors
    ///
    /// If a total cannot be kept.
    pub fn take(&mut self, tap: &Tap) -> Result<Option<RecordBatch>> {
        self.finish()?.counted(tap)
    }

    /// Sends what there is. False once nobody reads any more.
    ///
    /// # Errors
    ///
    /// As [`Self::take`].
    pub fn send(&mut self, tap: &Tap, out: &BatchSender) -> Result<bool> {
        Ok(self.take(tap)?.is_none_or(|batch| out.send(batch)))
    }
}

/// Rows that were built.
#[derive(Debug)]
pub struct Built {
    batch: Option<RecordBatch>,
    /// The columns of values that did not fit and are null.
    nulled: Vec<String>,
}

impl Built {
    /// The rows, counted; `None` if there are none.
    ///
    /// # Errors
    ///
    /// If a total cannot be kept.
    pub fn counted(self, tap: &Tap) -> Result<Option<RecordBatch>> {
        self.nulled.iter().for_each(|column| tap.null(column));
        self.batch.iter().try_for_each(|batch| tap.rows(batch))?;
        Ok(self.batch)
    }
}
