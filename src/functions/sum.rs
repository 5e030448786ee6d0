//! `sum` and `avg` that cannot wrap.
//!
//! Whole numbers and decimals are added in 256 bits. `sum` gives `decimal(38, s)` with the argument's scale, and
//! `decimal(38, 0)` for whole numbers; a sum of more than 38 digits is an error. `avg` gives six more decimals than its
//! argument, rounded half away from zero. Floats stay floats.

use std::sync::Arc;

use arrow::{
    array::{
        Array, ArrayRef, ArrowPrimitiveType, AsArray, BooleanArray, Decimal128Array, Decimal256Array,
        PrimitiveArray, UInt64Array,
    },
    datatypes::{
        DataType, Decimal128Type, Decimal256Type, Field, FieldRef, Float64Type, Int64Type, UInt64Type, i256,
    },
};
use datafusion::{
    common::Result as DataFusionResult,
    error::DataFusionError,
    logical_expr::{
        Accumulator, AggregateUDF, AggregateUDFImpl, EmitTo, GroupsAccumulator, Signature, Volatility,
        function::{AccumulatorArgs, StateFieldsArgs},
        utils::AggregateOrderSensitivity,
    },
    scalar::ScalarValue,
};

use crate::error::Error;

/// Decimals that `avg` adds to its argument's.
const AVG_DECIMALS: i8 = 6;

/// `sum` or `avg`.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct ExactSum {
    average: bool,
    signature: Signature,
}

impl ExactSum {
    /// `sum(x)`.
    pub fn sum() -> AggregateUDF {
        Self { average: false, signature: Signature::user_defined(Volatility::Immutable) }.into()
    }

    /// `avg(x)`.
    pub fn avg() -> AggregateUDF {
        Self { average: true, signature: Signature::user_defined(Volatility::Immutable) }.into()
    }

    fn of(&self, argument: Option<&DataType>) -> Of {
        Of { average: self.average, scale: argument.map_or(0, scale_of) }
    }
}

fn scale_of(data_type: &DataType) -> i8 {
    match data_type {
        DataType::Decimal128(_, scale) => *scale,
        _ => 0,
    }
}

