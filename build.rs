//! How the binary is linked.

#[expect(clippy::disallowed_methods, reason = "cargo says so what is built")]
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // At a fixed address: nothing is moved at every start. A run of ten rows takes 18 ms and 64 MiB so, and 21 and 77 at an address of chance
    // (ARCHITECTURE.md). A binary that holds the C library too is linked another way.
    let has = |name: &str, value: &str| {
        std::env::var(name).is_ok_and(|found| found.split(',').any(|part| part == value))
    };
    let is_static = has("CARGO_CFG_TARGET_FEATURE", "crt-static");
    if has("CARGO_CFG_TARGET_OS", "linux") && has("PROFILE", "release") && !is_static {
        println!("cargo:rustc-link-arg-bins=-no-pie");
    }
}
