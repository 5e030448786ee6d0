//! What a target's table becomes when the model's columns differ from its own: the contract's rules, in one place.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};

use super::spec::{Contract, DroppedColumn, NewColumn, OutputSpec, TypeChange};
use crate::{
    error::{Error, Result},
    types::describe,
};

/// The columns that the output will have: its own, in their order, then what is new.
///
/// | column | `error` | otherwise |
/// | --- | --- | --- |
/// | the model has it, the output does not | refused | `add`: added, null in older rows |
/// | the output has it, the model does not | refused | `keep`: kept, null in newer rows |
/// | the types differ | refused | `widen`: taken if every old value fits exactly, else refused |
///
/// # Errors
///
/// The first column that the contract refuses, with the key that would allow it.
pub fn evolve(output: &OutputSpec, current: &Schema, model: &Schema) -> Result<SchemaRef> {
    let Contract { new_column, dropped_column, type_change } = output.contract;
    let refuse = |what: String, key: &str| {
        Error::data(format!("output `{}`: {what}", output.name))
            .hint(format!("If that is meant, allow it in the job: `target: {{ contract: {{ {key} }} }}`."))
    };
    let mut fields = Vec::new();
    for field in current.fields() {
        let name = field.name();
        match model.field_with_name(name) {
            Ok(new) if new.data_type().equals_datatype(field.data_type()) => {
                fields.push(Arc::new(Field::new(
                    name,
                    field.data_type().clone(),
                    field.is_nullable() || new.is_nullable(),
                )));
            }
            Ok(new) => {
                let (old, now) = (describe(field.data_type()), describe(new.data_type()));
                let why = format!("`{name}` is {old} there and {now} in the model");
                if !widens(field.data_type(), new.data_type()) {
                    return Err(Error::data(format!("output `{}`: {why}", output.name)).hint(format!(
                        "Cast it to {old} in the model; or, if its type was only guessed from a file, declare it at the source: `columns: {{ {name}: \"{old}\" }}`. With `--full-refresh` the output is loaded anew."
                    )));
                }
                if type_change == TypeChange::Error {
                    return Err(refuse(why, "type_change: widen"));
                }
                fields.push(Arc::new(Field::new(name, new.data_type().clone(), true)));
            }
            Err(_) if dropped_column == DroppedColumn::Keep => {
                fields.push(Arc::new(Field::new(name, field.data_type().clone(), true)));
            }
            Err(_) => {
                return Err(refuse(
                    format!("the column `{name}` is there and not in the model"),
                    "dropped_column: keep",
                ));
            }
        }
    }
    for field in model.fields() {
        if current.field_with_name(field.name()).is_err() {
            if new_column == NewColumn::Error {
                return Err(refuse(format!("the column `{}` is new", field.name()), "new_column: add"));
            }
            fields.push(Arc::new(Field::new(field.name(), field.data_type().clone(), true)));
        }
    }
    Ok(Arc::new(Schema::new(fields)))
}

/// Whether every value of `old` fits `new` exactly.
fn widens(old: &DataType, new: &DataType) -> bool {
    use DataType::{Decimal128, Int8, Int16, Int32, Int64};
    match (old, new) {
        (Int8, Int16 | Int32 | Int64) | (Int16, Int32 | Int64) | (Int32, Int64) => true,
        (Int64, Decimal128(precision, scale)) => i16::from(*precision) - i16::from(*scale) >= 19,
        (Decimal128(p1, s1), Decimal128(p2, s2)) => {
            s2 >= s1 && i16::from(*p2) - i16::from(*s2) >= i16::from(*p1) - i16::from(*s1)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_widens_only_where_no_value_is_lost() {
        use DataType::{Decimal128, Int32, Int64, Utf8};
        for (old, new, expected) in [
            (Int32, Int64, true),
            (Int64, Int32, false),
            (Int64, Decimal128(38, 10), true),
            (Int64, Decimal128(20, 2), false),
            (Decimal128(18, 2), Decimal128(20, 4), true),
            (Decimal128(18, 2), Decimal128(18, 4), false),
            (Int64, Utf8, false),
        ] {
            assert_eq!(widens(&old, &new), expected, "{old} to {new}");
        }
    }
}
