//! How the binary is linked.

#[expect(clippy::disallowed_methods, reason = "cargo says so what is built")]
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // At a fixed address: nothing is moved at every start. A run of ten rows takes 18 ms and 64 MiB so, and 21 and 77 at an address of chance.
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|found| found == value);
    if is("CARGO_CFG_TARGET_OS", "linux") && is("PROFILE", "release") {
        println!("cargo:rustc-link-arg-bins=-no-pie");
    }
}
