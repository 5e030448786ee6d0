//! SQL files: parsed once, parameters bound, tables named; and DataFusion's errors put back into them.

use std::{collections::BTreeSet, ops::ControlFlow, sync::Arc};

use datafusion::{
    error::DataFusionError,
    sql::{parser::Statement as DataFusionStatement, resolve::resolve_table_references},
};
use indexmap::IndexMap;
use sqlparser::{
    ast::{DataType, Expr, Spanned, Statement, TypedString, Value, visit_expressions_mut, visit_relations},
    dialect::GenericDialect,
    parser::{Parser, ParserError},
    tokenizer::{Location, Span},
};

use crate::{
    error::{Error, Place, Problem, Result, SourceText, nearest},
    functions::rules,
    job::param::Param,
};

/// One SELECT, with its parameters bound.
#[derive(Debug, Clone)]
pub struct Select {
    /// The file.
    pub file: Arc<SourceText>,
    /// The statement.
    pub statement: Statement,
    /// The tables that it reads.
    pub reads: BTreeSet<String>,
}

/// Parses one SELECT.
///
/// # Errors
///
/// What is not SQL, is no SELECT, or names an unknown parameter; with its place.
pub fn parse(file: &Arc<SourceText>, params: &IndexMap<String, Param>) -> Result<Select> {
    let mut statements =
        Parser::parse_sql(&GenericDialect {}, &file.text).map_err(|error| parser_problem(&error, file))?;
    if statements.len() != 1 {
        let problem = Problem::new(format!("`{}` holds {} statements", file.path, statements.len()));
        return Err(problem
            .at(Place::whole(file))
            .hint("A file of SQL holds one SELECT and nothing else.")
            .into());
    }
    let Some(mut statement @ Statement::Query(_)) = statements.pop() else {
        let problem = Problem::new(format!("`{}` is no SELECT", file.path));
        return Err(problem
            .at(first_word(file))
            .hint("Models and checks only read: write one SELECT, with WITH before it if you like.")
            .into());
    };
    let mut unknown = None;
    let bound: ControlFlow<()> = visit_expressions_mut(&mut statement, |expr| {
        if let Expr::Value(value) = expr
            && let Value::Placeholder(name) = &value.value
        {
            match params.get(name.trim_start_matches('$')) {
                Some(param) => *expr = param.expression(),
                None => {
                    unknown = Some((name.clone(), value.span));
                    return ControlFlow::Break(());
                }
            }
        }
        // A timestamp has microseconds here, whoever writes it; DataFusion would take nanoseconds, which end in 2262.
        if let Expr::Cast { data_type, .. } | Expr::TypedString(TypedString { data_type, .. }) = expr
            && let DataType::Timestamp(precision @ None, _) = data_type
        {
            *precision = Some(6);
        }
        ControlFlow::Continue(())
    });
    if let (ControlFlow::Break(()), Some((name, span))) = (bound, unknown) {
        let problem = Problem::new(format!("there is no parameter `{name}`")).at(place(file, span));
        let bare = name.trim_start_matches('$');
        return Err(match nearest(bare, params.keys().map(String::as_str)) {
            Some(near) => problem.hint(format!("Did you mean `${near}`?")),
            None => {
                problem.hint(format!("Declare it in the job: `params: {{ {bare}: {{ type: string }} }}`."))
            }
        }
        .into());
    }
    let wrapped = DataFusionStatement::Statement(Box::new(statement.clone()));
    let (tables, _) = resolve_table_references(&wrapped, true).map_err(|error| problem(&error, file))?;
    let reads = tables.iter().map(|table| table.table().to_owned()).collect();
    Ok(Select { file: Arc::clone(file), statement, reads })
}

