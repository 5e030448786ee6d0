//! From models to a release: stage every output, audit, commit or discard.

use crate::{
    connector::{Staged, spec::OutputSpec},
    error::{Error, Result},
    names::JobId,
};

/// Refuses keys that are null or come twice.
///
/// # Errors
///
/// How many of them there are, and what to do.
pub fn refuse_keys(output: &OutputSpec, nulls: u64, twice: u64) -> Result<()> {
    let key = output.key.join(", ");
    if nulls > 0 {
        return Err(Error::data(format!(
            "output `{}`: the key ({key}) is null in {nulls} {}",
            output.name,
            rows(nulls)
        ))
        .hint(
            "Leave such rows out in the model, or set them aside with `not_null` and `on_fail: quarantine`.",
        ));
    }
    if twice > 0 {
        return Err(Error::data(format!(
            "output `{}`: {twice} {} of ({key}) come more than once in this run",
            output.name,
            if twice == 1 { "value" } else { "values" }
        ))
        .hint("Say which row wins: `latest_by: updated_at` on the output; or make the key complete."));
    }
    Ok(())
}

/// Refuses a commit that changed other rows than were announced: inserted, updated, deleted.
///
/// # Errors
///
/// What was announced, and what was found.
pub fn as_announced(output: &OutputSpec, staged: &Staged, found: (u64, u64, u64)) -> Result<()> {
    let announced = (staged.inserted, staged.updated, staged.deleted);
    if found != announced {
        return Err(changed(output)
            .note(format!("announced {announced:?}, found {found:?} (inserted, updated, deleted)")));
    }
    Ok(())
}

/// Why an attempt is rejected that counted what is not there any more.
pub fn changed(output: &OutputSpec) -> Error {
    Error::temporary(format!("output `{}` was changed by somebody else while this run went on", output.name))
        .hint("Nothing was published. Run again.")
}

/// Why an attempt is rejected whose sequence number is not the next one.
pub fn overtaken(job: &JobId) -> Error {
    Error::busy(format!("another run of `{job}` committed first"))
        .hint("Nothing of this run was published. Run again: it starts where the other ended.")
}

/// Why an attempt is rejected that staged for other columns than the output has now.
pub fn reshaped(output: &OutputSpec) -> Error {
    Error::temporary(format!(
        "the columns of output `{}` were changed by somebody else while this run went on",
        output.name
    ))
    .hint("Nothing was published. Run again.")
}

fn rows(count: u64) -> &'static str {
    if count == 1 { "row" } else { "rows" }
}
