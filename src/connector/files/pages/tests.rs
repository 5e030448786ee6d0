//! What is written is read again, by the library, and says of itself what the library's own files do.

use std::sync::Arc;

use ::parquet::{
    arrow::{
        ArrowSchemaConverter, ArrowWriter,
        arrow_reader::{
            ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder,
            statistics::StatisticsConverter,
        },
    },
    file::{
        metadata::PageIndexPolicy,
        properties::{WriterProperties, WriterPropertiesPtr},
        writer::SerializedFileWriter,
    },
};
use arrow::{
    array::{ArrayRef, AsArray, BinaryArray, Int64Array, RecordBatch, StringArray, make_comparator},
    compute::{SortOptions, cast, concat_batches, sort_to_indices, take},
    datatypes::{Decimal128Type, Field, Schema, SchemaRef, TimeUnit},
};
use proptest::prelude::*;

use super::{texts::STATISTIC_BYTES, *};

const TYPES: [DataType; 18] = [
    DataType::Int8,
    DataType::Int16,
    DataType::Int32,
    DataType::Int64,
    DataType::Date32,
    DataType::Time32(TimeUnit::Millisecond),
    DataType::Time64(TimeUnit::Microsecond),
    DataType::Timestamp(TimeUnit::Microsecond, None),
    DataType::Timestamp(TimeUnit::Nanosecond, None),
    DataType::Decimal128(9, 2),
    DataType::Decimal128(18, 4),
    DataType::Utf8,
    DataType::Utf8,
    DataType::Utf8,
    DataType::Utf8,
    DataType::Binary,
    DataType::Binary,
    DataType::Decimal128(1, 0),
];

/// A column whose values and nulls follow from a few numbers.
#[derive(Debug, Clone)]
struct Recipe {
    data_type: DataType,
    seed: u64,
    /// So many different values there are, and so many times each comes before the next.
    distinct: u64,
    run: u64,
    /// So many rows of seven are null.
    nulls: u64,
    nullable: bool,
    /// A text is its characters so many times.
    long: usize,
    with_dictionary: bool,
    batches: Vec<usize>,
}

/// A number that looks like chance.
fn mixed(number: u64) -> u64 {
    let number = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    number ^ (number >> 29)
}

impl Recipe {
    fn value(&self, row: u64) -> Option<u64> {
        let is_null = mixed(self.seed ^ row) % 7 < self.nulls;
        let word = mixed(self.seed + row / self.run) % self.distinct;
        (!is_null || !self.nullable).then(|| mixed(self.seed ^ word))
    }

    fn array(&self, first: u64, rows: usize) -> ArrayRef {
        let values = (first..first + rows as u64).map(|row| self.value(row));
        let within = |most: i64| move |value: u64| (value >> 1).cast_signed() % (2 * most + 1) - most;
        let numbers = |most: i64| -> ArrayRef {
            Arc::new(values.clone().map(|value| value.map(within(most))).collect::<Int64Array>())
        };
        match &self.data_type {
            DataType::Utf8 => {
                let characters = ["", "a", "ä", "€", "\u{d7ff}", "\u{10ffff}", "z", "\u{7f}"];
                let text = |value: u64| -> String {
                    let some = value.to_le_bytes().map(|byte| characters[usize::from(byte) % 8]);
                    format!("{}{}", some.concat().repeat(self.long), some.concat())
                };
                Arc::new(values.map(|value| value.map(text)).collect::<StringArray>())
            }
            DataType::Binary => {
                let bytes = |value: u64| [&[0xff; 65][..self.long % 66], &value.to_le_bytes()].concat();
                Arc::new(values.map(|value| value.map(bytes)).collect::<BinaryArray>())
            }
            DataType::Decimal128(digits, _) => {
                let numbers = numbers(10_i64.pow(u32::from(*digits)) - 1);
                let units = cast(&numbers, &DataType::Decimal128(*digits, 0)).unwrap();
                let units = units.as_primitive::<Decimal128Type>().clone();
                Arc::new(units.with_data_type(self.data_type.clone()))
            }
            DataType::Int8 => cast(&numbers(127), &self.data_type).unwrap(),
            DataType::Int16 => cast(&numbers(32_767), &self.data_type).unwrap(),
            DataType::Int32 | DataType::Date32 | DataType::Time32(_) => {
                let numbers = cast(&numbers(i32::MAX.into()), &DataType::Int32).unwrap();
                cast(&numbers, &self.data_type).unwrap()
            }
            // A time of day, and no more.
            DataType::Time64(_) => cast(&numbers(86_399_999_999), &self.data_type).unwrap(),
            data_type => {
                let all: Int64Array = values.map(|value| value.map(u64::cast_signed)).collect();
                cast(&all, data_type).unwrap()
            }
        }
    }

