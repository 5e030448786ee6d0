//! The memory of a run: one budget for joins, sorts, aggregates and spools, and a share that is left to those who read and write.
//!
//! DataFusion counts what its operators say they hold, and they do not say all. What is known of that is counted here: a hash join
//! holds its smaller side twice while it is put together. Sources say what they have under way, and outputs into files and buckets what they have
//! not written yet ([`Share`]): a part of the limit is theirs alone. What makes them faster they take from it only; what they cannot
//! do without they also take from what queries leave. A source that gets no room for one batch is an error that names it; an output closes its
//! row group.
//!
//! Not counted is what has a bound of its own: a buffer of a connection, a page of SQLite, a piece of an object that is read.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use datafusion::{
    common::resources_datafusion_err,
    error::Result,
    execution::memory_pool::{
        MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation, human_readable_size,
    },
};

use crate::runtime::BATCH_BYTES;

/// The part of a limit that sources and outputs have for themselves: a quarter, and no more than this.
const MOVING_BYTES: usize = 256 << 20;

/// The memory of a source for what it has under way, or of an output for what it has not written yet: what it cannot do without, and what makes it
/// faster.
#[derive(Debug)]
pub struct Share {
    need: MemoryReservation,
    wish: MemoryReservation,
}

impl Share {
    /// That of a source.
    pub fn of_source(name: &str, pool: &Arc<dyn MemoryPool>) -> Self {
        Self::of(&format!("{SOURCE}{name}`"), pool)
    }

    /// That of an output.
    pub fn of_output(name: &str, pool: &Arc<dyn MemoryPool>) -> Self {
        Self::of(&format!("{OUTPUT}{name}`"), pool)
    }

    fn of(who: &str, pool: &Arc<dyn MemoryPool>) -> Self {
        let need = MemoryConsumer::new(who).register(pool);
        let wish = MemoryConsumer::new(format!("{who}{AHEAD}")).register(pool);
        Self { need, wish }
    }

    /// Another one of the same source or output, of nothing yet.
    pub fn another(&self) -> Self {
        Self { need: self.need.new_empty(), wish: self.wish.new_empty() }
    }

    /// So many bytes, which there must be.
    ///
    /// # Errors
    ///
    /// If there are not.
    pub fn needs(&self, bytes: usize) -> Result<()> {
        self.need.try_resize(bytes)
    }

    /// So many bytes besides, if the part of sources and outputs has them. Whether it has; else what there is stays.
    pub fn wishes(&self, bytes: usize) -> bool {
        self.wish.try_resize(bytes).is_ok()
    }

    /// So many bytes, which are in use already.
    pub fn uses(&self, bytes: usize) {
        self.need.resize(bytes);
    }

    /// Nothing any more.
    pub fn free(&self) {
        self.need.free();
        self.wish.free();
    }
}

const SOURCE: &str = "source `";
const OUTPUT: &str = "output `";
/// Behind the name of who could do without.
const AHEAD: &str = ", ahead";

/// Bytes at which a source cuts a batch, however few rows it has: where there is little memory, a few batches of each source have room.
pub fn batch_bytes(pool: &dyn MemoryPool) -> usize {
    match pool.memory_limit() {
        MemoryLimit::Finite(limit) => (limit / 48).clamp(BATCH_BYTES / 128, BATCH_BYTES),
        MemoryLimit::Infinite | MemoryLimit::Unknown => BATCH_BYTES,
    }
}

/// Gives memory while there is some. Those who can do with less have equal shares of what the others leave: so the first of several
/// sorts does not take all, and the last one has something to spill.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    /// What queries never get.
    moving: usize,
    given: Mutex<Given>,
}

#[derive(Debug, Default)]
struct Given {
    /// How many there are who can do with less.
    sharing: usize,
    /// What they hold.
    to_sharing: usize,
    /// What the others hold.
    to_others: usize,
    /// What sources and outputs hold.
    to_moving: usize,
}

impl Given {
    fn of(&mut self, consumer: &MemoryConsumer) -> &mut usize {
        match consumer {
            moving if moves(moving) => &mut self.to_moving,
            sharing if shares(sharing) => &mut self.to_sharing,
            _ => &mut self.to_others,
        }
    }
}

impl Budget {
    /// For a process that may use `limit` bytes.
    pub fn within(limit: usize) -> Self {
        Self { limit, moving: (limit / 4).min(MOVING_BYTES), given: Mutex::default() }
    }

    /// What queries may have, of what sources and outputs leave.
    fn of_queries(&self, given: &Given) -> usize {
        self.limit.saturating_sub(self.moving.max(given.to_moving))
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A consumer as people read it.
fn shown(consumer: &MemoryConsumer) -> String {
    if moves(consumer) { consumer.name().to_owned() } else { format!("`{}`", consumer.name()) }
}

/// Whether a consumer brings rows in or takes them out.
fn moves(consumer: &MemoryConsumer) -> bool {
    [SOURCE, OUTPUT].iter().any(|kind| consumer.name().starts_with(kind))
}

/// Whether a consumer goes on with less: it spills, or merges what was spilled, fewer files at a time.
fn shares(consumer: &MemoryConsumer) -> bool {
    consumer.can_spill() || consumer.name().starts_with("ExternalSorterMerge")
}

/// What `bytes` of a consumer come to.
fn held(consumer: &MemoryConsumer, bytes: usize) -> usize {
    if consumer.name().starts_with("HashJoinInput") { bytes.saturating_mul(2) } else { bytes }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "budget of {}", human_readable_size(self.limit - self.moving))
    }
}

