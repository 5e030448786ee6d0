//! Secrets that are known, and what they look like in everything that is told.
//!
//! Options that are secrets are references in the project's files; what they resolve to is remembered here, and every message, log line and
//! record passes [`scrubbed`]. A secret shorter than six characters is not looked for: it would be found everywhere.

use std::sync::{PoisonError, RwLock};

static KNOWN: RwLock<Vec<String>> = RwLock::new(Vec::new());

const SHORTEST: usize = 6;

/// Remembers a secret, so that nothing tells it.
pub fn remember(value: &str) {
    let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
    if value.len() >= SHORTEST && !known.iter().any(|one| one == value) {
        known.push(value.to_owned());
        // What contains another must go first, or a part of it would be left.
        known.sort_by_key(|one| std::cmp::Reverse(one.len()));
    }
}

/// `text` without the secrets that are known.
pub fn scrubbed(text: &str) -> String {
    let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
    known.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "***"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_told_to_nobody() {
        remember("s3cr3t-of-a-test");
        remember("s3cr3t-of-a-test-and-more");
        assert_eq!(scrubbed("x s3cr3t-of-a-test-and-more y s3cr3t-of-a-test"), "x *** y ***");
        remember("a");
        assert_eq!(scrubbed("a banana"), "a banana");
    }
}