impl AggregateUDFImpl for ExactSum {
    fn name(&self) -> &'static str {
        if self.average { "avg" } else { "sum" }
    }

    fn aliases(&self) -> &[String] {
        static MEAN: std::sync::LazyLock<Vec<String>> = std::sync::LazyLock::new(|| vec!["mean".to_owned()]);
        if self.average { &MEAN } else { &[] }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> DataFusionResult<Vec<DataType>> {
        let [argument] = types else {
            return Err(Error::configuration(format!("`{}` takes one argument", self.name())).into());
        };
        Ok(vec![match argument {
            DataType::UInt64 => DataType::Decimal128(20, 0),
            integer if integer.is_integer() => DataType::Int64,
            DataType::Null => DataType::Int64,
            DataType::Decimal32(precision, scale)
            | DataType::Decimal64(precision, scale)
            | DataType::Decimal128(precision, scale) => DataType::Decimal128(*precision, *scale),
            DataType::Float16 | DataType::Float32 | DataType::Float64 => DataType::Float64,
            other => {
                let text =
                    format!("`{}` adds numbers, and this is {}", self.name(), crate::types::describe(other));
                return Err(DataFusionError::Plan(text));
            }
        }])
    }

    fn return_type(&self, types: &[DataType]) -> DataFusionResult<DataType> {
        Ok(match types.first() {
            Some(DataType::Float64) => DataType::Float64,
            Some(argument) if self.average => {
                DataType::Decimal128(38, scale_of(argument).saturating_add(AVG_DECIMALS).min(38))
            }
            Some(argument) => DataType::Decimal128(38, scale_of(argument)),
            None => return Err(Error::bug("sum without an argument").into()),
        })
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> DataFusionResult<Box<dyn Accumulator>> {
        if args.is_distinct {
            return Err(DataFusionError::Plan(format!(
                "`{}(distinct …)` beside other aggregates is not there; select the distinct values first",
                self.name()
            )));
        }
        let argument = args.expr_fields.first().map(|field| field.data_type().clone());
        Ok(match argument {
            Some(DataType::Float64) => Box::new(FloatSum { average: self.average, sum: 0.0, count: 0 }),
            argument => Box::new(Sum { of: self.of(argument.as_ref()), sum: i256::ZERO, count: 0 }),
        })
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs<'_>) -> bool {
        let floats = |field: &FieldRef| field.data_type().is_floating();
        !args.is_distinct && !args.expr_fields.iter().any(floats)
    }

    fn create_groups_accumulator(
        &self,
        args: AccumulatorArgs<'_>,
    ) -> DataFusionResult<Box<dyn GroupsAccumulator>> {
        let argument = args.expr_fields.first().map(|field| field.data_type());
        Ok(Box::new(Sums { of: self.of(argument), sums: Vec::new(), counts: Vec::new() }))
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> DataFusionResult<Vec<FieldRef>> {
        let argument = args.input_fields.first().map(|field| field.data_type().clone());
        let sum = match argument {
            Some(DataType::Float64) => DataType::Float64,
            argument => DataType::Decimal256(76, argument.as_ref().map_or(0, scale_of)),
        };
        Ok(vec![
            Arc::new(Field::new(format!("{}[sum]", args.name), sum, true)),
            Arc::new(Field::new(format!("{}[count]", args.name), DataType::UInt64, true)),
        ])
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }
}

/// What is made of exact numbers: their sum or their average, of so many decimals.
#[derive(Debug, Clone, Copy)]
struct Of {
    average: bool,
    scale: i8,
}

impl Of {
    /// The decimals of the result.
    fn decimals(self) -> i8 {
        if self.average { self.scale.saturating_add(AVG_DECIMALS).min(38) } else { self.scale }
    }

    /// The result; null of nothing.
    fn result(self, sum: i256, count: u64) -> DataFusionResult<Option<i128>> {
        if count == 0 {
            return Ok(None);
        }
        let mut value = sum;
        if self.average {
            for _ in self.scale..self.decimals() {
                value = value.wrapping_mul(i256::from_i128(10));
            }
            let count = i256::from_i128(i128::from(count));
            let (quotient, rest) = (value.wrapping_div(count), value.wrapping_rem(count));
            let twice = rest.wrapping_abs().wrapping_mul(i256::from_i128(2));
            let away = if value < i256::ZERO { i256::MINUS_ONE } else { i256::ONE };
            value = if twice >= count { quotient.wrapping_add(away) } else { quotient };
        }
        let fits = value.to_i128().filter(|value| value.unsigned_abs() < 10_u128.pow(38));
        fits.map(Some).ok_or_else(|| Error::data("a sum has more than 38 digits").into())
    }
}

/// A sum of exact numbers. 2^127 rows of the largest decimal are needed to wrap 256 bits.
#[derive(Debug)]
struct Sum {
    of: Of,
    sum: i256,
    count: u64,
}

/// The exact numbers of an array, each with the number of its row.
fn each(array: &ArrayRef, mut take: impl FnMut(usize, i128)) -> DataFusionResult<()> {
    match array.data_type() {
        DataType::Int64 => each_of(array.as_primitive::<Int64Type>(), |row, value| take(row, value.into())),
        DataType::Decimal128(..) => each_of(array.as_primitive::<Decimal128Type>(), take),
        other => return Err(Error::bug(format!("an exact sum of {other}")).into()),
    }
    Ok(())
}

fn each_of<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>, mut take: impl FnMut(usize, T::Native)) {
    let values = array.values().iter().copied().enumerate();
    match array.nulls() {
        None => values.for_each(|(row, value)| take(row, value)),
        Some(nulls) => {
            values.zip(nulls).filter(|(_, there)| *there).for_each(|((row, value), _)| take(row, value));
        }
    }
}

impl Accumulator for Sum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> DataFusionResult<()> {
        let Some(array) = values.first() else { return Ok(()) };
        each(array, |_, value| {
            self.sum = self.sum.wrapping_add(i256::from_i128(value));
            self.count += 1;
        })
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> DataFusionResult<()> {
        let Some(array) = values.first() else { return Ok(()) };
        each(array, |_, value| {
            self.sum = self.sum.wrapping_sub(i256::from_i128(value));
            self.count -= 1;
        })
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }

    fn state(&mut self) -> DataFusionResult<Vec<ScalarValue>> {
        Ok(vec![
            ScalarValue::Decimal256(Some(self.sum), 76, self.of.scale),
            ScalarValue::UInt64(Some(self.count)),
        ])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> DataFusionResult<()> {
        if let [sums, counts] = states {
            for sum in sums.as_primitive::<Decimal256Type>().iter().flatten() {
                self.sum = self.sum.wrapping_add(sum);
            }
            self.count += counts.as_primitive::<UInt64Type>().iter().flatten().sum::<u64>();
        }
        Ok(())
    }

    fn evaluate(&mut self) -> DataFusionResult<ScalarValue> {
        Ok(ScalarValue::Decimal128(self.of.result(self.sum, self.count)?, 38, self.of.decimals()))
    }

    fn size(&self) -> usize {
        size_of_val(self)
    }
}

/// Sums of exact numbers, one a group.
#[derive(Debug)]
struct Sums {
    of: Of,
    sums: Vec<i256>,
    counts: Vec<u64>,
}

impl Sums {
    fn add(&mut self, group: Option<&usize>, sum: i256, count: u64) {
        let Some(&group) = group else { return };
        if let (Some(total), Some(counted)) = (self.sums.get_mut(group), self.counts.get_mut(group)) {
            *total = total.wrapping_add(sum);
            *counted += count;
        }
    }

    fn resize(&mut self, groups: usize) {
        self.sums.resize(groups, i256::ZERO);
        self.counts.resize(groups, 0);
    }

    fn states(&self, sums: Vec<i256>, counts: Vec<u64>) -> DataFusionResult<Vec<ArrayRef>> {
        let sums = Decimal256Array::from(sums).with_precision_and_scale(76, self.of.scale)?;
        Ok(vec![Arc::new(sums), Arc::new(UInt64Array::from(counts))])
    }
}

/// Whether a row is of those that are wanted.
fn wants(filter: Option<&BooleanArray>, row: usize) -> bool {
    filter.is_none_or(|wanted| wanted.is_valid(row) && wanted.value(row))
}

impl GroupsAccumulator for Sums {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        count: usize,
    ) -> DataFusionResult<()> {
        self.resize(count);
        let Some(array) = values.first() else { return Ok(()) };
        each(array, |row, value| {
            if wants(filter, row) {
                self.add(groups.get(row), i256::from_i128(value), 1);
            }
        })
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], count: usize) -> DataFusionResult<()> {
        self.resize(count);
        if let [sums, counts] = states {
            let sums = sums.as_primitive::<Decimal256Type>().values().iter();
            let counts = counts.as_primitive::<UInt64Type>().values().iter();
            for ((sum, count), group) in sums.zip(counts).zip(groups) {
                self.add(Some(group), *sum, *count);
            }
        }
        Ok(())
    }

    fn convert_to_state(
        &self,
        values: &[ArrayRef],
        filter: Option<&BooleanArray>,
    ) -> DataFusionResult<Vec<ArrayRef>> {
        let Some(array) = values.first() else { return Err(Error::bug("sum without an argument").into()) };
        let mut rows = Self { of: self.of, sums: Vec::new(), counts: Vec::new() };
        rows.resize(array.len());
        each(array, |row, value| {
            if wants(filter, row) {
                rows.add(Some(&row), i256::from_i128(value), 1);
            }
        })?;
        self.states(rows.sums, rows.counts)
    }

    fn state(&mut self, emit: EmitTo) -> DataFusionResult<Vec<ArrayRef>> {
        let (sums, counts) = (emit.take_needed(&mut self.sums), emit.take_needed(&mut self.counts));
        self.states(sums, counts)
    }

    fn evaluate(&mut self, emit: EmitTo) -> DataFusionResult<ArrayRef> {
        let (sums, counts) = (emit.take_needed(&mut self.sums), emit.take_needed(&mut self.counts));
        let results = sums.into_iter().zip(counts).map(|(sum, count)| self.of.result(sum, count));
        let results: Decimal128Array = results.collect::<DataFusionResult<_>>()?;
        Ok(Arc::new(results.with_precision_and_scale(38, self.of.decimals())?))
    }

    fn size(&self) -> usize {
        self.sums.capacity() * size_of::<i256>() + self.counts.capacity() * size_of::<u64>()
    }
}