impl MemoryPool for Budget {
    fn name(&self) -> &'static str {
        "budget"
    }

    fn register(&self, consumer: &MemoryConsumer) {
        self.given().sharing += usize::from(shares(consumer));
    }

    fn unregister(&self, consumer: &MemoryConsumer) {
        self.given().sharing -= usize::from(shares(consumer));
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        let consumer = reservation.consumer();
        *self.given().of(consumer) += held(consumer, additional);
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        let consumer = reservation.consumer();
        *self.given().of(consumer) -= held(consumer, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let consumer = reservation.consumer();
        let more = held(consumer, additional);
        let mut given = self.given();
        let queries = given.to_sharing + given.to_others;
        let (has, may_have) = if consumer.name().ends_with(AHEAD) {
            (given.to_moving, self.moving)
        } else if moves(consumer) {
            (given.to_moving + queries, self.limit)
        } else if shares(consumer) {
            let share = self.of_queries(&given).saturating_sub(given.to_others) / given.sharing.max(1);
            // What a sort keeps back to merge with it has at once, or it cannot begin (`sort_spill_reservation_bytes`).
            (reservation.size(), share.max(self.limit / 42))
        } else {
            (queries, self.of_queries(&given))
        };
        if has.saturating_add(more) > may_have {
            return Err(resources_datafusion_err!(
                "{} asked for {} more, and {} of {} are in use",
                shown(consumer),
                human_readable_size(more),
                human_readable_size(has),
                human_readable_size(may_have)
            ));
        }
        *given.of(consumer) += more;
        Ok(())
    }

    fn reserved(&self) -> usize {
        let given = self.given();
        given.to_sharing + given.to_others + given.to_moving
    }

    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.limit - self.moving)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_comes_back_and_no_more_is_given_than_there_is() {
        let budget = Arc::new(Budget::within(1000));
        let pool: Arc<dyn MemoryPool> = Arc::clone(&budget) as _;
        let spool = MemoryConsumer::new("spool x").register(&pool);
        let join = MemoryConsumer::new("HashJoinInput[1]").register(&pool);
        spool.try_grow(250).unwrap();
        join.try_grow(250).unwrap();
        assert_eq!(budget.reserved(), 750, "the join's side is there twice");
        let told = spool.try_grow(1).unwrap_err().to_string();
        assert!(told.contains("`spool x` asked for 1"), "{told}");
        drop(join);
        spool.try_grow(500).unwrap();
        // What must be given is given, and what is over shows.
        spool.grow(10);
        assert_eq!(budget.reserved(), 760);
        drop(spool);
        assert_eq!(budget.reserved(), 0);
    }

    #[test]
    fn sources_and_outputs_have_a_part_of_their_own_and_what_queries_leave() {
        let budget = Arc::new(Budget::within(1000));
        let pool: Arc<dyn MemoryPool> = Arc::clone(&budget) as _;
        let spool = MemoryConsumer::new("spool x").register(&pool);
        let (source, output) = (Share::of_source("a", &pool), Share::of_output("b", &pool));
        spool.try_grow(750).unwrap();
        source.needs(100).unwrap();
        assert!(output.wishes(150));
        let told = source.needs(101).unwrap_err().to_string();
        assert!(told.contains("source `a` asked for 1"), "{told}");
        // What is only wished for is never taken from what queries leave.
        spool.shrink(500);
        assert!(!output.wishes(151));
        source.needs(600).unwrap();
        // What these have more than their part is not there for queries.
        spool.try_grow(1).unwrap_err();
        assert!(output.wishes(10), "less than before");
        source.free();
        spool.try_grow(500).unwrap();
        assert!(output.wishes(250));
        let another = output.another();
        assert!(!another.wishes(1));
        drop(output);
        assert!(another.wishes(250));
        another.uses(10);
        assert_eq!(budget.reserved(), 1010, "what is in use shows");
        drop((source, another));
        assert_eq!(budget.reserved(), 750);
    }

    #[test]
    fn those_who_can_spill_share_alike() {
        let budget = Arc::new(Budget::within(1000));
        let pool: Arc<dyn MemoryPool> = Arc::clone(&budget) as _;
        let spool = MemoryConsumer::new("spool x").register(&pool);
        let sorts = [0, 1].map(|index| {
            MemoryConsumer::new(format!("ExternalSorter[{index}]")).with_can_spill(true).register(&pool)
        });
        spool.try_grow(150).unwrap();
        let [first, second] = &sorts;
        first.try_grow(300).unwrap();
        first.try_grow(1).unwrap_err();
        second.try_grow(300).unwrap();
        drop(sorts);
        let alone = MemoryConsumer::new("ExternalSorter[2]").with_can_spill(true).register(&pool);
        alone.try_grow(600).unwrap();
        assert_eq!(budget.reserved(), 750);
    }
}