    fn schema(&self) -> SchemaRef {
        Arc::new(Schema::new(vec![Field::new("a.b", self.data_type.clone(), self.nullable)]))
    }

    fn batches(&self) -> Vec<RecordBatch> {
        let mut first = 0;
        let batches = self.batches.iter().map(|rows| {
            // One that begins within another, as batches do that were cut.
            let array = self.array(first, rows + 3).slice(3, *rows);
            first += *rows as u64;
            RecordBatch::try_new(self.schema(), vec![array]).unwrap()
        });
        batches.collect()
    }
}

fn recipes() -> impl Strategy<Value = Recipe> {
    let values = (
        prop::sample::select(TYPES.to_vec()),
        any::<u32>(),
        prop::sample::select(vec![1, 2, 9, 300, 3_000_000]),
        prop::sample::select(vec![1, 5, 100, 30_000]),
    );
    let nulls = (prop::sample::select(vec![0, 0, 1, 6, 7]), any::<bool>());
    let long = prop::sample::select(vec![0, 0, 1, 8, 64, 700]);
    let batches = prop::collection::vec(0..50_000_usize, 0..5);
    (values, nulls, long, any::<bool>(), batches).prop_map(
        |((data_type, seed, distinct, run), (nulls, nullable), long, with_dictionary, batches)| Recipe {
            data_type,
            seed: seed.into(),
            distinct,
            run,
            nulls,
            nullable,
            long,
            with_dictionary,
            batches,
        },
    )
}

fn properties(recipe: &Recipe) -> WriterPropertiesPtr {
    let level = ZstdLevel::try_new(ZSTD_LEVEL).unwrap();
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(level));
    Arc::new(properties.set_dictionary_enabled(recipe.with_dictionary).build())
}

/// A file of one row group by us.
fn ours(recipe: &Recipe) -> Bytes {
    let schema = recipe.schema();
    let parquet = ArrowSchemaConverter::new().convert(&schema).unwrap();
    let column = parquet.column(0);
    let mut file =
        SerializedFileWriter::new(Vec::new(), parquet.root_schema_ptr(), properties(recipe)).unwrap();
    let mut chunk = Chunk::new(&column, schema.field(0).data_type(), recipe.with_dictionary).unwrap();
    for batch in recipe.batches() {
        chunk.write(batch.column(0)).unwrap();
    }
    let mut group = file.next_row_group().unwrap();
    let chunk = chunk.close().unwrap();
    let all = chunk.get_bytes(0, usize::try_from(chunk.len()).unwrap()).unwrap();
    assert_eq!(all.slice(3..7), chunk.get_bytes(3, 4).unwrap());
    chunk.append_to(&mut group).unwrap();
    group.close().unwrap();
    file.into_inner().unwrap().into()
}

/// And one by the library.
fn theirs(recipe: &Recipe) -> Bytes {
    let mut file = Vec::new();
    let properties = Some(WriterProperties::clone(&properties(recipe)));
    let mut writer = ArrowWriter::try_new(&mut file, recipe.schema(), properties).unwrap();
    recipe.batches().iter().for_each(|batch| writer.write(batch).unwrap());
    writer.close().unwrap();
    file.into()
}

fn metadata(file: &Bytes) -> ArrowReaderMetadata {
    let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Required);
    ArrowReaderMetadata::load(file, options).unwrap()
}

