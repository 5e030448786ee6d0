//! Casts that lose nothing, or are an error.

use std::sync::Arc;

use arrow::{
    array::{Array, ArrayRef, AsArray, Decimal128Builder},
    compute::{CastOptions, cast_with_options, kernels::cmp::distinct},
    datatypes::{DataType, TimeUnit},
};
use datafusion::{
    common::Result as DataFusionResult,
    error::DataFusionError,
    logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility},
    scalar::ScalarValue,
};

use crate::{
    connector::columns::decimal,
    error::{Error, Result},
    types::describe,
};

/// Whether a cast from `from` to `to` could lose digits without Arrow minding.
pub fn can_lose(from: &DataType, to: &DataType) -> bool {
    use DataType::{Decimal128, Decimal256, Float16, Float32, Float64, LargeUtf8, Timestamp, Utf8, Utf8View};
    match (from, to) {
        (Decimal128(_, s1) | Decimal256(_, s1), Decimal128(_, s2) | Decimal256(_, s2)) => s2 < s1,
        (Decimal128(..) | Decimal256(..) | Float16 | Float32 | Float64, to) if to.is_integer() => true,
        (Utf8 | LargeUtf8 | Utf8View, Decimal128(..)) => true,
        (Timestamp(TimeUnit::Nanosecond, _), Timestamp(TimeUnit::Microsecond, _)) => true,
        _ => false,
    }
}

/// `array` as `to`.
///
/// # Errors
///
/// If a value does not fit, or fits only without some of its digits.
pub fn cast_exactly(array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    let from = array.data_type();
    let refuse =
        |why: String| Error::data(format!("a value cannot become {} without loss", describe(to))).note(why);
    if let (
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View,
        DataType::Decimal128(precision, scale),
    ) = (from, to)
    {
        let text = cast_with_options(array, &DataType::Utf8, &CastOptions::default())?;
        let text = text.as_string::<i32>();
        let mut builder =
            Decimal128Builder::with_capacity(text.len()).with_precision_and_scale(*precision, *scale)?;
        for (row, value) in text.iter().enumerate() {
            match value {
                Some(value) => {
                    let exact = decimal(value, b'.', None, *precision, *scale);
                    builder.append_value(
                        exact.map_err(|why| refuse(format!("row {}: the text {why}", row + 1)))?,
                    );
                }
                None => builder.append_null(),
            }
        }
        return Ok(Arc::new(builder.finish()));
    }
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    let cast = cast_with_options(array, to, &strict)
        .map_err(|_| refuse(format!("it is {} and does not fit", describe(from))))?;
    if can_lose(from, to) {
        let back = cast_with_options(&cast, from, &strict).map_err(|error| refuse(error.to_string()))?;
        let different = distinct(&back, array)?;
        if let Some(row) = different.iter().position(|value| value == Some(true)) {
            return Err(refuse(format!("row {} has digits that {} does not keep", row + 1, describe(to)))
                .hint("Round it first, `round(x, 2)`, or use `try_cast` where null is wanted."));
        }
    }
    Ok(cast)
}

/// The cast as a function, put in place of SQL's by [`super::rules::Exact`].
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct ExactCast {
    to: DataType,
    signature: Signature,
}

impl ExactCast {
    /// The function that casts to `to`.
    pub fn to(to: DataType) -> ScalarUDF {
        Self { to, signature: Signature::any(1, Volatility::Immutable) }.into()
    }
}

impl ScalarUDFImpl for ExactCast {
    fn name(&self) -> &'static str {
        "exact_cast"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> DataFusionResult<DataType> {
        Ok(self.to.clone())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        match args.args.first() {
            Some(ColumnarValue::Array(array)) => Ok(ColumnarValue::Array(cast_exactly(array, &self.to)?)),
            Some(ColumnarValue::Scalar(scalar)) => {
                let array = cast_exactly(&scalar.to_array()?, &self.to)?;
                Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&array, 0)?))
            }
            None => Err(DataFusionError::from(Error::bug("exact_cast takes one argument"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Decimal128Array, Float64Array, StringArray};

    use super::*;

    #[test]
    fn a_cast_is_exact_or_an_error() {
        let decimals = |values: &[i128], scale| -> ArrayRef {
            Arc::new(Decimal128Array::from(values.to_vec()).with_precision_and_scale(20, scale).unwrap())
        };
        let texts = |values: &[&str]| -> ArrayRef { Arc::new(StringArray::from(values.to_vec())) };
        let floats = |values: &[f64]| -> ArrayRef { Arc::new(Float64Array::from(values.to_vec())) };
        for (array, to, fits) in [
            (decimals(&[12_300], 4), DataType::Decimal128(18, 2), true),
            (decimals(&[12_345], 4), DataType::Decimal128(18, 2), false),
            (decimals(&[12_345], 4), DataType::Decimal128(5, 4), true),
            (decimals(&[12_345], 4), DataType::Decimal128(4, 4), false),
            (decimals(&[100], 2), DataType::Int64, true),
            (decimals(&[150], 2), DataType::Int64, false),
            (floats(&[2.0]), DataType::Int64, true),
            (floats(&[2.5]), DataType::Int64, false),
            (texts(&["1.5"]), DataType::Decimal128(18, 2), true),
            (texts(&["1.555"]), DataType::Decimal128(18, 2), false),
            (texts(&["x"]), DataType::Int64, false),
        ] {
            assert_eq!(cast_exactly(&array, &to).is_ok(), fits, "{array:?} to {to}");
        }
    }
}
