//! What is wrong with a check before any row is read: its columns, its constants, its SQL.

use std::sync::Arc;

use arrow::datatypes::{DataType, Schema, SchemaRef};
use datafusion::prelude::SessionContext;
use indexmap::IndexMap;
use sqlparser::ast::{SelectItem, SetExpr, Statement};

use super::{Check, literal, row_query};
use crate::{
    error::{Error, Place, Problem, Result, SourceText, nearest},
    job::param::Param,
    names::quoted,
    plan::sql,
    types::describe,
};

/// What stands in front of an expression to make a SELECT of it.
const BEFORE: &str = "SELECT\n";

impl Check {
    /// The expression with its parameters bound, and the relations that it reads, as a query of `on`.
    ///
    /// # Errors
    ///
    /// What is no expression, at its place within `written`, where the job file has it.
    pub(crate) fn expression(
        on: &str,
        expression: &str,
        params: &IndexMap<String, Param>,
        written: &Place,
    ) -> Result<sql::Select, Problem> {
        let name = quoted(on).map_err(first)?;
        let text = format!("{BEFORE}{expression}\nFROM {name}");
        let file = Arc::new(SourceText { path: written.file.path.clone(), text });
        let select = sql::parse(&file, params).map_err(|error| within(first(error), expression, written))?;
        if condition(&select).is_none() {
            return Err(Problem::new("this is not one condition")
                .at(written.clone())
                .hint("Write one expression that is true or false, such as `amount <> 0`."));
        }
        Ok(select)
    }

    /// Looks at everything that can be known without a row.
    ///
    /// # Errors
    ///
    /// The first mistake, at `written`: where the job file has the check, or its expression.
    pub(crate) async fn validate(
        &self,
        context: &SessionContext,
        relations: &IndexMap<String, SchemaRef>,
        written: &Place,
    ) -> Result<(), Problem> {
        let Some(schema) = relations.get(&self.on) else { return Ok(()) };
        let at = |problem: Problem| problem.at(written.clone());
        for column in self.columns() {
            has_column(&self.on, schema, &column).map_err(at)?;
        }
        for (relation, column) in self.columns_elsewhere() {
            if let Some(schema) = relations.get(&relation) {
                has_column(&relation, schema, &column).map_err(at)?;
            }
        }
        self.sense(schema).map_err(at)?;
        for (sql, problem) in self.constants(schema).map_err(|error| at(first(error)))? {
            if evaluated(context, &sql).await.is_err() {
                return Err(at(problem));
            }
        }
        let Some(query) = &self.query else {
            let sql = match row_query(&self.on, std::slice::from_ref(self), schema) {
                Ok(None) => self.counting(chrono::DateTime::default()),
                row => row,
            };
            let Some(sql) = sql.map_err(|error| at(first(error)))? else { return Ok(()) };
            return planned(context, &sql).await.map_err(|error| at(first(error)));
        };
        let Some(expression) = &self.spec.expression else {
            return crate::plan::typed(context, query).await.map(drop);
        };
        let plan = crate::plan::typed(context, query)
            .await
            .map_err(|problem| within(problem, expression, written))?;
        match plan.schema().fields().first().map(|field| field.data_type()) {
            Some(DataType::Boolean) | None => Ok(()),
            Some(other) => {
                Err(at(Problem::new(format!("this expression is {}, and no condition", describe(other)))
                    .hint("Write one that is true or false, such as `amount <> 0`.")))
            }
        }
    }

