//! `tables: gl.*`: one source and one output for each table that matches, before the job is planned.
//!
//! What is not said is taken from the table: its primary key is the output's key, and `incremental` holds for the tables that have
//! the cursor's columns; the others are read whole.

use std::{collections::BTreeMap, sync::Arc};

use globset::{GlobBuilder, GlobMatcher};
use indexmap::IndexMap;

use crate::{
    connector::{CatalogTable, Connection},
    error::{Error, Place, Problem, Result, nearest},
    job::{JobFile, SourceSpec},
    plan::Promised,
    project::{output_name_problem, yaml::Document},
};

/// The job with its patterns replaced by what they match; `None` if it has none.
///
/// # Errors
///
/// Every pattern that matches nothing, or whose tables cannot be told apart.
pub async fn expand(
    job: &JobFile,
    document: &Document,
    connections: &BTreeMap<String, Arc<dyn Connection>>,
    promised: &Promised,
) -> Result<Option<JobFile>> {
    if job.sources.values().all(|source| source.tables.is_none()) {
        return Ok(None);
    }
    let mut expanded = JobFile { sources: IndexMap::new(), ..job.clone() };
    expanded
        .target
        .outputs
        .retain(|_, output| job.sources.get(&output.from).is_none_or(|source| source.tables.is_none()));
    let mut problems = Vec::new();
    for (name, source) in &job.sources {
        let (Some(pattern), Some(connection)) = (&source.tables, &source.connection) else {
            expanded.sources.insert(name.clone(), source.clone());
            continue;
        };
        let place = document.place(&["sources", name, "tables"]);
        let Some(open) = connections.get(connection) else { continue };
        let will_be: Vec<CatalogTable> = promised
            .iter()
            .filter(|((of, _), _)| of == connection)
            .map(|((_, output), promised)| CatalogTable {
                name: output.clone(),
                schema: None,
                view: false,
                columns: promised
                    .schema
                    .fields()
                    .iter()
                    .map(|field| (field.name().clone(), field.data_type().to_string()))
                    .collect(),
                key: promised.key.clone(),
                rows: None,
            })
            .collect();
        let mut tables = match open.discover().await {
            Ok(tables) => tables,
            // What is not there yet will be made by another job.
            Err(_) if !will_be.is_empty() => Vec::new(),
            Err(error) => return Err(error.at(place)),
        };
        tables.extend(
            will_be
                .into_iter()
                .filter(|new| tables.iter().all(|table| table.name != new.name))
                .collect::<Vec<_>>(),
        );
        tables.sort_by(|a, b| a.name.cmp(&b.name));
        match matching(&tables, pattern, &source.except) {
            Ok(found) if found.is_empty() => {
                let problem = Problem::new(format!(
                    "source `{name}`: no table of connection `{connection}` matches `{pattern}`"
                ))
                .at(place);
                let names = tables.iter().map(|table| table.name.as_str());
                problems.push(match nearest(pattern, names.clone()) {
                    Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                    None => {
                        problem.hint(format!("It has: {}.", names.take(12).collect::<Vec<_>>().join(", ")))
                    }
                });
            }
            Ok(found) => {
                for unknown in source
                    .each
                    .keys()
                    .filter(|each| found.iter().all(|table| bare(&table.name) != each.as_str()))
                {
                    let problem =
                        Problem::new(format!("source `{name}`: `{pattern}` matches no table `{unknown}`"))
                            .at(document.key_place(&["sources", name, "each", unknown]));
                    problems.push(match nearest(unknown, found.iter().map(|table| bare(&table.name))) {
                        Some(near) => problem.hint(format!("Did you mean `{near}`?")),
                        None => problem.hint("Remove it."),
                    });
                }
                for table in found {
                    if let Err(problem) = one(job, &mut expanded, name, source, table, &place) {
                        problems.push(problem.at(place.clone()));
                    }
                }
            }
            Err(problem) => problems.push(problem.at(place)),
        }
    }
    Error::of(crate::error::ErrorKind::Configuration, problems)?;
    Ok(Some(expanded))
}

