//! What an output remembers of rows that change or go: `mode: history`, and `deletes`.
//!
//! The rows of a merge are worked out here, from the model's and from those that the output holds; targets then merge them by key
//! and take out what is marked ([`GONE`]). So history means the same in every target.
//!
//! **History** keeps every version of a row (a slowly changing dimension of type 2): `[valid_from, valid_to)`, where the last one has
//! no `valid_to`. A version begins at the column that `effective` names, or at the run's `as_of`. What comes late is put where it
//! belongs: the version before ends there. A version that equals the one before it is none. What comes for the very instant at
//! which a version begins corrects it.
//!
//! **Deletes** need a model that sees everything: what the output holds and the model has not is gone. `key_compare` takes it out (of
//! history: ends its last version), `soft` says since when in `deleted_at`.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use chrono::{DateTime, SecondsFormat, Utc};
use datafusion::{physical_plan::SendableRecordBatchStream, prelude::SessionContext};

use crate::{
    connector::{
        Connection,
        scan::{OpenSources, ScanTable},
        spec::{Deletes, GONE, Mode, OutputSpec},
    },
    error::Result,
    names::{quoted, quoted_list},
    session,
    spool::{Scratch, Spool},
    types::UTC,
};

/// Since when a version holds.
pub const VALID_FROM: &str = "valid_from";
/// Until when; null for the last one.
pub const VALID_TO: &str = "valid_to";
/// Since when a row is gone; null for one that is there.
pub const DELETED_AT: &str = "deleted_at";

/// What an output does beside merging.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dimension {
    /// Whether every version is kept.
    pub history: bool,
    /// The model's column that says since when a version holds; the run's `as_of`, if none.
    pub effective: Option<String>,
    /// What becomes of rows that the model no longer has.
    pub deletes: Deletes,
}

impl Dimension {
    /// The rows of an output `t` that stand: of a history the last versions, and none that is marked as gone.
    pub fn standing(&self) -> String {
        match (self.history, self.deletes) {
            (true, _) => format!("SELECT * FROM t WHERE {VALID_TO} IS NULL"),
            (false, Deletes::Soft) => format!("SELECT * FROM t WHERE {DELETED_AT} IS NULL"),
            (false, _) => "SELECT * FROM t".to_owned(),
        }
    }

    /// Whether the output's own rows must be looked at.
    pub fn looks_back(&self) -> bool {
        self.history || self.deletes != Deletes::Ignore
    }

    /// The columns that the output has for a model of these.
    pub fn schema(&self, model: &Schema) -> Schema {
        let instant = DataType::Timestamp(TimeUnit::Microsecond, Some(Arc::from(UTC)));
        let effective = self.effective.as_ref().and_then(|name| model.field_with_name(name).ok());
        let since = effective.map_or_else(|| instant.clone(), |field| field.data_type().clone());
        let kept = model
            .fields()
            .iter()
            .filter(|field| effective.is_none_or(|effective| effective != field.as_ref()));
        let mut fields: Vec<Arc<Field>> = kept.cloned().collect();
        if self.history {
            fields.push(Arc::new(Field::new(VALID_FROM, since.clone(), false)));
            fields.push(Arc::new(Field::new(VALID_TO, since, true)));
        } else if self.deletes == Deletes::Soft {
            fields.push(Arc::new(Field::new(DELETED_AT, instant, true)));
        }
        Schema::new(fields)
    }

    /// The merge that a target is asked for.
    pub fn merge(&self, output: &OutputSpec) -> OutputSpec {
        let mut merge = OutputSpec { mode: Mode::Merge, marked: true, ..output.clone() };
        if self.history {
            merge.key.push(VALID_FROM.to_owned());
        } else if self.deletes == Deletes::Soft && !merge.update.is_empty() {
            merge.update.push(DELETED_AT.to_owned());
        }
        merge
    }
}

/// One output's rows: the model's, and those that it holds.
pub(crate) struct Sides<'a> {
    /// What is asked.
    pub dimension: &'a Dimension,
    /// The output.
    pub output: &'a OutputSpec,
    /// Its columns, without the mark.
    pub schema: SchemaRef,
    /// The model's rows.
    pub model: &'a Spool,
    /// When the run is.
    pub as_of: DateTime<Utc>,
    /// Where rows may be put.
    pub scratch: &'a Scratch,
}

