//! PostgreSQL's types and ours: the table of the README, as code.
//!
//! In: a column's type and modifier give the form in which its values come over the wire ([`Wire`]) and the Arrow type that holds
//! all of them. What has no form of its own comes as the server's own text. Where Arrow cannot say what the column was, its field
//! carries the type's name ([`TYPE_NAME`]), so that a target of the same kind makes the same column again.

use std::{collections::HashMap, sync::Arc};

use arrow::datatypes::{
    DECIMAL128_MAX_PRECISION, DECIMAL256_MAX_PRECISION, DataType, Field, Fields, IntervalUnit, TimeUnit,
};
use chrono_tz::Tz;
use tokio_postgres::types::{Kind, Type};

use crate::{
    error::{Error, Result},
    types::{ColumnType, UTC},
};

/// The key of a field's metadata that says what the column is in PostgreSQL, where the Arrow type alone does not.
pub(super) const TYPE_NAME: &str = "floodmark:postgres";

/// How a value comes over the wire.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Wire {
    Bool,
    Int2,
    Int4,
    Int8,
    /// `oid` and its kin.
    UInt4,
    /// `xid8`, `pg_lsn`.
    UInt8,
    Float4,
    Float8,
    /// A number of base 10000 into a decimal of this shape.
    Decimal {
        precision: u8,
        scale: i8,
    },
    /// The same with 256 bits.
    Decimal256 {
        precision: u8,
        scale: i8,
    },
    /// The same as its exact text: no shape was declared.
    NumericText,
    /// Minor units.
    Money {
        scale: i8,
    },
    /// Bytes that are text.
    Text,
    /// A version byte, then text.
    Jsonb,
    Bytea,
    Uuid,
    Inet,
    MacAddr,
    Bits,
    Date,
    Time,
    TimeTz,
    Timestamp,
    TimestampTz,
    /// A `timestamp` that is what a clock in this zone showed.
    TimestampIn(Tz),
    Interval,
    /// The element, and its name where Arrow does not say it.
    List(Box<Attribute>),
    Struct(Vec<Attribute>),
    Range(Box<Attribute>),
    Multirange(Box<Attribute>),
}

/// A part of a value: an element, an attribute, a bound.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Attribute {
    pub(super) name: String,
    pub(super) wire: Wire,
    /// The type's name in PostgreSQL, where Arrow's does not say it.
    pub(super) type_name: Option<String>,
}

impl Attribute {
    /// The Arrow field.
    pub(super) fn field(&self) -> Field {
        let field = Field::new(&self.name, self.wire.arrow(), true);
        match &self.type_name {
            Some(name) => field.with_metadata(HashMap::from([(TYPE_NAME.to_owned(), name.clone())])),
            None => field,
        }
    }
}

impl Wire {
    /// The Arrow type that holds every value.
    pub(super) fn arrow(&self) -> DataType {
        match self {
            Self::Bool => DataType::Boolean,
            Self::Int2 => DataType::Int16,
            Self::Int4 => DataType::Int32,
            Self::Int8 => DataType::Int64,
            Self::UInt4 => DataType::UInt32,
            Self::UInt8 => DataType::UInt64,
            Self::Float4 => DataType::Float32,
            Self::Float8 => DataType::Float64,
            Self::Decimal { precision, scale } => DataType::Decimal128(*precision, *scale),
            Self::Decimal256 { precision, scale } => DataType::Decimal256(*precision, *scale),
            Self::Money { scale } => DataType::Decimal128(19, *scale),
            Self::NumericText
            | Self::Text
            | Self::Jsonb
            | Self::Uuid
            | Self::Inet
            | Self::MacAddr
            | Self::Bits => DataType::Utf8,
            Self::Bytea => DataType::Binary,
            Self::Date => DataType::Date32,
            Self::Time => DataType::Time64(TimeUnit::Microsecond),
            Self::TimeTz => DataType::Struct(timetz_fields()),
            Self::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, None),
            Self::TimestampTz | Self::TimestampIn(_) => {
                DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into()))
            }
            Self::Interval => DataType::Interval(IntervalUnit::MonthDayNano),
            Self::List(element) => DataType::List(Arc::new(element.field())),
            Self::Struct(attributes) => DataType::Struct(attributes.iter().map(Attribute::field).collect()),
            Self::Range(bound) => DataType::Struct(range_fields(bound)),
            Self::Multirange(bound) => {
                DataType::List(Arc::new(Field::new("item", DataType::Struct(range_fields(bound)), true)))
            }
        }
    }
}

