//! Analyzer rules: what must hold in every expression of every plan.

use std::sync::Arc;

use arrow::datatypes::DataType;
use datafusion::{
    common::{
        Column, DFSchema, Diagnostic, Result as DataFusionResult, Span,
        config::ConfigOptions,
        tree_node::{Transformed, TreeNode, TreeNodeRecursion},
    },
    error::DataFusionError,
    logical_expr::{
        BinaryExpr, Expr, ExprSchemable, LogicalPlan, Operator,
        expr::{Between, Cast, InList, SetComparison},
        expr_rewriter::NamePreserver,
        utils::merge_schema,
    },
    optimizer::AnalyzerRule,
};

use super::{arithmetic, cast};
use crate::{
    connector::columns::decimal,
    error::{Place, SourceText},
    types::describe,
};

/// Before types are coerced: what has no order between them is not compared. A timestamp without a zone and one that
/// has a zone, a date and a number, a number and a text that is none.
#[derive(Debug)]
pub struct Comparable;

impl AnalyzerRule for Comparable {
    fn name(&self) -> &'static str {
        "comparable"
    }

    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> DataFusionResult<LogicalPlan> {
        plan.apply_with_subqueries(|node| {
            let schema = merge_schema(&node.inputs());
            if let LogicalPlan::Join(join) = node {
                for (left, right) in &join.on {
                    refuse_mixed(left, right, &schema)?;
                }
            }
            node.apply_expressions(|expr| {
                expr.apply(|expr| {
                    match expr {
                        Expr::BinaryExpr(BinaryExpr { left, op, right }) if op.supports_propagation() => {
                            refuse_mixed(left, right, &schema)?;
                        }
                        Expr::Between(Between { expr, low, high, .. }) => {
                            refuse_mixed(expr, low, &schema)?;
                            refuse_mixed(expr, high, &schema)?;
                        }
                        Expr::SetComparison(SetComparison { expr, subquery, .. }) => {
                            refuse_captured(expr, &subquery.subquery)?;
                        }
                        Expr::InList(InList { expr, list, .. }) => {
                            for value in list {
                                refuse_mixed(expr, value, &schema)?;
                            }
                        }
                        _ => {}
                    }
                    Ok(TreeNodeRecursion::Continue)
                })
            })
        })?;
        Ok(plan)
    }
}

/// DataFusion makes a condition of the subquery of `x >= ALL (SELECT x FROM t)`, and takes a column outside for the one of the same name
/// inside.
fn refuse_captured(expr: &Expr, subquery: &LogicalPlan) -> DataFusionResult<()> {
    let inside = |column: &&Column| {
        let known = |relation| subquery.schema().iter().any(|(qualifier, _)| qualifier == Some(relation));
        column.relation.as_ref().is_some_and(known)
    };
    let Some(column) = expr.column_refs().into_iter().find(inside) else { return Ok(()) };
    let text = format!(
        "`{}` is compared with a subquery that reads a relation of the same name",
        column.flat_name()
    );
    let diagnostic = Diagnostic::new_error(text.clone(), span_of(expr)).with_help(
        "Give the one in the subquery another name, and use it: `SELECT o.x FROM orders AS o`.",
        None,
    );
    Err(DataFusionError::Plan(text).with_diagnostic(diagnostic))
}

fn refuse_mixed(left: &Expr, right: &Expr, schema: &DFSchema) -> DataFusionResult<()> {
    // A type that cannot be told here is told better by the rule that comes next.
    let (Ok(a), Ok(b)) = (left.get_type(schema), right.get_type(schema)) else { return Ok(()) };
    let instant = |of: &DataType| matches!(of, DataType::Date32 | DataType::Date64 | DataType::Timestamp(..));
    let (text, hint) = match (&a, &b) {
        (DataType::Timestamp(_, None), DataType::Timestamp(_, Some(_)))
        | (DataType::Timestamp(_, Some(_)), DataType::Timestamp(_, None)) => (
            "a timestamp without a zone is compared with one that has a zone".to_owned(),
            "Declare `timezone:` on the source of the one without, or cast it: `x at time zone 'Europe/Berlin'`",
        ),
        (time, number) | (number, time) if instant(time) && number.is_numeric() => (
            format!("{} is compared with {}", describe(time), describe(number)),
            "Write dates as `date '2026-10-31'`, and take numbers out of them with `extract(year from x)`.",
        ),
        _ => match (unreadable(left, &b), unreadable(right, &a)) {
            (Some(text), _) => (format!("`{text}` is compared with {}, and is none", describe(&b)), WRITTEN),
            (_, Some(text)) => (format!("`{text}` is compared with {}, and is none", describe(&a)), WRITTEN),
            _ => return Ok(()),
        },
    };
    let span = span_of(left).or_else(|| span_of(right));
    let diagnostic = Diagnostic::new_error(text.clone(), span).with_help(hint, None);
    Err(DataFusionError::Plan(text).with_diagnostic(diagnostic))
}

