//! SQL semantics for money: what floodmark changes in DataFusion's SQL.
//!
//! | expression | DataFusion | here |
//! | --- | --- | --- |
//! | `a + b`, `-`, `*`, `/`, `%` of whole numbers and decimals | may wrap, or exceed its digits | an error |
//! | `cast(x as …)` that loses digits | rounds or cuts | an error; `round` first, or `try_cast` |
//! | `sum`, `avg` | may wrap | decimals that cannot |
//! | `now()`, `current_date` | the clock | the run's `as_of` |
//! | a naive timestamp compared with a zoned one | coerced | an error |
//!
//! The first two are analyzer rules ([`rules`]) that run after types are settled; so they hold in models, in checks and
//! in joins alike.

pub mod arithmetic;
pub mod cast;
pub mod now;
pub mod rules;
pub mod sum;