/// A sum of floats.
#[derive(Debug)]
struct FloatSum {
    average: bool,
    sum: f64,
    count: u64,
}

impl Accumulator for FloatSum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> DataFusionResult<()> {
        let Some(array) = values.first() else { return Ok(()) };
        for value in array.as_primitive::<Float64Type>().iter().flatten() {
            self.sum += value;
        }
        self.count += (array.len() - array.null_count()) as u64;
        Ok(())
    }

    fn state(&mut self) -> DataFusionResult<Vec<ScalarValue>> {
        Ok(vec![ScalarValue::Float64(Some(self.sum)), ScalarValue::UInt64(Some(self.count))])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> DataFusionResult<()> {
        if let [sums, counts] = states {
            self.sum += sums.as_primitive::<Float64Type>().iter().flatten().sum::<f64>();
            self.count += counts.as_primitive::<UInt64Type>().iter().flatten().sum::<u64>();
        }
        Ok(())
    }

    fn evaluate(&mut self) -> DataFusionResult<ScalarValue> {
        #[expect(clippy::cast_precision_loss, reason = "an average of floats is a float")]
        let value = if self.average { self.sum / self.count as f64 } else { self.sum };
        Ok(ScalarValue::Float64((self.count > 0).then_some(value)))
    }

    fn size(&self) -> usize {
        size_of_val(self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use arrow::{array::Int64Array, record_batch::RecordBatch};
    use datafusion::{
        common::assert_contains,
        datasource::MemTable,
        prelude::{SessionConfig, SessionContext},
    };
    use proptest::prelude::*;

    use super::*;

    type Row = (i64, Option<i128>, Option<i64>);

    /// Rows of a group, an amount of 38 digits and a whole number, either of which may be missing.
    fn rows() -> impl Strategy<Value = Vec<Row>> {
        let most = 10_i128.pow(38) - 1;
        let amount = proptest::option::weighted(0.9, -most / 200..=most / 200);
        proptest::collection::vec((0_i64..20, amount, proptest::option::weighted(0.9, any::<i64>())), 0..200)
    }

    fn batch(rows: &[Row]) -> RecordBatch {
        let amounts: Decimal128Array = rows.iter().map(|row| row.1).collect();
        RecordBatch::try_from_iter_with_nullable([
            ("g", Arc::new(rows.iter().map(|row| row.0).collect::<Int64Array>()) as ArrayRef, true),
            ("amount", Arc::new(amounts.with_precision_and_scale(38, 2).unwrap()), true),
            ("number", Arc::new(rows.iter().map(|row| row.2).collect::<Int64Array>()), true),
        ])
        .unwrap()
    }

    /// The columns `sql` gives, of one batch after the other, a partition each.
    fn asked(
        sql: &str,
        batches: Vec<RecordBatch>,
        config: SessionConfig,
    ) -> DataFusionResult<Vec<RecordBatch>> {
        let context = SessionContext::new_with_config(config);
        context.register_udaf(ExactSum::sum());
        context.register_udaf(ExactSum::avg());
        let schema = batches.first().unwrap().schema();
        let parts = batches.into_iter().map(|batch| vec![batch]).collect();
        context.register_table("t", Arc::new(MemTable::try_new(schema, parts)?))?;
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async { context.sql(sql).await?.collect().await })
    }

    /// `sum(amount)`, `avg(amount)`, `sum(number)`, and `sum(amount)` of rows with a positive number.
    type Sums = [Option<i128>; 4];

    fn expected(rows: &[Row]) -> BTreeMap<i64, Sums> {
        let mut groups: BTreeMap<i64, Vec<&Row>> = BTreeMap::new();
        rows.iter().for_each(|row| groups.entry(row.0).or_default().push(row));
        let total = |values: Vec<i128>| (!values.is_empty()).then(|| values.into_iter().sum::<i128>());
        let of = |rows: Vec<&Row>| {
            let amounts: Vec<i128> = rows.iter().filter_map(|row| row.1).collect();
            let (count, sum) = (amounts.len() as i128, total(amounts));
            let average = sum.map(|sum| {
                let wide = i256::from_i128(sum).wrapping_mul(i256::from_i128(1_000_000));
                let count = i256::from_i128(count);
                let (down, rest) = (wide.wrapping_div(count), wide.wrapping_rem(count).wrapping_abs());
                let up = rest.wrapping_add(rest) >= count;
                let away = i256::from_i128(if !up {
                    0
                } else if sum < 0 {
                    -1
                } else {
                    1
                });
                down.wrapping_add(away).to_i128().unwrap()
            });
            let numbers = rows.iter().filter_map(|row| row.2.map(i128::from)).collect();
            let positive = rows.iter().filter(|row| row.2.is_some_and(|number| number > 0));
            [sum, average, total(numbers), total(positive.filter_map(|row| row.1).collect())]
        };
        groups.into_iter().map(|(group, rows)| (group, of(rows))).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn groups_are_summed_as_one_is(rows in rows(), split in 0_usize..200, skips in any::<bool>()) {
            // An average has six decimals more, and must fit.
            let small = |row: &Row| (row.0, row.1.map(|amount| amount / 10_i128.pow(6)), row.2);
            let rows: Vec<Row> = rows.iter().map(small).collect();
            let (first, second) = rows.split_at(split.min(rows.len()));
            let mut config = SessionConfig::new().with_target_partitions(2).with_batch_size(16);
            if skips {
                // Rows that hardly meet are handed on as states of one row.
                let options = &mut config.options_mut().execution;
                options.skip_partial_aggregation_probe_rows_threshold = 1;
                options.skip_partial_aggregation_probe_ratio_threshold = 0.0;
            }
            let sql = "SELECT g, sum(amount), avg(amount), sum(number), sum(amount) FILTER (WHERE number > 0) \
                       FROM t GROUP BY g";
            let mut found = BTreeMap::new();
            for batch in asked(sql, vec![batch(first), batch(second)], config).unwrap() {
                for row in 0..batch.num_rows() {
                    let value = |column: usize| {
                        let values = batch.column(column).as_primitive::<Decimal128Type>();
                        values.is_valid(row).then(|| values.value(row))
                    };
                    let group = batch.column(0).as_primitive::<Int64Type>().value(row);
                    found.insert(group, [value(1), value(2), value(3), value(4)]);
                }
            }
            prop_assert_eq!(found, expected(&rows));
        }
    }

    #[test]
    fn a_group_of_too_many_digits_is_an_error_and_one_that_comes_back_is_not() {
        let most = 10_i128.pow(38) - 1;
        let all = |values: &[i128]| batch(&values.iter().map(|v| (1, Some(*v), None)).collect::<Vec<_>>());
        let sql = "SELECT g, sum(amount) FROM t GROUP BY g";
        let back = asked(sql, vec![all(&[most, most, most, -most]), all(&[-most])], SessionConfig::new());
        let back = back.unwrap();
        let sum = back.iter().find(|batch| batch.num_rows() > 0).unwrap().column(1);
        assert_eq!(sum.as_primitive::<Decimal128Type>().value(0), most);
        let Err(error) = asked(sql, vec![all(&[most]), all(&[1])], SessionConfig::new()) else {
            panic!("a sum of 39 digits was let pass");
        };
        assert_contains!(error.to_string(), "a sum has more than 38 digits");
    }
}
