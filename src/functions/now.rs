//! `now()` and its kin: the run's `as_of`, so that a run can be repeated.

use std::sync::Arc;

use arrow::datatypes::{DataType, TimeUnit};
use chrono::{DateTime, NaiveDate, Utc};
use datafusion::{
    common::Result as DataFusionResult,
    logical_expr::{
        ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility,
        simplify::{ExprSimplifyResult, SimplifyContext},
    },
    scalar::ScalarValue,
};

use crate::types::UTC;

/// A function without arguments that always gives one value.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Frozen {
    name: &'static str,
    aliases: Vec<String>,
    value: ScalarValue,
    signature: Signature,
}

/// `now()`, `current_timestamp`, `current_date` and `today()` at `as_of`.
pub fn functions(as_of: DateTime<Utc>) -> Vec<ScalarUDF> {
    let instant = ScalarValue::TimestampMicrosecond(Some(as_of.timestamp_micros()), Some(Arc::from(UTC)));
    let days = as_of.date_naive().signed_duration_since(NaiveDate::default()).num_days();
    let day = ScalarValue::Date32(i32::try_from(days).ok());
    let frozen = |name, alias: &str, value| {
        Frozen {
            name,
            aliases: vec![alias.to_owned()],
            value,
            signature: Signature::nullary(Volatility::Immutable),
        }
        .into()
    };
    vec![frozen("now", "current_timestamp", instant), frozen("current_date", "today", day)]
}

impl ScalarUDFImpl for Frozen {
    fn name(&self) -> &'static str {
        self.name
    }

    fn aliases(&self) -> &[String] {
        &self.aliases
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> DataFusionResult<DataType> {
        Ok(match &self.value {
            ScalarValue::Date32(_) => DataType::Date32,
            _ => DataType::Timestamp(TimeUnit::Microsecond, Some(Arc::from(UTC))),
        })
    }

    fn simplify(&self, _: Vec<Expr>, _: &SimplifyContext) -> DataFusionResult<ExprSimplifyResult> {
        Ok(ExprSimplifyResult::Simplified(Expr::Literal(self.value.clone(), None)))
    }

    fn invoke_with_args(&self, _: ScalarFunctionArgs) -> DataFusionResult<ColumnarValue> {
        Ok(ColumnarValue::Scalar(self.value.clone()))
    }
}
