//! floodmark: a batch data-integration and ETL engine.
//!
//! ```text
//! jobs/*.yaml, sql/**      job ──► plan ──► extract ──► model ──► check ──► load ──► record
//! ```
//!
//! Start at [`run`]: it walks these milestones. [`connector`] says what a source and a target promise, [`functions`] what SQL
//! means here, [`watermark`] how windows follow each other. The binary is [`cli`] and nothing else.

pub mod budget;
pub mod check;
pub mod cli;
pub mod connector;
pub mod dimension;
pub mod error;
pub mod extract;
pub mod functions;
pub mod history;
pub mod job;
pub mod lateness;
#[cfg(test)]
mod leaky;
pub mod lease;
pub mod load;
pub mod model;
#[cfg(test)]
mod mortal;
pub mod names;
pub mod patience;
pub mod plan;
pub mod project;
pub mod reconcile;
pub mod record;
mod release;
pub mod replay;
pub mod run;
pub mod runtime;
pub mod secret;
pub mod session;
pub mod spool;
pub mod state;
pub mod types;
pub mod watermark;