/// How many of the rows that were there the model no longer has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gone {
    /// So many.
    pub rows: u64,
    /// Of so many.
    pub of: u64,
}

impl Gone {
    /// Whether that is at most this part of them, in millionths.
    pub fn is_within(self, parts_per_million: u64) -> bool {
        u128::from(self.rows) * 1_000_000 <= u128::from(self.of) * u128::from(parts_per_million)
    }
}

impl Sides<'_> {
    /// The rows to merge, each with its mark; and how many are gone.
    ///
    /// # Errors
    ///
    /// If the output cannot be read.
    pub(crate) async fn rows(
        &self,
        target: Option<&Arc<dyn Connection>>,
    ) -> Result<(SendableRecordBatchStream, Gone)> {
        let held = match target {
            Some(target) => Some(self.held(target).await?),
            None => None,
        };
        let context = self.context(Arc::default());
        context.register_table("m", self.model.table()?)?;
        if self.dimension.history {
            self.refuse_keys(&context).await?;
        }
        match &held {
            Some(held) => context.register_table("t", held.table()?)?,
            None => {
                let none = datafusion::datasource::MemTable::try_new(Arc::clone(&self.schema), vec![vec![]])?;
                context.register_table("t", Arc::new(none))?
            }
        };
        let gone = if self.dimension.deletes == Deletes::Ignore {
            Gone::default()
        } else {
            self.gone(&context).await?
        };
        let sql = if self.dimension.history { self.versions()? } else { self.removals()? };
        let rows = context.sql(&sql).await?.execute_stream().await?;
        let mut fields: Vec<Arc<Field>> = self.schema.fields().iter().cloned().collect();
        fields.push(Arc::new(Field::new(GONE, DataType::Boolean, false)));
        Ok((session::conform(rows, Arc::new(Schema::new(fields))), gone))
    }

    /// A session for joins with the model's rows: when they are many it sorts, so that it can spill.
    fn context(&self, sources: Arc<OpenSources>) -> SessionContext {
        let many = self.model.rows() > (self.scratch.limits.memory_bytes / 400) as u64;
        session::for_joins(self.scratch, self.as_of, sources, !many, 1)
    }

    /// Refuses two versions of one key that begin at once, and keys that are null: nobody knows which is meant.
    async fn refuse_keys(&self, context: &SessionContext) -> Result<()> {
        let columns = self.output.key.iter().chain(&self.dimension.effective).map(String::as_str);
        let columns = quoted_list(columns)?;
        let nulls = self.output.key.iter().map(|column| Ok(format!("{} IS NULL", quoted(column)?)));
        let nulls = nulls.collect::<Result<Vec<_>>>()?.join(" OR ");
        let count = async |sql: String| -> Result<u64> { Ok(context.sql(&sql).await?.count().await? as u64) };
        let null_keys = count(format!("SELECT 1 FROM m WHERE {nulls}")).await?;
        let twice = count(format!("SELECT 1 FROM m GROUP BY {columns} HAVING count(*) > 1")).await?;
        crate::load::refuse_keys(self.output, null_keys, twice)
    }

    /// The rows of `t` that are there now, as a table.
    fn there(&self) -> String {
        match (self.dimension.history, self.dimension.deletes) {
            // A version that is still to begin is no row yet.
            (true, _) => {
                let since = self.schema.field_with_name(VALID_FROM).map(|field| self.now(field.data_type()));
                let now = since.unwrap_or_else(|_| "NULL".to_owned());
                format!("({} AND {VALID_FROM} < {now})", self.dimension.standing())
            }
            (false, Deletes::Soft) => format!("({})", self.dimension.standing()),
            _ => "t".to_owned(),
        }
    }

    async fn gone(&self, context: &SessionContext) -> Result<Gone> {
        let (there, on) = (self.there(), self.same_key("m", "c")?);
        let count = async |sql: String| -> Result<u64> { Ok(context.sql(&sql).await?.count().await? as u64) };
        Ok(Gone {
            rows: count(format!("SELECT 1 FROM m RIGHT ANTI JOIN {there} AS c ON {on}")).await?,
            of: count(format!("SELECT 1 FROM {there} AS c")).await?,
        })
    }

    /// What the output holds of the model's keys; with deletes, everything. Written down, since it is read more than once.
    async fn held(&self, target: &Arc<dyn Connection>) -> Result<Spool> {
        let (table, sources) = ScanTable::of_output(target, &self.output.name).await?;
        let schema = Arc::clone(&table.scan.schema);
        let context = self.context(Arc::new(sources));
        context.register_table("t", Arc::new(table))?;
        context.register_table("m", self.model.table()?)?;
        // Columns that somebody else added are not ours to merge.
        let columns =
            self.schema.fields().iter().filter(|field| schema.field_with_name(field.name()).is_ok());
        let columns = quoted_list(columns.map(|field| field.name().as_str()))?;
        let sql = if self.dimension.deletes == Deletes::Ignore {
            let on = self.same_key("m", "t")?;
            format!("SELECT {columns} FROM m RIGHT SEMI JOIN t ON {on}")
        } else {
            format!("SELECT {columns} FROM t")
        };
        let rows = context.sql(&sql).await?.execute_stream().await?;
        Spool::of("_held", session::conform(rows, Arc::clone(&self.schema)), self.scratch).await
    }

    fn same_key(&self, left: &str, right: &str) -> Result<String> {
        let pair = |column: &String| {
            let column = quoted(column)?;
            Ok(format!("{left}.{column} = {right}.{column}"))
        };
        Ok(self.output.key.iter().map(pair).collect::<Result<Vec<_>>>()?.join(" AND "))
    }

    /// The run's own instant, as a value of the type that versions begin with.
    fn now(&self, of: &DataType) -> String {
        let text = match of {
            DataType::Date32 => self.as_of.format("%Y-%m-%d").to_string(),
            DataType::Timestamp(_, None) => self.as_of.format("%Y-%m-%dT%H:%M:%S%.6f").to_string(),
            _ => self.as_of.to_rfc3339_opts(SecondsFormat::Micros, true),
        };
        format!("arrow_cast('{text}', '{of}')")
    }

    /// Merge with deletes: the model's rows, and those that are gone.
    fn removals(&self) -> Result<String> {
        let on = self.same_key("m", "t")?;
        let soft = self.dimension.deletes == Deletes::Soft;
        let names: Vec<&str> = self
            .schema
            .fields()
            .iter()
            .map(|field| field.name().as_str())
            .filter(|name| !(soft && *name == DELETED_AT))
            .collect();
        let columns = quoted_list(names.iter().copied())?;
        let gone = format!("SELECT t.* FROM m RIGHT ANTI JOIN t ON {on}");
        let mark = quoted(GONE)?;
        if !soft {
            return Ok(format!(
                "SELECT {columns}, false AS {mark} FROM m UNION ALL SELECT {columns}, true AS {mark} FROM ({gone})"
            ));
        }
        let instant = DataType::Timestamp(TimeUnit::Microsecond, Some(Arc::from(UTC)));
        let (at, none) = (self.now(&instant), format!("arrow_cast(NULL, '{instant}')"));
        Ok(format!(
            "SELECT {columns}, {none} AS {DELETED_AT}, false AS {mark} FROM m
             UNION ALL SELECT {columns}, {at} AS {DELETED_AT}, false AS {mark} FROM ({gone}) WHERE {DELETED_AT} IS NULL"
        ))
    }

    /// History: the versions of every key that the model has, or that is gone, and the versions that are none any more.
    fn versions(&self) -> Result<String> {
        let since = self.schema.field_with_name(VALID_FROM)?.data_type();
        let key = quoted_list(self.output.key.iter().map(String::as_str))?;
        let values: Vec<&Arc<Field>> = self
            .schema
            .fields()
            .iter()
            .filter(|field| {
                !self.output.key.contains(field.name())
                    && field.name() != VALID_FROM
                    && field.name() != VALID_TO
            })
            .collect();
        let list = |each: &dyn Fn(&Field) -> Result<String>| -> Result<String> {
            Ok(values
                .iter()
                .map(|field| Ok(format!(", {}", each(field)?)))
                .collect::<Result<Vec<_>>>()?
                .concat())
        };
        let plain = list(&|field| quoted(field.name()))?;
        let nulls = list(&|field| {
            Ok(format!("arrow_cast(NULL, '{}') AS {}", field.data_type(), quoted(field.name())?))
        })?;
        let before = list(&|field| {
            let name = quoted(field.name())?;
            Ok(format!("lag({name}) OVER w AS {}", quoted(&format!("_floodmark_before_{}", field.name()))?))
        })?;
        let differs = values
            .iter()
            .map(|field| {
                Ok(format!(
                    "({} IS DISTINCT FROM {})",
                    quoted(field.name())?,
                    quoted(&format!("_floodmark_before_{}", field.name()))?
                ))
            })
            .collect::<Result<Vec<_>>>()?
            .join(" OR ");
        let differs = if differs.is_empty() { "false".to_owned() } else { differs };
        let effective = match &self.dimension.effective {
            Some(column) => quoted(column)?,
            None => self.now(since),
        };
        let ended = if self.dimension.deletes == Deletes::Ignore {
            String::new()
        } else {
            // Keys whose last version is open, and which the model no longer has.
            let on = self.same_key("m", "c")?;
            format!(
                "UNION ALL SELECT {key}{nulls}, {} AS {VALID_FROM}, 3 AS _floodmark_pass, true AS _floodmark_ended
                     FROM (SELECT c.* FROM m RIGHT ANTI JOIN {} AS c ON {on})",
                self.now(since),
                self.there()
            )
        };
        let back = if self.dimension.deletes == Deletes::Ignore || self.dimension.effective.is_none() {
            String::new()
        } else {
            // Keys whose last version has _floodmark_ended, and which the model has again with nothing newer than that end.
            let on = self.same_key("m", "c")?;
            let of_m = list(&|field| Ok(format!("m.{}", quoted(field.name())?)))?;
            let key_of_m = self.output.key.iter().map(|column| Ok(format!("m.{}", quoted(column)?)));
            let key_of_m = key_of_m.collect::<Result<Vec<_>>>()?.join(", ");
            format!(
                "UNION ALL SELECT {key_of_m}{of_m}, {} AS {VALID_FROM}, 0 AS _floodmark_pass, false AS _floodmark_ended
                     FROM (SELECT * FROM (SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY {effective} DESC) AS _floodmark_nth FROM m) WHERE _floodmark_nth = 1) AS m
                     JOIN (SELECT {key}, max({VALID_TO}) AS _floodmark_last FROM t GROUP BY {key} HAVING count(*) = count({VALID_TO})) AS c ON {on}
                     WHERE m.{effective} < c._floodmark_last",
                self.now(since)
            )
        };
        let all = quoted_list(self.schema.fields().iter().map(|field| field.name().as_str()))?;
        let mark = quoted(GONE)?;
        let same = self.same_key("t", "v")?;
        // At one instant what comes in wins over what is there, and that over an end.
        Ok(format!(
            "WITH points AS (
                 SELECT {key}{plain}, {effective} AS {VALID_FROM}, 0 AS _floodmark_pass, false AS _floodmark_ended FROM m
                 UNION ALL SELECT {key}{plain}, {VALID_FROM}, 1 AS _floodmark_pass, false AS _floodmark_ended FROM t
                 UNION ALL SELECT {key}{nulls}, {VALID_TO} AS {VALID_FROM}, 2 AS _floodmark_pass, true AS _floodmark_ended FROM t WHERE {VALID_TO} IS NOT NULL
                 {ended}
                 {back}
             ),
             instants AS (
                 SELECT * FROM (SELECT *, row_number() OVER (PARTITION BY {key}, {VALID_FROM} ORDER BY _floodmark_pass) AS _floodmark_nth FROM points) WHERE _floodmark_nth = 1
             ),
             steps AS (
                 SELECT *, lag(_floodmark_ended) OVER w AS _floodmark_ended_before{before} FROM instants WINDOW w AS (PARTITION BY {key} ORDER BY {VALID_FROM})
             ),
             changes AS (
                 SELECT * FROM steps WHERE CASE WHEN _floodmark_ended THEN NOT coalesce(_floodmark_ended_before, true) ELSE coalesce(_floodmark_ended_before, true) OR {differs} END
             ),
             versions AS (
                 SELECT {key}{plain}, {VALID_FROM}, lead({VALID_FROM}) OVER (PARTITION BY {key} ORDER BY {VALID_FROM}) AS {VALID_TO}, _floodmark_ended FROM changes
             ),
             live AS (SELECT {all} FROM versions WHERE NOT _floodmark_ended)
             SELECT {all}, false AS {mark} FROM live
             UNION ALL SELECT {all}, true AS {mark} FROM (SELECT t.* FROM live AS v RIGHT ANTI JOIN t ON {same} AND t.{VALID_FROM} = v.{VALID_FROM})"
        ))
    }
}

