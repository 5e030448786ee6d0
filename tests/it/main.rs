//! The binary as users meet it: the worked example, seeded mistakes, and rules of the house.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic")]
#![expect(clippy::print_stdout, reason = "a test may print")]

mod adhoc;
mod clocks;
mod crash;
mod example;
mod history;
mod ledger;
mod memory;
mod mistakes;
mod platform;
mod postgres;
mod reconcile;
mod replay;
mod replicate;
mod rivals;
#[path = "../services/mod.rs"]
#[expect(unreachable_pub, dead_code, reason = "shared with the unit tests, which use the rest")]
mod services;
mod support;
mod targets;
mod tidy;
mod troubles;
mod wire;