    /// The columns of other relations.
    fn columns_elsewhere(&self) -> Vec<(String, String)> {
        let mut columns: Vec<(String, String)> = Vec::new();
        if let Some((relation, column)) =
            self.spec.references.as_ref().and_then(|references| references.r#in.split_once('.'))
        {
            columns.push((relation.to_owned(), column.to_owned()));
        }
        if let Some(same) = &self.spec.same_total {
            let named = || same.by.iter().chain([&same.sum]);
            columns.extend(
                same.of.iter().flat_map(|of| named().map(move |column| (of.clone(), column.clone()))),
            );
        }
        columns
    }

    /// What types and numbers make no sense together.
    fn sense(&self, schema: &Schema) -> Result<(), Problem> {
        let spec = &self.spec;
        let type_of =
            |column: &str| schema.field_with_name(column).ok().map(|field| field.data_type().clone());
        if let Some(count) = &spec.row_count {
            match (count.min, count.max) {
                (None, None) => {
                    return Err(Problem::new("this `row_count` allows any number of rows")
                        .hint("Give it `min:`, `max:` or both."));
                }
                (Some(min), Some(max)) if min > max => {
                    return Err(Problem::new(format!(
                        "no number of rows is at least {min} and at most {max}"
                    ))
                    .hint("Exchange `min` and `max`."));
                }
                _ => {}
            }
        }
        if spec.range.as_ref().is_some_and(|range| range.min.is_none() && range.max.is_none()) {
            return Err(
                Problem::new("this `range` allows every value").hint("Give it `min:`, `max:` or both.")
            );
        }
        if spec.accepted.as_ref().is_some_and(|accepted| accepted.values.is_empty()) {
            return Err(Problem::new("this check accepts no value").hint("List them: `values: [EUR, USD]`."));
        }
        if let Some(freshness) = &spec.freshness
            && let Some(of) = type_of(&freshness.column)
            && !of.is_temporal()
        {
            return Err(Problem::new(format!("`{}` is {}, and has no age", freshness.column, describe(&of)))
                .hint(
                    "Name a date or a timestamp; declare its type under `columns:` if it is read as text.",
                ));
        }
        let sums = spec.same_total.iter().map(|same| &same.sum);
        for column in sums.chain(spec.balanced.iter().map(|balanced| &balanced.sum)) {
            if let Some(of) = type_of(column)
                && !of.is_numeric()
            {
                return Err(Problem::new(format!("`{column}` is {}, and has no sum", describe(&of))).hint(
                    "Name a column of numbers; declare its type under `columns:` if it is read as text.",
                ));
            }
        }
        Ok(())
    }

    /// Values that the check compares with, as SQL; and what it means that one cannot be computed.
    fn constants(&self, schema: &Schema) -> Result<Vec<(String, Problem)>> {
        let spec = &self.spec;
        let mut constants = Vec::new();
        let bounds = spec
            .range
            .iter()
            .flat_map(|range| range.min.iter().chain(&range.max).map(move |value| (&range.column, value)));
        let accepted = spec
            .accepted
            .iter()
            .flat_map(|accepted| accepted.values.iter().map(move |value| (&accepted.column, value)));
        for (column, value) in bounds.chain(accepted) {
            let of = schema.field_with_name(column).map(|field| describe(field.data_type()))?;
            let problem =
                Problem::new(format!("`{value}` cannot be compared with `{column}`, which is {of}"))
                    .hint("Write values of the column's type: `2026-10-31` for a date, `-0.5` for a number.");
            constants.push((literal(schema, column, value), problem));
        }
        if let Some(matches) = &spec.matches {
            let pattern = matches.pattern.replace('\'', "''");
            let problem = Problem::new(format!("`{}` is no regular expression", matches.pattern))
                .hint("In YAML write it in single quotes, so that `\\d` stays what it is; look for a bracket that is not closed.");
            constants.push((format!("regexp_like('', '{pattern}')"), problem));
        }
        Ok(constants)
    }
}

/// The one expression of a SELECT that [`Check::expression`] made.
pub(super) fn condition(select: &sql::Select) -> Option<String> {
    let Statement::Query(query) = &select.statement else { return None };
    let SetExpr::Select(body) = query.body.as_ref() else { return None };
    match body.projection.as_slice() {
        [SelectItem::UnnamedExpr(expr)] if body.from.len() == 1 && body.selection.is_none() => {
            Some(expr.to_string())
        }
        _ => None,
    }
}

/// A problem of the SELECT around an expression as one of the expression, where the job file has it.
fn within(problem: Problem, expression: &str, written: &Place) -> Problem {
    let exact = problem.place.as_ref().and_then(|place| {
        let start = place.span.start.checked_sub(BEFORE.len())?;
        let end = place.span.end.checked_sub(BEFORE.len())?.min(expression.len());
        let raw = written.file.text.get(written.span.clone())?;
        let at = written.span.start + raw.find(expression)?;
        (start < end).then(|| Place { file: Arc::clone(&written.file), span: at + start..at + end })
    });
    problem.at(exact.unwrap_or_else(|| written.clone()))
}

fn first(error: Error) -> Problem {
    error
        .into_problems()
        .into_iter()
        .next()
        .unwrap_or_else(|| Problem::new("this check cannot be understood"))
}

fn has_column(relation: &str, schema: &Schema, column: &str) -> Result<(), Problem> {
    if schema.field_with_name(column).is_ok() {
        return Ok(());
    }
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let problem = Problem::new(format!("`{relation}` has no column `{column}`"));
    Err(match nearest(column, names.iter().copied()) {
        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
        None => problem.hint(format!("It has: {}.", names.join(", "))),
    })
}

async fn planned(context: &SessionContext, sql: &str) -> Result<()> {
    let state = context.state();
    let plan = state.create_logical_plan(sql).await?;
    state.analyzer().execute_and_check(plan, state.config_options(), |_, _| {})?;
    Ok(())
}

async fn evaluated(context: &SessionContext, expression: &str) -> Result<()> {
    context.sql(&format!("SELECT {expression}")).await?.collect().await?;
    Ok(())
}