/// How values of a type stand in SQL.
const WRITTEN: &str =
    "Write a date as `'2026-10-31'`, a timestamp as `'2026-10-31T08:00:00'`, a number without quotes.";

/// The text of a literal that is no value of the type that it is compared with.
fn unreadable<'a>(literal: &'a Expr, other: &DataType) -> Option<&'a str> {
    let Expr::Literal(value, _) = literal else { return None };
    let text = value.try_as_str()??;
    let compares_by_value = other.is_numeric() || other.is_temporal() || *other == DataType::Boolean;
    let fits = match other {
        DataType::Decimal128(precision, scale) => decimal(text, b'.', None, *precision, *scale).is_ok(),
        _ => value.cast_to(other).is_ok(),
    };
    (compares_by_value && !fits).then_some(text)
}

/// Where the columns of an expression stand in the SQL, from the first to the last.
pub fn span_of(expr: &Expr) -> Option<Span> {
    let mut spans = Vec::new();
    drop(expr.apply(|expr| {
        if let Expr::Column(Column { spans: of, .. }) = expr {
            spans.extend(of.first());
        }
        Ok(TreeNodeRecursion::Continue)
    }));
    Span::union_iter(spans)
}

/// A span in a file.
pub fn place(file: &Arc<SourceText>, span: Span) -> Place {
    Place::between(file, (span.start.line, span.start.column), (span.end.line, span.end.column))
}

/// After types are coerced: arithmetic that checks, and casts that keep every digit. What they refuse is told at its
/// place in the file, if the plan is of one.
#[derive(Debug, Default)]
pub struct Exact {
    /// The file that the plan's spans count in.
    pub file: Option<Arc<SourceText>>,
}

impl AnalyzerRule for Exact {
    fn name(&self) -> &'static str {
        "exact"
    }

    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> DataFusionResult<LogicalPlan> {
        let plan = plan.transform_up_with_subqueries(|node| {
            let schema = merge_schema(&node.inputs());
            let names = NamePreserver::new(&node);
            node.map_expressions(|expr| {
                let name = names.save(&expr);
                let exact = expr.transform_up(|expr| self.exact(expr, &schema))?;
                Ok(exact.update_data(|expr| name.restore(expr)))
            })
        })?;
        plan.data.recompute_schema()
    }
}

impl Exact {
    fn exact(&self, expr: Expr, schema: &DFSchema) -> DataFusionResult<Transformed<Expr>> {
        match expr {
            Expr::BinaryExpr(BinaryExpr { left, op, right }) if is_arithmetic(op) => {
                let types = (left.get_type(schema)?, right.get_type(schema)?);
                if !arithmetic::is_exact_number(&types.0) || !arithmetic::is_exact_number(&types.1) {
                    return Ok(Transformed::no(Expr::BinaryExpr(BinaryExpr { left, op, right })));
                }
                let place = self.place_of(&[&left, &right]);
                let function = arithmetic::Checked::of(op, place);
                Ok(Transformed::yes(function.call(vec![*left, *right])))
            }
            Expr::Cast(Cast { expr, field }) => {
                let from = expr.get_type(schema)?;
                if cast::can_fail(&from, field.data_type()) {
                    let function = cast::ExactCast::to(field.data_type().clone(), self.place_of(&[&expr]));
                    Ok(Transformed::yes(function.call(vec![*expr])))
                } else {
                    Ok(Transformed::no(Expr::Cast(Cast { expr, field })))
                }
            }
            other => Ok(Transformed::no(other)),
        }
    }

    fn place_of(&self, exprs: &[&Expr]) -> Option<Place> {
        let file = self.file.as_ref()?;
        let span = Span::union_iter(exprs.iter().filter_map(|expr| span_of(expr)))?;
        Some(place(file, span))
    }
}

fn is_arithmetic(op: Operator) -> bool {
    matches!(op, Operator::Plus | Operator::Minus | Operator::Multiply | Operator::Divide | Operator::Modulo)
}

/// Decimals that pass through a float: what a plan-time warning names.
pub fn floats_of_money(plan: &LogicalPlan) -> Vec<(String, Option<Span>)> {
    let mut found = Vec::new();
    drop(plan.apply_with_subqueries(|node| {
        let schema = merge_schema(&node.inputs());
        node.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Expr::Cast(Cast { expr: inner, field }) = expr
                    && field.data_type().is_floating()
                    && inner
                        .get_type(&schema)
                        .is_ok_and(|from| matches!(from, DataType::Decimal128(..) | DataType::Decimal256(..)))
                    && !matches!(inner.as_ref(), Expr::Literal(..))
                {
                    let entry = (inner.to_string(), span_of(inner));
                    if !found.contains(&entry) {
                        found.push(entry);
                    }
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    }));
    found
}