/// `time` and the offset in seconds east of Greenwich.
pub(super) fn timetz_fields() -> Fields {
    Fields::from(vec![
        Field::new("time", DataType::Time64(TimeUnit::Microsecond), true),
        Field::new("offset_s", DataType::Int32, true),
    ])
}

/// The parts of a range. A bound that is null is infinite; of an empty range all parts but `empty` are null or false.
pub(super) fn range_fields(bound: &Attribute) -> Fields {
    let bound = |name: &str| Attribute { name: name.to_owned(), ..bound.clone() }.field();
    let flag = |name: &str| Field::new(name, DataType::Boolean, true);
    Fields::from(vec![bound("lower"), bound("upper"), flag("lower_inc"), flag("upper_inc"), flag("empty")])
}

/// The shape of a `numeric` by its modifier.
fn numeric(modifier: i32) -> Wire {
    if modifier < 4 {
        return Wire::NumericText;
    }
    let (precision, scale) = shape(modifier);
    // A scale beyond the precision, or a negative one, needs digits that Arrow counts otherwise.
    let (precision, scale) = if scale < 0 {
        (precision - scale, 0)
    } else if scale > precision {
        (scale, scale)
    } else {
        (precision, scale)
    };
    match (u8::try_from(precision), i8::try_from(scale)) {
        (Ok(precision), Ok(scale)) if precision <= DECIMAL128_MAX_PRECISION => {
            Wire::Decimal { precision, scale }
        }
        (Ok(precision), Ok(scale)) if precision <= DECIMAL256_MAX_PRECISION => {
            Wire::Decimal256 { precision, scale }
        }
        _ => Wire::NumericText,
    }
}

/// Precision and scale of a `numeric`'s modifier; a scale may be negative since PostgreSQL 15.
pub(super) fn shape(modifier: i32) -> (i32, i32) {
    let packed = modifier - 4;
    (packed >> 16 & 0xffff, ((packed & 0x7ff) ^ 1024) - 1024)
}

