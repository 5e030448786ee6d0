//! The project's folder.
pub mod validate;
pub mod yaml;
