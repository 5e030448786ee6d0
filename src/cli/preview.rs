//! Rows of a source or model, nothing written, no mark moved: `preview`, and `sql` and `copy` without a project.

use std::sync::Arc;

use arrow::array::RecordBatch;
use datafusion::{physical_plan::SendableRecordBatchStream, prelude::SessionContext};

use crate::{
    connector::{
        Marks, RunTime,
        scan::{OpenSource, OpenSources},
        tap::Tap,
    },
    error::{Error, Result, nearest},
    names::quoted,
    plan::{self, Request, scan_table, typed},
    run::Conductor,
    runtime::Clock,
    session,
};

/// The first `limit` rows of a relation, as a first run would see it.
pub(super) async fn preview(
    conductor: &Conductor,
    job: &str,
    relation: Option<&str>,
    limit: usize,
    request: &Request,
) -> Result<Vec<RecordBatch>> {
    let (context, relation) = relations(conductor, job, relation, request).await?;
    Ok(context.sql(&format!("SELECT * FROM {} LIMIT {limit}", quoted(&relation)?)).await?.collect().await?)
}

/// All rows of what the first output of a job holds.
pub(super) async fn stream(
    conductor: &Conductor,
    job: &str,
    request: &Request,
) -> Result<SendableRecordBatchStream> {
    let (context, relation) = relations(conductor, job, None, request).await?;
    Ok(context.sql(&format!("SELECT * FROM {}", quoted(&relation)?)).await?.execute_stream().await?)
}

/// A session that knows a job's sources and models; and the relation, or what the first output holds.
async fn relations(
    conductor: &Conductor,
    job: &str,
    relation: Option<&str>,
    request: &Request,
) -> Result<(SessionContext, String)> {
    let document = conductor.project.jobs.get(job).ok_or_else(|| Error::bug("no such job"))?;
    let connections = conductor.connections(document)?;
    let plan = plan::plan(
        &conductor.project,
        document,
        request,
        &plan::Promised::new(),
        &connections,
        &conductor.scratch,
    )
    .await?;
    let relation =
        relation.or_else(|| plan.outputs.first().map(|output| output.from.as_str())).unwrap_or_default();
    let known: Vec<&str> = plan.streams.keys().chain(plan.models.keys()).map(String::as_str).collect();
    if !known.contains(&relation) {
        let error = Error::configuration(format!("job `{job}` has no source or model `{relation}`"));
        return Err(match nearest(relation, known.iter().copied()) {
            Some(near) => error.hint(format!("Did you mean `{near}`?")),
            None => error.hint(format!("There are: {}.", known.join(", "))),
        });
    }
    let clock: &dyn Clock = conductor.clock.as_ref();
    let time = RunTime { now: clock.now(), as_of: request.as_of };
    let mut open = OpenSources::default();
    let mut windows = std::collections::HashMap::new();
    for (name, stream) in &plan.streams {
        let connection =
            connections.get(&stream.connection).ok_or_else(|| Error::bug("a source is not open"))?;
        let source = connection.source().ok_or_else(|| Error::bug("a source cannot be read"))?;
        let specs = [stream.spec.clone()];
        let bounds = source.bounds(&specs, &Marks::new(), time).await?;
        let snapshot = source.snapshot(&specs, &bounds).await?;
        windows.extend(bounds.windows);
        open.0.insert(
            name.clone(),
            OpenSource { connection: Arc::clone(connection), snapshot, tap: Arc::new(Tap::default()) },
        );
    }
    let context = session::for_models(&conductor.scratch, request.as_of, Arc::new(open));
    for (name, stream) in &plan.streams {
        let window = windows.remove(name).unwrap_or(crate::watermark::Window::Whole);
        context.register_table(name, Arc::new(scan_table(stream, window)))?;
        if stream.spool {
            let spool = crate::spool::Spool::of(
                name,
                context.table(name).await?.execute_stream().await?,
                &conductor.scratch,
            )
            .await?;
            context.deregister_table(name)?;
            context.register_table(name, spool.table()?)?;
        }
    }
    for (name, model) in &plan.models {
        let view = typed(&context, &model.select).await?;
        let view = context.execute_logical_plan(view).await?;
        if model.spool {
            let spool =
                crate::spool::Spool::of(name, view.execute_stream().await?, &conductor.scratch).await?;
            context.register_table(name, spool.table()?)?;
        } else {
            context.register_table(name, view.into_view())?;
        }
    }
    Ok((context, relation.to_owned()))
}
