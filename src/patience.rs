//! Whether a run that failed is tried again, and after how long.
//!
//! | what happened | then |
//! | --- | --- |
//! | [`Temporary`](ErrorKind::Temporary): a connection was lost, a lock was not to be had, a server starts anew | again, from what the target says |
//! | [`Memory`](ErrorKind::Memory): a hash join did not fit | once more, with joins that sort and spill ([`crate::run`]) |
//! | [`Busy`](ErrorKind::Busy): another run was faster | not here: that one does the work |
//! | anything else | no: it would happen again |
//!
//! Waits grow, are cut at random, so that runs that failed together do not come back together, and end, by number and by time.

use std::time::Duration;

use crate::error::ErrorKind;

/// How often and how long a run tries again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// How often, after the first time.
    pub retries: u32,
    /// How long after the first try another one may still begin.
    pub within: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { retries: 3, within: Duration::from_secs(600) }
    }
}

/// The first wait; each one after it is four times as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// No wait is longer.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

impl Patience {
    /// How long to wait before the next try, at most, if there is one: after `failed` tries, of which the first began `since` ago,
    /// and the last ended like this.
    pub fn next(self, ended: ErrorKind, failed: u32, since: Duration) -> Option<Duration> {
        let growth = 4_u32.saturating_pow(failed.saturating_sub(1));
        let wait = FIRST_WAIT.saturating_mul(growth).min(LONGEST_WAIT);
        let again = ended == ErrorKind::Temporary
            && failed <= self.retries
            && since.saturating_add(wait) <= self.within;
        again.then_some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again_within_bounds_and_nothing_else() {
        let patience = Patience { retries: 3, within: Duration::from_secs(20) };
        let [half, two, eight] = [500, 2_000, 8_000].map(Duration::from_millis);
        #[rustfmt::skip]
        let cases = [
            // how it ended           tries  since  wait
            (ErrorKind::Temporary,     1,     0,    Some(half)),
            (ErrorKind::Temporary,     2,     1,    Some(two)),
            (ErrorKind::Temporary,     3,     4,    Some(eight)),
            (ErrorKind::Temporary,     4,    13,    None),
            (ErrorKind::Temporary,     3,    12,    Some(eight)),
            (ErrorKind::Temporary,     3,    13,    None),
            (ErrorKind::Temporary,     1,    20,    None),
            (ErrorKind::Busy,          1,     0,    None),
            (ErrorKind::Failed,        1,     0,    None),
            (ErrorKind::Memory,        1,     0,    None),
            (ErrorKind::Configuration, 1,     0,    None),
            (ErrorKind::Data,          1,     0,    None),
            (ErrorKind::Interrupted,   1,     0,    None),
            (ErrorKind::Bug,           1,     0,    None),
        ];
        for (ended, failed, since, expected) in cases {
            let wait = patience.next(ended, failed, Duration::from_secs(since));
            assert_eq!(wait, expected, "{ended:?} after {failed} tries and {since} s");
        }
        let long = Patience { retries: u32::MAX, within: Duration::MAX };
        assert_eq!(long.next(ErrorKind::Temporary, 60, Duration::ZERO), Some(LONGEST_WAIT));
    }
}