#[cfg(test)]
mod tests {
    use arrow::{
        array::{Date32Array, Int64Array, RecordBatch, StringArray},
        util::display::{ArrayFormatter, FormatOptions},
    };
    use futures::TryStreamExt;

    use super::*;
    use crate::runtime::Limits;

    fn day(number: i32) -> i32 {
        20_000 + number
    }

    fn scratch() -> (tempfile::TempDir, Scratch) {
        let folder = tempfile::tempdir().unwrap();
        let limits = Limits { memory_bytes: 64 << 20, spill: folder.path().to_owned() };
        let scratch = Scratch::new(&limits).unwrap();
        (folder, scratch)
    }

    fn model_schema() -> SchemaRef {
        Arc::new(Schema::new(vec![
            Field::new("id", DataType::Int64, true),
            Field::new("city", DataType::Utf8, true),
            Field::new("since", DataType::Date32, true),
        ]))
    }

    /// A target that is a list of versions: what a merge by `(id, valid_from)` makes of it.
    type Versions = std::collections::BTreeMap<(i64, i32), (String, Option<i32>)>;

    async fn night(held: &mut Versions, dimension: &Dimension, rows: &[(i64, &str, i32)], today: i32) {
        let (_folder, scratch) = scratch();
        let batch = RecordBatch::try_new(
            model_schema(),
            vec![
                Arc::new(rows.iter().map(|row| row.0).collect::<Int64Array>()),
                Arc::new(rows.iter().map(|row| Some(row.1)).collect::<StringArray>()),
                Arc::new(rows.iter().map(|row| Some(day(row.2))).collect::<Date32Array>()),
            ],
        )
        .unwrap();
        let stream = |schema: SchemaRef, batch: RecordBatch| -> SendableRecordBatchStream {
            let rows = futures::stream::iter([Ok(batch)]);
            Box::pin(datafusion::physical_plan::stream::RecordBatchStreamAdapter::new(schema, rows))
        };
        let model = Spool::of("m", stream(model_schema(), batch), &scratch).await.unwrap();
        let output = OutputSpec {
            name: "customers".to_owned(),
            mode: Mode::History,
            key: vec!["id".to_owned()],
            update: Vec::new(),
            range: Vec::new(),
            named_ranges: Vec::new(),
            partition_by: Vec::new(),
            contract: Default::default(),
            rebuild: false,
            marked: false,
        };
        let schema = Arc::new(dimension.schema(&model_schema()));
        let as_of = DateTime::from_timestamp(i64::from(day(today)) * 86_400, 0).unwrap();
        let sides = Sides {
            dimension,
            output: &output,
            schema: Arc::clone(&schema),
            model: &model,
            as_of,
            scratch: &scratch,
        };
        let context = session::for_models(&scratch, as_of, Arc::default());
        context.register_table("m", model.table().unwrap()).unwrap();
        let held_batch = RecordBatch::try_new(
            Arc::clone(&schema),
            vec![
                Arc::new(held.keys().map(|key| key.0).collect::<Int64Array>()),
                Arc::new(held.values().map(|value| Some(value.0.clone())).collect::<StringArray>()),
                Arc::new(held.keys().map(|key| Some(key.1)).collect::<Date32Array>()),
                Arc::new(held.values().map(|value| value.1).collect::<Date32Array>()),
            ],
        )
        .unwrap();
        let table =
            datafusion::datasource::MemTable::try_new(Arc::clone(&schema), vec![vec![held_batch]]).unwrap();
        context.register_table("t", Arc::new(table)).unwrap();
        let rows: Vec<RecordBatch> = context
            .sql(&sides.versions().unwrap())
            .await
            .unwrap()
            .execute_stream()
            .await
            .unwrap()
            .try_collect()
            .await
            .unwrap();
        let options = FormatOptions::default().with_null("null");
        for batch in rows {
            let texts: Vec<_> = batch
                .columns()
                .iter()
                .map(|array| ArrayFormatter::try_new(array, &options).unwrap())
                .collect();
            let date = |text: String| -> Option<i32> {
                let day: chrono::NaiveDate = text.parse().ok()?;
                Some(day.to_epoch_days())
            };
            for row in 0..batch.num_rows() {
                let text = |column: usize| texts[column].value(row).to_string();
                let key = (text(0).parse().unwrap(), date(text(2)).unwrap());
                if text(4) == "true" {
                    assert!(held.remove(&key).is_some(), "what is marked is there");
                } else {
                    held.insert(key, (text(1), date(text(3))));
                }
            }
        }
    }

