//! The `floodmark` binary: arguments in, exit code out.

use std::process::ExitCode;

fn main() -> ExitCode {
    floodmark::cli::main()
}
