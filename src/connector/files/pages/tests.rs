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
    array::{
        ArrayRef, AsArray, BinaryArray, Decimal128Array, Int64Array, RecordBatch, StringArray, make_array,
        make_comparator,
    },
    compute::{SortOptions, cast, concat_batches, sort_to_indices, take},
    datatypes::{Decimal128Type, Field, Schema, SchemaRef, TimeUnit},
};
use proptest::prelude::*;

use super::{bits::put_bits, numbers::NumberWords, places::hash_of, texts::STATISTIC_BYTES, *};

const TYPES: [DataType; 25] = [
    DataType::Int8,
    DataType::Int16,
    DataType::Int32,
    DataType::Int64,
    DataType::Date32,
    DataType::Time32(TimeUnit::Millisecond),
    DataType::Time32(TimeUnit::Second),
    DataType::Time64(TimeUnit::Nanosecond),
    DataType::Timestamp(TimeUnit::Second, None),
    DataType::Timestamp(TimeUnit::Millisecond, None),
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
    DataType::Decimal128(19, 2),
    DataType::Decimal128(33, 4),
    DataType::Decimal128(38, 10),
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
    fn value(&self, row: u64) -> u64 {
        mixed(self.seed ^ (mixed(self.seed + row / self.run) % self.distinct))
    }

    fn array(&self, first: u64, rows: usize) -> ArrayRef {
        let all = self.values(first, rows);
        if !self.nullable {
            return all;
        }
        // A null hides a value as any other.
        let valid = (first..first + rows as u64).map(|row| mixed(self.seed ^ row) % 7 >= self.nulls);
        let nulls = NullBuffer::from(valid.collect::<Vec<bool>>());
        make_array(all.to_data().into_builder().nulls(Some(nulls)).build().unwrap())
    }

    fn values(&self, first: u64, rows: usize) -> ArrayRef {
        let values = (first..first + rows as u64).map(|row| self.value(row));
        let within = |most: i64| move |value: u64| (value >> 1).cast_signed() % (2 * most + 1) - most;
        let numbers =
            |most: i64| -> ArrayRef { Arc::new(values.clone().map(within(most)).collect::<Int64Array>()) };
        match &self.data_type {
            DataType::Utf8 => {
                let characters = ["", "a", "ä", "€", "\u{d7ff}", "\u{10ffff}", "z", "\u{7f}"];
                let text = |value: u64| -> String {
                    let some = value.to_le_bytes().map(|byte| characters[usize::from(byte) % 8]);
                    format!("{}{}", some.concat().repeat(self.long), some.concat())
                };
                Arc::new(StringArray::from_iter_values(values.map(text)))
            }
            DataType::Binary => {
                let bytes = |value: u64| [&[0xff; 65][..self.long % 66], &value.to_le_bytes()].concat();
                Arc::new(BinaryArray::from_iter_values(values.map(bytes)))
            }
            DataType::Decimal128(digits @ 19.., _) => {
                // Of all sizes, some of which are near.
                let most = 10_i128.pow(u32::from(*digits)) - 1;
                let units = values.map(|value| {
                    let units = i128::from(mixed(value)) << 63 | i128::from(value);
                    (if value % 3 == 0 { units % most } else { units % 1_000 })
                        * if value % 2 == 0 { 1 } else { -1 }
                });
                Arc::new(units.collect::<Decimal128Array>().with_data_type(self.data_type.clone()))
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
                let all: Int64Array = values.map(u64::cast_signed).collect();
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
    let batches = prop::collection::vec(0..30_000_usize, 0..5);
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
            // So many that they fit into memory.
            batches: batches.iter().map(|rows| rows / (1 + long / 4)).collect(),
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
        let read = concat_batches(&read[0].schema(), &read).unwrap();
        // Seconds are whole numbers to Parquet.
        prop_assert_eq!(&cast(read.column(0), &recipe.data_type).unwrap(), whole.column(0));

        let (ours, theirs) = (metadata(&file), metadata(&theirs(&recipe)));
        let column = |of: &ArrowReaderMetadata| of.metadata().row_group(0).column(0).clone();
        let (chunk, expected) = (column(&ours), column(&theirs));
        let (told, expected_ends) = (chunk.statistics().unwrap(), expected.statistics().unwrap());
        if expected_ends.min_is_exact() && expected_ends.max_is_exact() || whole.column(0).null_count() == whole.num_rows() {
            prop_assert_eq!(told, expected_ends);
        } else {
            // Of long texts the page's ends are cut, and the chunk's are of these: as good, and not always as close.
            prop_assert_eq!(told.null_count_opt(), expected_ends.null_count_opt());
            let bytes = |which| match end(whole.column(0), which).as_string_opt::<i32>() {
                Some(texts) => texts.value(0).as_bytes().to_vec(),
                None => end(whole.column(0), which).as_binary::<i32>().value(0).to_vec(),
            };
            let (least, greatest) = (bytes(End::Least), bytes(End::Greatest));
            prop_assert!(told.min_bytes_opt().unwrap() <= &least[..] && told.max_bytes_opt().unwrap() >= &greatest[..]);
            prop_assert_eq!(told.min_is_exact(), told.min_bytes_opt().unwrap() == &least[..]);
            prop_assert_eq!(told.max_is_exact(), told.max_bytes_opt().unwrap() == &greatest[..]);
            prop_assert!(told.min_bytes_opt().unwrap().len() <= STATISTIC_BYTES);
        }
        prop_assert_eq!(chunk.num_values(), expected.num_values());
        prop_assert_eq!(chunk.unencoded_byte_array_data_bytes(), expected.unencoded_byte_array_data_bytes());
        prop_assert_eq!(chunk.definition_level_histogram(), expected.definition_level_histogram());
        prop_assert_eq!(chunk.compression(), expected.compression());
        let has_dictionary = |chunk: &ColumnChunkMetaData| chunk.dictionary_page_offset().is_some();
        // Of long decimals the library has one only in the second version of the format.
        let is_long = matches!(recipe.data_type, DataType::Decimal128(19.., _));
        let expected = if is_long { recipe.with_dictionary } else { has_dictionary(&expected) };
        prop_assert_eq!(has_dictionary(&chunk), expected);

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
        let typed = |ends: ArrayRef| cast(&ends, &recipe.data_type).unwrap();
        let least = typed(converter.data_page_mins(column_index, offset_index, &groups).unwrap());
        let greatest = typed(converter.data_page_maxes(column_index, offset_index, &groups).unwrap());
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
            let told = values.told(value, end);
            assert_eq!(told.is_exact, told.value == value);
            told.value
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

/// Values of another type than the column's are refused: an amount of another scale would be another amount.
#[test]
fn values_of_another_type_are_refused() {
    let field = Field::new("a", DataType::Decimal128(15, 2), true);
    let parquet = ArrowSchemaConverter::new().convert(&Schema::new(vec![field])).unwrap();
    let amounts = |scale| Decimal128Array::from(vec![5]).with_precision_and_scale(15, scale).unwrap();
    let mut chunk = Chunk::new(&parquet.column(0), &DataType::Decimal128(15, 2), true).unwrap();
    chunk.write(&amounts(2)).unwrap();
    let error = chunk.write(&amounts(4)).unwrap_err();
    assert!(
        error.to_string().contains("is of type Decimal128(15, 2), and its values of Decimal128(15, 4)"),
        "{error}"
    );
}

/// A text that is longer than a page is alone in one, and nothing of it stays behind.
#[test]
fn a_long_text_has_a_page_of_its_own() {
    let recipe = Recipe {
        data_type: DataType::Utf8,
        seed: 7,
        distinct: 3_000_000,
        run: 1,
        nulls: 1,
        nullable: true,
        long: 200_000,
        with_dictionary: true,
        batches: vec![5, 1, 6],
    };
    for with_dictionary in [true, false] {
        let recipe = Recipe { with_dictionary, ..recipe.clone() };
        let file = ours(&recipe);
        let read = ParquetRecordBatchReaderBuilder::new_with_metadata(file.clone(), metadata(&file))
            .build()
            .unwrap();
        let read: Vec<RecordBatch> = read.map(Result::unwrap).collect();
        let all = |batches: &[RecordBatch]| concat_batches(&recipe.schema(), batches).unwrap();
        assert_eq!(all(&read), all(&recipe.batches()));
        let index = metadata(&file);
        let pages = index.metadata().offset_index().unwrap()[0][0].page_locations().len();
        assert!(pages > 6, "{pages}");
    }
    WORKBENCH.with_borrow(|bench| {
        let bench = bench.as_ref().unwrap();
        assert!(bench.page.capacity() <= 2 * PAGE_BYTES && bench.compressed.capacity() <= 2 * PAGE_BYTES);
    });
}

/// Of a dictionary that holds nearly every value there is no other.
#[test]
fn a_dictionary_of_nearly_all_values_is_not_begun_again() {
    let recipe = |distinct| Recipe {
        data_type: DataType::Int32,
        seed: 1,
        distinct,
        run: 1,
        nulls: 0,
        nullable: false,
        long: 0,
        with_dictionary: true,
        batches: vec![40_000],
    };
    for (distinct, has_many) in [(9, false), (10_000, false), (3_000_000, true)] {
        let recipe = recipe(distinct);
        let parquet = ArrowSchemaConverter::new().convert(&recipe.schema()).unwrap();
        let mut chunk = Chunk::new(&parquet.column(0), &DataType::Int32, true).unwrap();
        chunk.write(recipe.batches()[0].column(0)).unwrap();
        assert_eq!(chunk.close().unwrap().has_many, has_many, "{distinct}");
    }
}

/// Numbers of any width are packed one behind the other, the lowest bit first.
#[test]
fn numbers_are_packed_bit_by_bit() {
    for width in 0..=64_u32 {
        for count in [0, 1, 7, 8, 31, 32] {
            let of = |at: u64| mixed(at).checked_shr(64 - width).unwrap_or_default();
            let mut packed = vec![9];
            put_bits((0..count).map(of), 32, width, &mut packed);
            let bit = |at: u64| {
                at / u64::from(width) < count && of(at / u64::from(width)) >> (at % u64::from(width)) & 1 == 1
            };
            let expected = (0..u64::from(width) * 4)
                .map(|byte| (0..8).fold(0, |all, at| all | u8::from(bit(byte * 8 + at)) << at));
            assert!(packed[1..].iter().copied().eq(expected), "{width} bits, {count} numbers");
        }
    }
}

/// A word has its number wherever it lies, also at the ends of its type, and of 64 bits where it has more.
#[test]
fn words_keep_their_numbers() {
    let keep = |words: &[i128]| {
        let mut dictionary = NumberWords::new();
        let mut known: Vec<i128> = Vec::new();
        for word in words.iter().chain(words) {
            let number = known.iter().position(|known| known == word).unwrap_or(known.len());
            if number == known.len() {
                known.push(*word);
            }
            assert_eq!(dictionary.number_of(*word) as usize, number, "{word}");
        }
    };
    let last = i128::from(i64::MAX);
    keep(&[5, last, last + 1, -last, i128::MAX, i128::MIN, 6]);
    keep(&[last + 1, 5, last - 1, 1 << 64, (1 << 64) + 5]);
    let near = (-300..300).chain([-70_000, 70_000, 5]);
    let ends = [i64::MAX, i64::MAX - 3, i64::MAX - 60_000, i64::MIN, i64::MIN + 1, 0];
    for words in
        [near.collect::<Vec<i64>>(), ends.to_vec(), vec![i64::MIN, i64::MIN + 9, i64::MIN + 50_000, i64::MAX]]
    {
        let mut dictionary = NumberWords::new();
        let mut known: Vec<i64> = Vec::new();
        for word in words.iter().chain(&words) {
            let number = known.iter().position(|known| known == word).unwrap_or(known.len());
            if number == known.len() {
                known.push(*word);
            }
            assert_eq!(dictionary.number_of(*word) as usize, number, "{word}");
        }
    }
}

/// Texts whose hashes would be alike if one half of them were multiplied by what is known beforehand.
#[test]
fn texts_cannot_be_chosen_to_lie_at_one_place() {
    let last = (1_u64 << 63 | 1 << 39) ^ 0x9E37_79B9_7F4A_7C15;
    let mut places: Vec<u64> = (0..10_000_u64).map(|word| hash_of(word << 25, last) >> 48).collect();
    places.sort_unstable();
    places.dedup();
    assert!(places.len() > 5_000, "{}", places.len());
}

/// A decimal of more digits than its column is refused, and not cut; what stands under a null is nobody's.
#[test]
fn a_decimal_that_does_not_fit_is_refused() {
    // The first of eight bytes, and of nine, that do not hold it.
    for (digits, wide) in [(15, 1_i128 << 63), (15, (-1_i128 << 63) - 1), (20, 1 << 71), (20, (-1 << 71) - 1)]
    {
        let decimal = |valid: bool| -> ArrayRef {
            let nulls = NullBuffer::from(vec![true, valid]);
            let array = Decimal128Array::new(vec![5_i128, wide].into(), Some(nulls));
            Arc::new(array.with_precision_and_scale(digits, 2).unwrap())
        };
        let data_type = DataType::Decimal128(digits, 2);
        let field = Field::new("a", data_type.clone(), true);
        let parquet = ArrowSchemaConverter::new().convert(&Schema::new(vec![field])).unwrap();
        let chunk = || Chunk::new(&parquet.column(0), &data_type, true).unwrap();
        let error = chunk().write(&decimal(true)).unwrap_err();
        assert!(error.to_string().contains("more digits than its column"), "{error}");
        chunk().write(&decimal(false)).unwrap();
    }
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