/// How a column of this type comes, and its name where Arrow's type does not say it; `None` if only as the server's text.
///
/// `money_scale` is how many decimals the server's `money` has.
pub(super) fn wire(of: &Type, modifier: i32, money_scale: i8) -> Option<(Wire, Option<String>)> {
    let named = |wire: Wire| Some((wire, Some(type_name(of))));
    let plain = |wire: Wire| Some((wire, None));
    let part = |name: &str, of: &Type| {
        let (wire, type_name) = wire(of, -1, money_scale)?;
        Some(Attribute { name: name.to_owned(), wire, type_name })
    };
    match of.kind() {
        Kind::Domain(base) => return wire(base, modifier, money_scale),
        Kind::Enum(_) => return named(Wire::Text),
        Kind::Array(element) => {
            // The modifier of an array is that of its elements.
            let (element_wire, type_name) = wire(element, modifier, money_scale)?;
            let element = Attribute { name: "item".to_owned(), wire: element_wire, type_name };
            return plain(Wire::List(Box::new(element)));
        }
        Kind::Composite(fields) => {
            let attributes =
                fields.iter().map(|field| part(field.name(), field.type_())).collect::<Option<Vec<_>>>()?;
            return named(Wire::Struct(attributes));
        }
        Kind::Range(bound) => return named(Wire::Range(Box::new(part("bound", bound)?))),
        Kind::Multirange(bound) => {
            // tokio-postgres gives the range's element or the range itself, as the catalog says.
            let bound = match bound.kind() {
                Kind::Range(inner) => inner,
                _ => bound,
            };
            return named(Wire::Multirange(Box::new(part("bound", bound)?)));
        }
        _ => {}
    }
    match *of {
        Type::BOOL => plain(Wire::Bool),
        Type::INT2 => plain(Wire::Int2),
        Type::INT4 => plain(Wire::Int4),
        Type::INT8 => plain(Wire::Int8),
        Type::OID
        | Type::XID
        | Type::CID
        | Type::REGPROC
        | Type::REGPROCEDURE
        | Type::REGOPER
        | Type::REGOPERATOR
        | Type::REGCLASS
        | Type::REGTYPE
        | Type::REGROLE
        | Type::REGNAMESPACE
        | Type::REGCONFIG
        | Type::REGDICTIONARY
        | Type::REGCOLLATION => plain(Wire::UInt4),
        Type::XID8 | Type::PG_LSN => plain(Wire::UInt8),
        Type::FLOAT4 => plain(Wire::Float4),
        Type::FLOAT8 => plain(Wire::Float8),
        Type::NUMERIC => match numeric(modifier) {
            Wire::NumericText => named(Wire::NumericText),
            shaped => plain(shaped),
        },
        Type::MONEY => named(Wire::Money { scale: money_scale }),
        Type::TEXT => plain(Wire::Text),
        Type::VARCHAR if modifier < 4 => plain(Wire::Text),
        Type::VARCHAR | Type::BPCHAR if modifier >= 4 => {
            Some((Wire::Text, Some(format!("{}({})", type_name(of), modifier - 4))))
        }
        Type::BPCHAR | Type::NAME | Type::XML | Type::CHAR | Type::JSON | Type::UNKNOWN => named(Wire::Text),
        Type::JSONB => named(Wire::Jsonb),
        Type::BYTEA => plain(Wire::Bytea),
        Type::UUID => named(Wire::Uuid),
        Type::INET | Type::CIDR => named(Wire::Inet),
        Type::MACADDR | Type::MACADDR8 => named(Wire::MacAddr),
        Type::BIT | Type::VARBIT if modifier > 0 => {
            Some((Wire::Bits, Some(format!("{}({modifier})", type_name(of)))))
        }
        Type::BIT | Type::VARBIT => named(Wire::Bits),
        Type::DATE => plain(Wire::Date),
        Type::TIME => plain(Wire::Time),
        Type::TIMETZ => named(Wire::TimeTz),
        Type::TIMESTAMP => plain(Wire::Timestamp),
        Type::TIMESTAMPTZ => plain(Wire::TimestampTz),
        Type::INTERVAL => named(Wire::Interval),
        _ if matches!(of.name(), "geometry" | "geography") => named(Wire::Bytea),
        _ if of.name() == "citext" => named(Wire::Text),
        _ => None,
    }
}

/// A type's name as SQL takes it.
fn type_name(of: &Type) -> String {
    match *of {
        Type::BPCHAR => "character".to_owned(),
        Type::VARCHAR => "character varying".to_owned(),
        Type::VARBIT => "bit varying".to_owned(),
        Type::CHAR => "\"char\"".to_owned(),
        _ if of.schema() == "pg_catalog" => of.name().to_owned(),
        _ => format!("\"{}\".\"{}\"", of.schema().replace('"', "\"\""), of.name().replace('"', "\"\"")),
    }
}

