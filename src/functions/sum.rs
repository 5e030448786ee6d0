//! `sum` and `avg` that cannot wrap.
//!
//! Whole numbers and decimals are added in 256 bits. `sum` gives `decimal(38, s)` with the argument's scale, and
//! `decimal(38, 0)` for whole numbers; a sum of more than 38 digits is an error. `avg` gives six more decimals than its
//! argument, rounded half away from zero. Floats stay floats.

use std::sync::Arc;

use arrow::{
    array::{Array, ArrayRef, AsArray},
    datatypes::{
        DataType, Decimal128Type, Decimal256Type, Field, FieldRef, Float64Type, Int64Type, UInt64Type, i256,
    },
};
use datafusion::{
    common::Result as DataFusionResult,
    error::DataFusionError,
    logical_expr::{
        Accumulator, AggregateUDF, AggregateUDFImpl, Signature, Volatility,
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
            argument => Box::new(Sum {
                average: self.average,
                scale: argument.as_ref().map_or(0, scale_of),
                sum: i256::ZERO,
                count: 0,
            }),
        })
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

/// A sum of exact numbers.
#[derive(Debug)]
struct Sum {
    average: bool,
    scale: i8,
    sum: i256,
    count: u64,
}

impl Sum {
    fn each(array: &ArrayRef, mut take: impl FnMut(i128)) -> DataFusionResult<()> {
        match array.data_type() {
            DataType::Int64 => {
                array.as_primitive::<Int64Type>().iter().flatten().for_each(|value| take(value.into()));
            }
            DataType::Decimal128(..) => {
                array.as_primitive::<Decimal128Type>().iter().flatten().for_each(take);
            }
            other => return Err(Error::bug(format!("an exact sum of {other}")).into()),
        }
        Ok(())
    }
}

impl Accumulator for Sum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> DataFusionResult<()> {
        // 2^127 rows of the largest decimal are needed to wrap 256 bits.
        let Some(array) = values.first() else { return Ok(()) };
        Self::each(array, |value| {
            self.sum = self.sum.wrapping_add(i256::from_i128(value));
            self.count += 1;
        })
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> DataFusionResult<()> {
        let Some(array) = values.first() else { return Ok(()) };
        Self::each(array, |value| {
            self.sum = self.sum.wrapping_sub(i256::from_i128(value));
            self.count -= 1;
        })
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }

    fn state(&mut self) -> DataFusionResult<Vec<ScalarValue>> {
        Ok(vec![
            ScalarValue::Decimal256(Some(self.sum), 76, self.scale),
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
        let scale = if self.average { self.scale.saturating_add(AVG_DECIMALS).min(38) } else { self.scale };
        if self.count == 0 {
            return Ok(ScalarValue::Decimal128(None, 38, scale));
        }
        let mut value = self.sum;
        if self.average {
            for _ in self.scale..scale {
                value = value.wrapping_mul(i256::from_i128(10));
            }
            let count = i256::from_i128(i128::from(self.count));
            let (quotient, rest) = (value.wrapping_div(count), value.wrapping_rem(count));
            let twice = rest.wrapping_abs().wrapping_mul(i256::from_i128(2));
            let away = if value < i256::ZERO { i256::MINUS_ONE } else { i256::ONE };
            value = if twice >= count { quotient.wrapping_add(away) } else { quotient };
        }
        match value.to_i128().filter(|value| value.unsigned_abs() < 10_u128.pow(38)) {
            Some(value) => Ok(ScalarValue::Decimal128(Some(value), 38, scale)),
            None => Err(Error::data("a sum has more than 38 digits").into()),
        }
    }

    fn size(&self) -> usize {
        size_of_val(self)
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
