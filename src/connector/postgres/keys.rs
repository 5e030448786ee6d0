//! Whether keys come twice, seen while their rows are staged.
//!
//! A merge asks its server whether a key of the stage is null or comes twice. Of few rows that is known once they have passed: [`Keys`] remembers the
//! hash of each key, and says either that all were there and different, or nothing: where two hashes are the same, a key is null or there are too many,
//! the server is asked. Values are compared as Arrow has them: it is for [types](Keys::may_tell) whose values differ in the server wherever they differ here.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use arrow::{array::RecordBatch, datatypes::DataType};
use datafusion::{
    common::hash_utils::{RandomState, create_hashes},
    physical_plan::{SendableRecordBatchStream, stream::RecordBatchStreamAdapter},
};
use futures::StreamExt;

/// How many keys are remembered at most, in a dozen MiB.
const MANY: usize = 400_000;

/// What is known of keys that have passed: their hashes, as long as all are there and differ.
#[derive(Debug, Clone)]
pub(super) struct Keys(Arc<Mutex<Option<HashSet<u64>>>>);

impl Keys {
    /// Whether values of a type that are the same in a server are the same in Arrow: floats have two zeros, and an interval many spellings.
    pub(super) fn may_tell(of: &DataType) -> bool {
        of.is_integer()
            || matches!(
                of,
                DataType::Decimal128(..)
                    | DataType::Date32
                    | DataType::Timestamp(..)
                    | DataType::Boolean
                    | DataType::Utf8
            )
    }

    /// Looks at the columns `key` of rows while they pass.
    pub(super) fn of(key: &[String], rows: SendableRecordBatchStream) -> (Self, SendableRecordBatchStream) {
        let (keys, key) = (Self(Arc::new(Mutex::new(Some(HashSet::new())))), key.to_vec());
        let (seen, schema) = (keys.clone(), rows.schema());
        let rows = rows.inspect(move |batch| batch.iter().for_each(|batch| seen.see(batch, &key)));
        (keys, Box::pin(RecordBatchStreamAdapter::new(schema, rows)))
    }

    fn see(&self, batch: &RecordBatch, key: &[String]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(seen) = known.as_mut() else { return };
        let columns: Option<Vec<_>> = key.iter().map(|name| batch.column_by_name(name)).collect();
        let columns = columns.filter(|columns| columns.iter().all(|column| column.null_count() == 0));
        let mut hashes = vec![0; batch.num_rows()];
        let hashed =
            columns.and_then(|columns| create_hashes(columns, &RandomState::default(), &mut hashes).ok());
        let has_room = seen.len() + batch.num_rows() <= MANY;
        if !has_room || !hashed.is_some_and(|hashes| hashes.iter().all(|hash| seen.insert(*hash))) {
            *known = None;
        }
    }

    /// Whether all were there, and none came twice; false where that is not known.
    pub(super) fn are_different(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

#[cfg(test)]
mod unit {
    use arrow::array::{Int64Array, StringArray};

    use super::*;

    #[tokio::test]
    async fn keys_are_different_or_nothing_is_said() {
        let are_different = async |batches: Vec<Vec<(Option<i64>, &str)>>| {
            let batches: Vec<_> = batches
                .into_iter()
                .map(|rows| {
                    let (numbers, texts): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
                    let numbers: Int64Array = numbers.into_iter().collect();
                    let columns =
                        [("n", Arc::new(numbers) as _), ("t", Arc::new(StringArray::from(texts)) as _)];
                    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, of)| (name, of, true)))
                        .unwrap()
                })
                .collect();
            let rows = futures::stream::iter(batches.clone().into_iter().map(Ok));
            let rows = Box::pin(RecordBatchStreamAdapter::new(batches[0].schema(), rows));
            let (keys, rows) = Keys::of(&["n".to_owned(), "t".to_owned()], rows);
            let passed: Vec<_> = rows.map(Result::unwrap).collect().await;
            assert_eq!(passed, batches);
            keys.are_different()
        };
        assert!(are_different(vec![vec![(Some(1), "a"), (Some(1), "b")], vec![(Some(2), "a")]]).await);
        assert!(!are_different(vec![vec![(Some(1), "a"), (Some(1), "a")]]).await);
        assert!(!are_different(vec![vec![(Some(1), "a")], vec![(Some(2), "b")], vec![(Some(1), "a")]]).await);
        assert!(!are_different(vec![vec![(None, "a")]]).await);
        let many = |count: i64| (0..count).map(|n| (Some(n), "x")).collect::<Vec<_>>();
        assert!(are_different(vec![many(400_000)]).await);
        assert!(!are_different(vec![many(400_001)]).await);
    }
}