/// How a declared type of the job is read.
pub(super) enum Reading {
    /// As it comes.
    Native(Wire),
    /// After a cast by the server that loses nothing, to this type.
    Cast(&'static str, Wire),
    /// As the server's text, which our own rules turn into the type.
    Text,
}

/// How a column that comes as `wire` is read as the type that the job declares.
pub(super) fn declared(column: &ColumnType, wire: Option<&Wire>) -> Reading {
    let Some(wire) = wire else { return Reading::Text };
    match (column, wire) {
        (ColumnType::String, wire) if wire.arrow() == DataType::Utf8 => Reading::Native(wire.clone()),
        (ColumnType::Json, Wire::Text | Wire::Jsonb)
        | (ColumnType::Bool, Wire::Bool)
        | (ColumnType::Int, Wire::Int8)
        | (ColumnType::Float, Wire::Float8)
        | (ColumnType::Date(None), Wire::Date)
        | (ColumnType::Time, Wire::Time)
        | (ColumnType::Timestamp(None), Wire::Timestamp)
        | (ColumnType::TimestampTz(None), Wire::TimestampTz)
        | (ColumnType::Binary, Wire::Bytea) => Reading::Native(wire.clone()),
        (
            ColumnType::Decimal { precision, scale },
            Wire::Decimal { .. } | Wire::Decimal256 { .. } | Wire::NumericText,
        ) => Reading::Native(Wire::Decimal { precision: *precision, scale: *scale }),
        (ColumnType::Decimal { precision, scale }, Wire::Int2 | Wire::Int4 | Wire::Int8) => {
            Reading::Cast("numeric", Wire::Decimal { precision: *precision, scale: *scale })
        }
        (ColumnType::Int, Wire::Int2 | Wire::Int4 | Wire::UInt4) => Reading::Cast("int8", Wire::Int8),
        (ColumnType::Float, Wire::Float4) => Reading::Cast("float8", Wire::Float8),
        _ => Reading::Text,
    }
}

/// How a column of `field` is declared in a new table.
///
/// # Errors
///
/// If PostgreSQL has no exact counterpart.
pub(super) fn declaration(field: &Field) -> Result<String> {
    if let Some(name) = field.metadata().get(TYPE_NAME) {
        return Ok(name.clone());
    }
    match field.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Ok("text".to_owned()),
        DataType::List(element) => Ok(format!("{}[]", declaration(element)?)),
        other => counterpart(other).ok_or_else(|| {
            Error::configuration(format!(
                "column `{}` is {other}, which PostgreSQL cannot hold as one column",
                field.name()
            ))
            .hint("Cast it in the model, for example to text.")
        }),
    }
}

/// The type of a column of the stage, as the server's catalog spells it: one whose binary form we write.
pub(super) fn stage_type(data_type: &DataType) -> String {
    counterpart(data_type).map_or_else(|| "text".to_owned(), |name| spelled(&name).to_owned())
}

/// The type that holds exactly the values of one of Arrow's, by its short name; `None` of what goes as text.
fn counterpart(data_type: &DataType) -> Option<String> {
    let name = match data_type {
        DataType::Boolean => "boolean",
        DataType::Int8 | DataType::UInt8 | DataType::Int16 => "smallint",
        DataType::UInt16 | DataType::Int32 => "integer",
        DataType::UInt32 | DataType::Int64 => "bigint",
        DataType::UInt64 => "numeric(20,0)",
        DataType::Float32 => "real",
        DataType::Float64 => "double precision",
        DataType::Decimal128(precision, scale) | DataType::Decimal256(precision, scale) => {
            return Some(format!("numeric({precision},{scale})"));
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => "bytea",
        DataType::Date32 => "date",
        DataType::Time64(TimeUnit::Microsecond) => "time",
        DataType::Timestamp(TimeUnit::Microsecond, None) => "timestamp",
        DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => "timestamptz",
        DataType::Interval(IntervalUnit::MonthDayNano) => "interval",
        _ => return None,
    };
    Some(name.to_owned())
}

/// A type's short name as the catalog spells it.
pub(super) fn spelled(declared: &str) -> &str {
    match declared {
        "time" => "time without time zone",
        "timestamp" => "timestamp without time zone",
        "timestamptz" => "timestamp with time zone",
        other => other,
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn a_numeric_is_the_decimal_that_holds_all_of_its_values() {
        // The modifier as the server packs it: precision in the upper half, scale in eleven bits.
        let packed = |precision: i32, scale: i32| ((precision << 16) | (scale & 0x7ff)) + 4;
        for (precision, scale, expected) in [
            (18, 2, Wire::Decimal { precision: 18, scale: 2 }),
            (38, 38, Wire::Decimal { precision: 38, scale: 38 }),
            (39, 0, Wire::Decimal256 { precision: 39, scale: 0 }),
            (76, 76, Wire::Decimal256 { precision: 76, scale: 76 }),
            (77, 0, Wire::NumericText),
            (2, -3, Wire::Decimal { precision: 5, scale: 0 }),
            (3, 5, Wire::Decimal { precision: 5, scale: 5 }),
        ] {
            assert_eq!(numeric(packed(precision, scale)), expected, "numeric({precision},{scale})");
        }
        assert_eq!(numeric(-1), Wire::NumericText);
    }
}
