//! The `floodmark` binary: arguments in, exit code out.

use std::process::ExitCode;

/// Keeps less of what was let go than the C library does: large batches come and go.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    floodmark::cli::main()
}