    fn shown(held: &Versions) -> Vec<String> {
        held.iter()
            .map(|((id, from), (city, to))| {
                let to = to.map_or("…".to_owned(), |to| (to - day(0)).to_string());
                format!("{id} {city} {}..{to}", from - day(0))
            })
            .collect()
    }

    /// Five days of changes, with a late correction and a key that is deleted and comes back, beside a table that was made by hand.
    #[tokio::test]
    async fn five_days_of_changes_make_the_versions_that_a_hand_made_table_has() {
        let dimension =
            Dimension { history: true, effective: Some("since".to_owned()), deletes: Deletes::KeyCompare };
        let mut held = Versions::new();
        night(&mut held, &dimension, &[(1, "Bonn", 1), (2, "Oslo", 1), (3, "Rome", 1)], 1).await;
        assert_eq!(shown(&held), ["1 Bonn 1..…", "2 Oslo 1..…", "3 Rome 1..…"]);
        // One moves, one stays, one is gone.
        night(&mut held, &dimension, &[(1, "Kiel", 2), (2, "Oslo", 1)], 2).await;
        assert_eq!(shown(&held), ["1 Bonn 1..2", "1 Kiel 2..…", "2 Oslo 1..…", "3 Rome 1..2"]);
        // Nothing happens.
        night(&mut held, &dimension, &[(1, "Kiel", 2), (2, "Oslo", 1)], 3).await;
        assert_eq!(shown(&held), ["1 Bonn 1..2", "1 Kiel 2..…", "2 Oslo 1..…", "3 Rome 1..2"]);
        // One moves on; the one that was gone is back; the second's first city is corrected.
        night(&mut held, &dimension, &[(1, "Ulm", 4), (2, "Bergen", 1), (3, "Rome", 4)], 4).await;
        assert_eq!(
            shown(&held),
            ["1 Bonn 1..2", "1 Kiel 2..4", "1 Ulm 4..…", "2 Bergen 1..…", "3 Rome 1..2", "3 Rome 4..…"]
        );
        // A late correction: on day 3 the first was in Trier. And what is as it was makes no version.
        let late = Dimension { deletes: Deletes::Ignore, ..dimension };
        night(&mut held, &late, &[(1, "Trier", 3), (2, "Bergen", 5)], 5).await;
        assert_eq!(
            shown(&held),
            [
                "1 Bonn 1..2",
                "1 Kiel 2..3",
                "1 Trier 3..4",
                "1 Ulm 4..…",
                "2 Bergen 1..…",
                "3 Rome 1..2",
                "3 Rome 4..…"
            ]
        );
        // The correction is taken back: the version is none any more.
        night(&mut held, &late, &[(1, "Kiel", 3)], 5).await;
        assert_eq!(
            shown(&held),
            ["1 Bonn 1..2", "1 Kiel 2..4", "1 Ulm 4..…", "2 Bergen 1..…", "3 Rome 1..2", "3 Rome 4..…"]
        );
    }

    /// A source that was read in part for one night: the key comes back as it was, and is there again.
    #[tokio::test]
    async fn a_key_that_comes_back_as_it_was_is_there_again() {
        let dimension =
            Dimension { history: true, effective: Some("since".to_owned()), deletes: Deletes::KeyCompare };
        let mut held = Versions::new();
        let all = [(1, "Bonn", 1), (3, "Rome", 1), (4, "Riga", 9)];
        night(&mut held, &dimension, &all, 2).await;
        night(&mut held, &dimension, &[(1, "Bonn", 1)], 3).await;
        // What is still to begin is no row yet, and is not ended.
        assert_eq!(shown(&held), ["1 Bonn 1..…", "3 Rome 1..3", "4 Riga 9..…"]);
        for _ in 0..2 {
            night(&mut held, &dimension, &all, 4).await;
            assert_eq!(shown(&held), ["1 Bonn 1..…", "3 Rome 1..3", "3 Rome 4..…", "4 Riga 9..…"]);
        }
        night(&mut held, &dimension, &all, 5).await;
        assert_eq!(shown(&held), ["1 Bonn 1..…", "3 Rome 1..3", "3 Rome 4..…", "4 Riga 9..…"]);
    }
}
