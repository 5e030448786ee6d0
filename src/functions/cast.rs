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
    connector::columns::{Misfit, decimal},
    error::{Error, Place, Result},
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

/// Whether a value of `from` may not have one in `to`.
pub fn can_fail(from: &DataType, to: &DataType) -> bool {
    use DataType::{Boolean, Date32, Decimal128, Float64, LargeUtf8, Null, Timestamp, Utf8, Utf8View};
    let whole_digits = |of: &DataType| match of {
        Decimal128(precision, scale) => Some(i16::from(*precision) - i16::from(*scale)),
        DataType::Int8 | DataType::UInt8 => Some(3),
        DataType::Int16 | DataType::UInt16 => Some(5),
        DataType::Int32 | DataType::UInt32 => Some(10),
        DataType::Int64 => Some(19),
        DataType::UInt64 => Some(20),
        _ => None,
    };
    match (from, to) {
        (from, to) if from == to => false,
        (Null, _) | (_, Utf8 | LargeUtf8 | Utf8View) => false,
        (Decimal128(_, s1), Decimal128(_, s2)) if s2 < s1 => true,
        (from, Decimal128(..)) => match (whole_digits(from), whole_digits(to)) {
            (Some(from), Some(to)) => from > to,
            _ => true,
        },
        (from, to) if from.is_integer() && to.is_integer() => {
            from.is_signed_integer() != to.is_signed_integer()
                || from.primitive_width() > to.primitive_width()
        }
        // Floats are asked for by name, and a warning of the plan names decimals that become one.
        (from, Float64) => !(from.is_numeric() || *from == Boolean),
        (Date32, Timestamp(..)) => true,
        (Timestamp(a, _), Timestamp(b, _)) => a != b,
        _ => true,
    }
}

/// `array` as `to`.
///
/// # Errors
///
/// If a value does not fit, or fits only without some of its digits.
pub fn cast_exactly(array: &ArrayRef, to: &DataType) -> Result<ArrayRef> {
    cast_or_misfit(array, to).map_err(|Misfit(why)| {
        Error::data(format!("a value cannot become {} without loss", describe(to)))
            .note(format!("it {why}"))
            .hint("Round it first, `round(x, 2)`, or use `try_cast` where null is wanted.")
    })
}

/// `array` as `to`, or why not.
///
/// # Errors
///
/// See [`cast_exactly`].
pub fn cast_or_misfit(array: &ArrayRef, to: &DataType) -> Result<ArrayRef, Misfit> {
    let from = array.data_type();
    let misfit = |_| Misfit(format!("is {} and does not fit", describe(from)));
    let strict = CastOptions { safe: false, ..CastOptions::default() };
    if let (
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View,
        DataType::Decimal128(precision, scale),
    ) = (from, to)
    {
        let text = cast_with_options(array, &DataType::Utf8, &strict).map_err(misfit)?;
        let text = text.as_string::<i32>();
        let mut builder = Decimal128Builder::with_capacity(text.len())
            .with_precision_and_scale(*precision, *scale)
            .map_err(misfit)?;
        for value in text {
            let exact = value.map(|value| decimal(value, b'.', None, *precision, *scale)).transpose();
            builder.append_option(exact?);
        }
        return Ok(Arc::new(builder.finish()));
    }
    let cast = cast_with_options(array, to, &strict).map_err(misfit)?;
    if can_lose(from, to) {
        let back = cast_with_options(&cast, from, &strict).map_err(misfit)?;
        if distinct(&back, array).map_err(misfit)?.true_count() > 0 {
            return Err(Misfit(format!("has digits that {} does not keep", describe(to))));
        }
    }
    Ok(cast)
}

/// The cast as a function, put in place of SQL's by [`super::rules::Exact`].
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct ExactCast {
    to: DataType,
    place: Option<Place>,
    signature: Signature,
}

impl ExactCast {
    /// The function that casts to `to`, written at `place`.
    pub fn to(to: DataType, place: Option<Place>) -> ScalarUDF {
        Self { to, place, signature: Signature::any(1, Volatility::Immutable) }.into()
    }

    fn cast(&self, array: &ArrayRef) -> Result<ArrayRef> {
        cast_exactly(array, &self.to).map_err(|error| match &self.place {
            Some(place) => error.at(place.clone()),
            None => error,
        })
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
            Some(ColumnarValue::Array(array)) => Ok(ColumnarValue::Array(self.cast(array)?)),
            Some(ColumnarValue::Scalar(scalar)) => {
                let array = self.cast(&scalar.to_array()?)?;
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