impl Select {
    /// Where the table `name` is named.
    pub fn place_of(&self, name: &str) -> Place {
        let mut found = None;
        let walk: ControlFlow<()> = visit_relations(&self.statement, |relation| {
            let last =
                relation.0.last().and_then(|part| part.as_ident()).map(|ident| ident.value.to_lowercase());
            if last.as_deref() == Some(name) {
                found = Some(relation.span());
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        debug_assert_eq!(walk.is_break(), found.is_some());
        found.map_or_else(|| Place::whole(&self.file), |span| place(&self.file, span))
    }

    /// The statement as DataFusion takes it.
    pub fn for_datafusion(&self) -> DataFusionStatement {
        DataFusionStatement::Statement(Box::new(self.statement.clone()))
    }
}

/// The first word that is no comment.
fn first_word(file: &Arc<SourceText>) -> Place {
    let mut at = 0;
    for line in file.text.split_inclusive('\n') {
        let blank = line.len() - line.trim_start().len();
        if !line.trim().is_empty() && !line.trim_start().starts_with("--") {
            let start = at + blank;
            let length = line.trim_start().find(char::is_whitespace).unwrap_or(1);
            return Place { file: Arc::clone(file), span: start..start + length };
        }
        at += line.len();
    }
    Place::whole(file)
}

/// A place from the parser's lines and columns.
pub fn place(file: &Arc<SourceText>, span: Span) -> Place {
    Place::between(file, (span.start.line, span.start.column), (span.end.line, span.end.column))
}

fn parser_problem(error: &ParserError, file: &Arc<SourceText>) -> Problem {
    let text = error.to_string();
    let (message, at) = match text.rsplit_once(" at Line: ") {
        Some((message, at)) => (message.to_owned(), Some(at)),
        None => (text.clone(), None),
    };
    let location = at.and_then(|at| {
        let (line, column) = at.split_once(", Column: ")?;
        Some(Location { line: line.trim().parse().ok()?, column: column.trim().parse().ok()? })
    });
    let message = message.trim_start_matches("sql parser error: ").to_owned();
    let problem = Problem::new(format!("this is not SQL: {message}")).hint(
        "Look at the words just before this place: a comma, a bracket or a keyword is missing or too many.",
    );
    match location {
        Some(location) => {
            let start = file.byte_of((location.line, location.column)).unwrap_or(0);
            problem.at(Place::word(file, start))
        }
        None => {
            problem.at(Place { file: Arc::clone(file), span: file.text.trim_end().len()..file.text.len() })
        }
    }
}

/// Where names and types can be looked up.
pub(crate) const LOOK_UP: &str =
    "`floodmark plan JOB --output json` lists the columns and types of every source and model.";

/// An error of DataFusion's planner as a mistake in the file.
pub fn problem(error: &DataFusionError, file: &Arc<SourceText>) -> Problem {
    if let DataFusionError::External(inner) = error.find_root()
        && let Some(ours) = inner.downcast_ref::<Error>()
        && let Some(first) = ours.problems().first()
    {
        let mut first = first.clone();
        first.place.get_or_insert_with(|| Place::whole(file));
        return first;
    }
    let Some(diagnostic) = error.diagnostic() else {
        let text = error.strip_backtrace();
        let text = Error::from(DataFusionError::Plan(text)).to_string();
        let text = text.trim_start_matches("type_coercion").trim_start_matches("caused by").trim().to_owned();
        return Problem::new(text).at(Place::whole(file)).hint(LOOK_UP);
    };
    let span = diagnostic.span.or_else(|| diagnostic.notes.iter().find_map(|note| note.span));
    let mut problem = Problem::new(diagnostic.message.clone());
    problem = problem.at(span.map_or_else(|| Place::whole(file), |span| rules::place(file, span)));
    let possible: Vec<&str> = diagnostic
        .notes
        .iter()
        .filter_map(|note| note.message.strip_prefix("possible column "))
        .map(|column| column.rsplit('.').next().unwrap_or(column))
        .collect();
    for note in diagnostic.notes.iter().filter(|note| !note.message.starts_with("possible column ")) {
        problem = problem.note(note.message.clone());
    }
    let hint = match (diagnostic.helps.first(), possible.as_slice()) {
        (Some(help), _) => help.message.clone(),
        (None, []) => LOOK_UP.to_owned(),
        (None, [one]) => format!("Did you mean `{one}`?"),
        (None, several) => format!("Did you mean one of {}?", several.join(", ")),
    };
    problem.hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_have_microseconds_whoever_writes_them() {
        let text = "SELECT timestamp '9999-12-31', x::timestamptz, cast(x AS timestamp(3)) FROM t";
        let file = Arc::new(SourceText { path: "a.sql".to_owned(), text: text.to_owned() });
        let statement = parse(&file, &IndexMap::new()).unwrap().statement.to_string();
        for expected in ["TIMESTAMP(6) '9999-12-31'", "TIMESTAMPTZ(6)", "TIMESTAMP(3)"] {
            assert!(statement.contains(expected), "{statement}");
        }
    }
}