/// A table's name without its schema.
fn bare(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The tables that a pattern means. Views are meant only by their own names.
fn matching<'a>(
    tables: &'a [CatalogTable],
    pattern: &str,
    except: &[String],
) -> Result<Vec<&'a CatalogTable>, Problem> {
    let glob = |pattern: &str| -> Result<(GlobMatcher, bool), Problem> {
        let built = GlobBuilder::new(pattern).build().map_err(|error| {
            Problem::new(format!("`{pattern}` is no pattern")).note(error.to_string()).hint("Such as `gl.*`.")
        })?;
        Ok((built.compile_matcher(), pattern.contains('.')))
    };
    let wanted = glob(pattern)?;
    let except = except.iter().map(|pattern| glob(pattern)).collect::<Result<Vec<_>, _>>()?;
    // Where there are schemas, a pattern without a point means the tables of the one that names without a point are in.
    let hit = |(matcher, dotted): &(GlobMatcher, bool), table: &CatalogTable| match &table.schema {
        Some(schema) if *dotted => matcher.is_match(format!("{schema}.{}", bare(&table.name))),
        Some(_) => !table.name.contains('.') && matcher.is_match(&table.name),
        None => matcher.is_match(&table.name),
    };
    Ok(tables
        .iter()
        .filter(|table| hit(&wanted, table) && (!table.view || table.name == pattern))
        .filter(|table| !except.iter().any(|except| hit(except, table)))
        .collect())
}

/// Adds one table's source and outputs.
fn one(
    job: &JobFile,
    expanded: &mut JobFile,
    pattern: &str,
    shared: &SourceSpec,
    table: &CatalogTable,
    place: &Place,
) -> Result<(), Problem> {
    let table_name = bare(&table.name);
    let name: String = table_name
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' })
        .collect();
    let name = if name.starts_with(|c: char| c.is_ascii_lowercase()) { name } else { format!("t_{name}") };
    if expanded.sources.contains_key(&name) || expanded.models.contains_key(&name) {
        return Err(Problem::new(format!(
            "source `{pattern}`: there is another source or model `{name}`, and a table of that name"
        ))
        .hint("Leave one out with `except:`, or replicate each schema by a job of its own."));
    }
    let own = shared.each.get(table_name).cloned().unwrap_or_default();
    let has = |column: &String| table.columns.iter().any(|(known, _)| known == column);
    let incremental = match own.incremental {
        Some(own) => Some(own),
        None => shared.incremental.clone().filter(|incremental| incremental.cursor.to_vec().iter().all(has)),
    };
    let columns = shared.columns.iter().filter(|(column, _)| has(column)).chain(&own.columns);
    let unfit = shared.unfit_as_null.iter().filter(|column| has(column)).chain(&own.unfit_as_null);
    let source = SourceSpec {
        table: Some(table.name.clone()),
        tables: None,
        except: Vec::new(),
        each: IndexMap::new(),
        columns: columns.map(|(column, of)| (column.clone(), of.clone())).collect(),
        incremental,
        unfit_as_null: unfit.cloned().collect(),
        timezone: own.timezone.or_else(|| shared.timezone.clone()),
        ..shared.clone()
    };
    expanded.sources.insert(name.clone(), source);
    for (output, spec) in job.target.outputs.iter().filter(|(_, spec)| spec.from == pattern) {
        let mut spec = spec.clone();
        spec.from.clone_from(&name);
        if !own.key.is_empty() {
            spec.key.clone_from(&own.key);
        } else if spec.key.is_empty() {
            spec.key.clone_from(&table.key);
        }
        if spec.key.is_empty() && spec.mode.needs_key() {
            return Err(Problem::new(format!("source `{pattern}`: table `{table_name}` has no primary key, and `mode: {}` needs one", spec.mode))
                .hint(format!("Name columns that tell its rows apart: `each: {{ {table_name}: {{ key: [id] }} }}`; or leave it out with `except:`.")));
        }
        let named = output.replacen('*', table_name, 1);
        if let Some(problem) = output_name_problem(&named, place.clone()) {
            return Err(problem
                .note(format!("it would be made from table `{table_name}`; leave that out with `except:`")));
        }
        if expanded.target.outputs.insert(named.clone(), spec).is_some() {
            return Err(Problem::new(format!("source `{pattern}`: table `{table_name}` would become output `{named}`, and there is one of that name"))
                .hint("Leave the table out with `except:`, or give one of the outputs another name."));
        }
    }
    Ok(())
}
