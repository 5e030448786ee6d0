//! Arithmetic of whole numbers and decimals that never wraps.

use arrow::{
    array::{ArrayRef, AsArray, Datum},
    compute::kernels::numeric,
    datatypes::{DataType, Decimal128Type},
};
use datafusion::{
    common::Result as DataFusionResult,
    error::DataFusionError,
    logical_expr::{
        ColumnarValue, Operator, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
        binary::BinaryTypeCoercer,
    },
    scalar::ScalarValue,
};

use crate::error::{Error, Place};

/// `left op right`, put in place of SQL's operator by [`super::rules::Exact`].
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Checked {
    operator: Operator,
    place: Option<Place>,
    signature: Signature,
}

impl Checked {
    /// The function for `operator`, written at `place`.
    pub fn of(operator: Operator, place: Option<Place>) -> ScalarUDF {
        Self { operator, place, signature: Signature::any(2, Volatility::Immutable) }.into()
    }

    fn refuse(&self, error: Error) -> DataFusionError {
        match &self.place {
            Some(place) => error.at(place.clone()).into(),
            None => error.into(),
        }
    }

    fn overflow(&self) -> DataFusionError {
        self.refuse(
            Error::data(format!("the result of `{}` does not fit its type", self.operator))
                .hint("Cast an operand to a wider type first, such as `cast(x as decimal(38, 4))`."),
        )
    }

    fn apply(&self, left: &dyn Datum, right: &dyn Datum) -> DataFusionResult<ArrayRef> {
        let result = match self.operator {
            Operator::Plus => numeric::add(left, right),
            Operator::Minus => numeric::sub(left, right),
            Operator::Multiply => numeric::mul(left, right),
            Operator::Divide => numeric::div(left, right),
            _ => numeric::rem(left, right),
        };
        let result = result.map_err(|error| match error {
            arrow::error::ArrowError::DivideByZero => self.refuse(
                Error::data("a division by zero").hint("Use `nullif(divisor, 0)` where null is wanted."),
            ),
            _ => self.overflow(),
        })?;
        if let DataType::Decimal128(precision, _) = result.data_type() {
            // Arrow checks 128 bits; the type promises decimal digits.
            let decimals = result.as_primitive::<Decimal128Type>();
            decimals.validate_decimal_precision(*precision).map_err(|_| self.overflow())?;
        }
        Ok(result)
    }
}

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &'static str {
        match self.operator {
            Operator::Plus => "checked_add",
            Operator::Minus => "checked_subtract",
            Operator::Multiply => "checked_multiply",
            Operator::Divide => "checked_divide",
            _ => "checked_modulo",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> DataFusionResult<DataType> {
        let [left, right] = types else {
            return Err(Error::bug("arithmetic takes two operands").into());
        };
        BinaryTypeCoercer::new(left, &self.operator, right).get_result_type()
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        let wanted = args.return_field.data_type();
        let adjust = |array: ArrayRef| -> DataFusionResult<ArrayRef> {
            if array.data_type() == wanted {
                Ok(array)
            } else {
                super::cast::cast_exactly(&array, wanted).map_err(|error| self.refuse(error))
            }
        };
        match args.args.as_slice() {
            [ColumnarValue::Array(left), ColumnarValue::Array(right)] => {
                Ok(ColumnarValue::Array(adjust(self.apply(left, right)?)?))
            }
            [ColumnarValue::Array(left), ColumnarValue::Scalar(right)] => {
                Ok(ColumnarValue::Array(adjust(self.apply(left, &right.to_scalar()?)?)?))
            }
            [ColumnarValue::Scalar(left), ColumnarValue::Array(right)] => {
                Ok(ColumnarValue::Array(adjust(self.apply(&left.to_scalar()?, right)?)?))
            }
            [ColumnarValue::Scalar(left), ColumnarValue::Scalar(right)] => {
                let result = adjust(self.apply(&left.to_array()?, &right.to_array()?)?)?;
                Ok(ColumnarValue::Scalar(ScalarValue::try_from_array(&result, 0)?))
            }
            _ => Err(Error::bug("arithmetic takes two operands").into()),
        }
    }
}

/// Whether `Checked` speaks for operands of these types.
pub fn is_exact_number(data_type: &DataType) -> bool {
    data_type.is_integer() || matches!(data_type, DataType::Decimal128(..))
}
