//! Whether a run may follow the last one: the target is still the one that its record tells of, and every mark belongs to what
//! is read now.
//!
//! | found | then |
//! | --- | --- |
//! | another incarnation than this machine remembers | refused: another history |
//! | an older release than this machine remembers | said: it was restored, and what came after is read again |
//! | no record, and an output holds rows | refused: nobody knows what was loaded |
//! | an output that the record does not know holds rows | refused: they are somebody else's |
//! | an output holds fewer rows than the record says, and this run writes only what is new | refused: somebody removed them |
//! | it holds more | said |
//! | a new output would get only what is new of a source that was read before | refused |
//! | a source reads something else than its mark is of | refused |
//! | a new source reads what one that is gone did | it goes on from there, and that is said |
//!
//! `--full-refresh` needs no history: it only minds rows that are somebody else's.
//!
//! Rows of outputs that the record knows are counted while the run goes on ([`of_outputs`]): that takes as long as a table is large, and a run
//! as long as it has to.

use std::collections::BTreeSet;

use crate::{
    connector::{Counting, Marks, Target},
    error::{Error, Result},
    plan::Plan,
    record::LoadRecord,
    state::Seen,
};

/// Rows that are counted in less than a tenth of a second. Tests have fewer.
const MANY_ROWS: u64 = if cfg!(test) { 2 } else { 2_000_000 };

/// How a job is loaded anew.
const ANEW: &str =
    "`floodmark run --full-refresh` loads it anew, and shows the old rows until the new ones are audited.";

/// Refuses a target that is another one than last time, and outputs that hold somebody else's rows. What is worth a word is said in `warnings`.
///
/// # Errors
///
/// See the table above.
pub async fn of_target(
    plan: &Plan,
    target: &dyn Target,
    base: Option<&LoadRecord>,
    seen: Option<Seen>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    match (base, seen) {
        (Some(base), Some(seen)) if base.incarnation == seen.incarnation && base.seq < seen.seq => {
            warnings.push(format!(
                "the target is at release {}, and the last run here left release {}: it was set back, and what came after is read again",
                base.seq, seen.seq
            ));
        }
        (None, Some(seen)) => warnings.push(format!(
            "the target remembers nothing of this job, and the last run here left release {}: it is filled anew",
            seen.seq
        )),
        _ => {}
    }
    if let (Some(base), Some(Seen { incarnation: remembered, .. })) = (base, seen)
        && base.incarnation != remembered
    {
        return Err(Error::data(format!(
            "the target of job `{}` is not the one of last time: its history began anew",
            plan.id
        ))
        .note(format!("it is incarnation {}, and the last run here saw {remembered}", base.incarnation))
        .hint(format!(
            "If that is right, go on with it: `floodmark state adopt {}`; if not, mend the connection.",
            plan.id.job
        )));
    }
    for output in &plan.outputs {
        let name = &output.spec.name;
        if base.is_none_or(|base| !base.outputs.contains_key(name))
            && target.current(&plan.id, name).await?.is_some_and(|current| current.rows > 0)
        {
            return Err(Error::data(format!(
                "output `{name}` holds rows, and no record of job `{}`",
                plan.id
            ))
            .note("floodmark did not write them, or its record was deleted: it cannot know what was loaded")
            .hint("Move the old rows away, or give the output another name."));
        }
    }
    Ok(())
}