/// The first value by its order, from below or from above.
fn end(array: &ArrayRef, end: End) -> ArrayRef {
    let options = SortOptions { descending: matches!(end, End::Greatest), nulls_first: false };
    let first = sort_to_indices(array, Some(options), Some(1)).unwrap();
    take(array, &first, None).unwrap()
}

fn compare(one: &dyn Array, other: &dyn Array, at: usize) -> Ordering {
    make_comparator(one, other, SortOptions::default()).unwrap()(at, at)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    /// What is read is what was written, and the file tells of it what the library's file tells.
    #[test]
    fn what_is_written_here_is_read_as_what_the_library_writes(recipe in recipes()) {
        let whole = concat_batches(&recipe.schema(), &recipe.batches()).unwrap();
        prop_assume!(whole.num_rows() > 0);
        let file = ours(&recipe);
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file.clone(), metadata(&file));
        let read: Vec<RecordBatch> = reader.build().unwrap().map(Result::unwrap).collect();
        prop_assert_eq!(&concat_batches(&recipe.schema(), &read).unwrap(), &whole);

        let (ours, theirs) = (metadata(&file), metadata(&theirs(&recipe)));
        let column = |of: &ArrowReaderMetadata| of.metadata().row_group(0).column(0).clone();
        let (chunk, expected) = (column(&ours), column(&theirs));
        prop_assert_eq!(chunk.statistics(), expected.statistics());
        prop_assert_eq!(chunk.num_values(), expected.num_values());
        prop_assert_eq!(chunk.unencoded_byte_array_data_bytes(), expected.unencoded_byte_array_data_bytes());
        prop_assert_eq!(chunk.definition_level_histogram(), expected.definition_level_histogram());
        prop_assert_eq!(chunk.compression(), expected.compression());
        let has_dictionary = |chunk: &ColumnChunkMetaData| chunk.dictionary_page_offset().is_some();
        prop_assert_eq!(has_dictionary(&chunk), has_dictionary(&expected));

        // Of each page: its rows, and its ends.
        let index = &ours.metadata().column_index().unwrap()[0][0];
        let offsets = ours.metadata().offset_index().unwrap()[0][0].page_locations();
        let mut firsts: Vec<usize> =
            offsets.iter().map(|page| usize::try_from(page.first_row_index).unwrap()).collect();
        firsts.push(whole.num_rows());
        let groups = [0_usize];
        let converter =
            StatisticsConverter::try_new("a.b", ours.schema(), ours.parquet_schema()).unwrap();
        let pages = ours.metadata();
        let (column_index, offset_index) = (pages.column_index().unwrap(), pages.offset_index().unwrap());
        let least = converter.data_page_mins(column_index, offset_index, &groups).unwrap();
        let greatest = converter.data_page_maxes(column_index, offset_index, &groups).unwrap();
        let nulls = converter.data_page_null_counts(column_index, offset_index, &groups).unwrap();
        for (page, rows) in firsts.windows(2).enumerate() {
            prop_assert!(rows[0] < rows[1] && rows[1] - rows[0] <= PAGE_ROWS);
            let values = whole.column(0).slice(rows[0], rows[1] - rows[0]);
            prop_assert_eq!(usize::try_from(nulls.value(page)).unwrap(), values.null_count());
            if values.null_count() == values.len() {
                prop_assert!(index.is_null_page(page));
                continue;
            }
            let is_long = |value: &ArrayRef| match value.data_type() {
                DataType::Utf8 => value.as_string::<i32>().value(0).len() > STATISTIC_BYTES,
                DataType::Binary => value.as_binary::<i32>().value(0).len() > STATISTIC_BYTES,
                _ => false,
            };
            for (told, which) in [(&least, End::Least), (&greatest, End::Greatest)] {
                let (value, told) = (end(&values, which), told.slice(page, 1));
                let order = compare(&value, &told, 0);
                match which {
                    _ if !is_long(&value) => prop_assert!(order.is_eq()),
                    End::Least => prop_assert!(order.is_ge()),
                    End::Greatest => prop_assert!(order.is_le()),
                }
            }
        }
        // What is told of their order is true.
        let falls = |array: &ArrayRef, order: Ordering| {
            let valid: Vec<u64> = (0..array.len() as u64).filter(|page| array.is_valid(usize::try_from(*page).unwrap())).collect();
            let array = take(array, &arrow::array::UInt64Array::from(valid), None).unwrap();
            (1..array.len()).any(|page| compare(&array.slice(page - 1, 1), &array.slice(page, 1), 0) == order)
        };
        match index.get_boundary_order() {
            Some(BoundaryOrder::ASCENDING) => prop_assert!(!falls(&least, Ordering::Greater) && !falls(&greatest, Ordering::Greater)),
            Some(BoundaryOrder::DESCENDING) => prop_assert!(!falls(&least, Ordering::Less) && !falls(&greatest, Ordering::Less)),
            _ => prop_assert!(offsets.len() > 1),
        }
    }
}

/// A long text is told by a shorter one that is not greater, or not less.
#[test]
fn the_ends_of_long_texts_are_told_by_short_ones() {
    let (texts, bytes) = (Texts::new(true, false), Texts::new(false, false));
    let told = |values: &Texts, value: &[u8]| {
        [End::Least, End::Greatest].map(|end| {
            let (told, is_exact) = values.shown(value, end);
            assert_eq!(is_exact, told == value);
            told
        })
    };
    let short = "a".repeat(64);
    assert_eq!(told(&texts, short.as_bytes()), [short.as_bytes(), short.as_bytes()]);
    assert_eq!(
        told(&texts, "a".repeat(65).as_bytes()),
        [short.as_bytes(), ("a".repeat(63) + "b").as_bytes()]
    );
    let wide = told(&texts, ("a".to_owned() + &"ä".repeat(40)).as_bytes());
    assert_eq!(wide[0], ("a".to_owned() + &"ä".repeat(31)).as_bytes());
    assert_eq!(wide[1], ("a".to_owned() + &"ä".repeat(30) + "å").as_bytes());
    // What cannot be raised goes, or nothing is cut.
    let last = "\u{10ffff}".repeat(20);
    assert_eq!(told(&texts, ("x".to_owned() + &last).as_bytes())[1], b"y");
    assert_eq!(told(&texts, last.as_bytes())[1], last.as_bytes());
    assert_eq!(told(&bytes, &[&[7][..], &[0xff; 70]].concat()), [[&[7][..], &[0xff; 63]].concat(), vec![8]]);
    assert_eq!(told(&bytes, &[0xff; 70])[1], [0xff; 70]);
}

/// A decimal of more digits than its column is refused, and not cut; what stands under a null is nobody's.
#[test]
fn a_decimal_that_does_not_fit_is_refused() {
    let decimal = |valid: bool| -> ArrayRef {
        let nulls = NullBuffer::from(vec![true, valid]);
        let values = vec![5_i128, i128::from(i64::MAX) + 1];
        let array = arrow::array::Decimal128Array::new(values.into(), Some(nulls));
        Arc::new(array.with_precision_and_scale(15, 2).unwrap())
    };
    let field = Field::new("a", DataType::Decimal128(15, 2), true);
    let parquet = ArrowSchemaConverter::new().convert(&Schema::new(vec![field])).unwrap();
    let chunk = || Chunk::new(&parquet.column(0), &DataType::Decimal128(15, 2), true).unwrap();
    let error = chunk().write(&decimal(true)).unwrap_err();
    assert!(error.to_string().contains("more digits than its column"), "{error}");
    chunk().write(&decimal(false)).unwrap();
}

/// A null where there may be none is refused.
#[test]
fn a_null_without_a_place_is_refused() {
    let field = Field::new("a", DataType::Int64, false);
    let parquet = ArrowSchemaConverter::new().convert(&Schema::new(vec![field])).unwrap();
    let mut chunk = Chunk::new(&parquet.column(0), &DataType::Int64, true).unwrap();
    let error = chunk.write(&Int64Array::from(vec![Some(1), None])).unwrap_err();
    assert!(error.to_string().contains("has a null and no place for one"), "{error}");
}