/// Counts the rows that outputs hold, each for whoever waits for it, and refuses what the last release is no longer true of; many rows when they are
/// wanted, so that those that are loaded do not wait for a processor. What is worth a word is given back.
///
/// # Errors
///
/// See the table above.
pub async fn of_outputs(
    plan: &Plan,
    target: &dyn Target,
    base: Option<&LoadRecord>,
    full_refresh: bool,
    counting: Counting,
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    let known = plan.outputs.iter().filter_map(|output| {
        let before = base?.outputs.get(&output.spec.name)?;
        Some((output, before))
    });
    let mut outputs: Vec<_> = known.collect();
    outputs.sort_by_key(|(_, before)| before.rows_after > MANY_ROWS);
    let mut wanted = false;
    for (output, before) in outputs {
        let name = &output.spec.name;
        if before.rows_after > MANY_ROWS && !wanted {
            counting.wanted().await;
            wanted = true;
        }
        let rows = target.current(&plan.id, name).await?.map(|current| current.rows);
        if let Some(rows) = rows {
            counting.tell(name, rows);
        }
        let found = rows.unwrap_or(0);
        if found > before.rows_after {
            warnings.push(format!(
                "output `{name}` holds {found} rows, and the last release left {}: somebody else writes there",
                before.rows_after
            ));
        } else if found < before.rows_after && !full_refresh && !output.spec.mode.replaces_all() {
            let what = if rows.is_none() { "is gone".to_owned() } else { format!("holds {found} rows") };
            return Err(Error::data(format!(
                "output `{name}` {what}, and the last release left {}",
                before.rows_after
            ))
            .note("this run would only add what is new, and what is missing would stay missing")
            .hint(format!("{ANEW} `floodmark state adopt {}` takes it as it is.", plan.id.job)));
        }
    }
    Ok(warnings)
}

/// Whether another run has overtaken this one since it began. Its load must be let go by then: it may hold what the target is asked for.
///
/// # Errors
///
/// If the target cannot be asked.
pub async fn is_overtaken(plan: &Plan, target: &dyn Target, base: Option<&LoadRecord>) -> Result<bool> {
    let newest = target.last_record(&plan.id).await?;
    Ok(newest.map(|newest| newest.seq) != base.map(|base| base.seq))
}

/// The marks to go on from.
///
/// # Errors
///
/// If a source reads something else now, or an output would get only a part of what a source has.
pub fn marks(plan: &Plan, base: Option<&LoadRecord>, warnings: &mut Vec<String>) -> Result<Marks> {
    let Some(base) = base else { return Ok(Marks::new()) };
    let mut marks = base.marks();
    for (name, stream) in plan.streams.iter().filter(|(_, stream)| stream.partial) {
        let reads = stream.identity();
        match base.sources.get(name) {
            Some(known) if known.mark.is_some() && !known.reads.is_empty() && known.reads != reads => {
                return Err(Error::data(format!(
                    "source `{name}` reads {reads}, and its watermark is of {}",
                    known.reads
                ))
                .note("the watermark of one says nothing about the other: rows would be left out")
                .hint(format!(
                    "Give it another name in the job, so that it is read from its start. {ANEW}"
                )));
            }
            Some(_) => {}
            None => {
                let gone = |(other, known): &(&String, &crate::record::SourceRecord)| {
                    !plan.streams.contains_key(*other) && known.reads == reads && known.mark.is_some()
                };
                if let Some((other, known)) = base.sources.iter().find(gone) {
                    warnings.push(format!(
                        "source `{name}` reads {reads}, as `{other}` did, and goes on where that ended"
                    ));
                    marks.extend(known.mark.clone().map(|mark| (name.clone(), mark)));
                }
            }
        }
    }
    for output in plan.outputs.iter().filter(|output| !base.outputs.contains_key(&output.spec.name)) {
        let upstream: BTreeSet<&str> = plan.upstream(&output.from);
        if let Some(source) = upstream.iter().find(|source| {
            marks.contains_key(**source) && plan.streams.get(**source).is_some_and(|stream| stream.partial)
        }) {
            return Err(Error::data(format!(
                "output `{}` is new, and would get only what is new of source `{source}`",
                output.spec.name
            ))
            .hint(ANEW));
        }
    }
    Ok(marks)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::FutureExt;

    use crate::connector::Held;

    #[tokio::test]
    async fn many_rows_are_counted_when_somebody_wants_to_know() {
        let (counting, held) = Held::counting();
        assert!(counting.wanted().now_or_never().is_none());
        let mut rows = pin!(held.of("lines"));
        assert!(rows.as_mut().now_or_never().is_none());
        assert!(counting.wanted().now_or_never().is_some());
        counting.tell("lines", 3);
        assert_eq!(rows.await, Some(3));
        drop(counting);
        assert_eq!(held.of("others").await, None);
    }
}
