//! Each rule of a branch, on the log in memory with a scripted target and a clock that follows tokio's.

mod batches;
mod copies;
mod ends;
mod order;
mod outage;
mod sharing;

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use super::{BranchDeps, BranchHandle, BranchStatus, OpenSink, Shared};
use crate::clock::{Clock, Timestamp};
use crate::pipeline::make;
use crate::pipeline::plan::Plan;
use crate::pipeline::revisions::Revisions;
use crate::record::{Record, RecordId};
use crate::sink::{BatchStyle, Failure, Kind, Operation, Sink, Verdict, Written};
use crate::source::memory::Memory;
use crate::source::{BranchName, DeadLetter, DeadQuery, Log, Shelf, Start, Write};
use crate::spec::environment::Environment;
use crate::spec::text::Text;
use crate::spec::{Neighbours, load_text};
use crate::transform::Compiler;

type Judge = Box<dyn FnMut(u64) -> Option<Verdict> + Send>;

/// The target: judges each record by the number in its payload and remembers what it took.
struct Target {
    judge: Mutex<Judge>,
    /// Key and number of what it took, in order.
    taken: Mutex<Vec<(Option<String>, u64)>>,
    /// Every record that it was asked to take.
    asked: Mutex<Vec<u64>>,
    latency: Mutex<Duration>,
    style: Mutex<BatchStyle>,
    /// When each batch began, and its size.
    batches: Mutex<Vec<(Instant, usize)>>,
    /// Batches under way, and the most there were at once.
    under_way: Mutex<(usize, usize)>,
    /// What the file of copies says to each, if it is not well, and the lines in it.
    copies: Mutex<(Option<Verdict>, Vec<serde_json::Value>)>,
}

impl Target {
    fn judge(&self, judge: impl FnMut(u64) -> Option<Verdict> + Send + 'static) {
        *self.judge.lock() = Box::new(judge);
    }

    fn taken(&self) -> Vec<u64> {
        self.taken.lock().iter().map(|(_, number)| *number).collect()
    }

    fn taken_sorted(&self) -> Vec<u64> {
        let mut taken = self.taken();
        taken.sort_unstable();
        taken
    }
}

struct Double(Arc<Target>);

impl Sink for Double {
    fn batch_style(&self) -> BatchStyle {
        *self.0.style.lock()
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            self.0.batches.lock().push((Instant::now(), batch.len()));
            let _under_way = UnderWay::begin(&self.0);
            let latency = *self.0.latency.lock();
            sleep(latency).await;
            let mut written = Written::default();
            for (index, operation) in batch.iter().enumerate() {
                let number = operation.event.json().unwrap()["n"].as_u64().unwrap();
                self.0.asked.lock().push(number);
                match (self.0.judge.lock())(number) {
                    Some(verdict) => written.failed.push((index, Failure::new(verdict, "as scripted"))),
                    None => {
                        self.0.taken.lock().push((operation.event.key.as_deref().map(str::to_owned), number));
                    }
                }
            }
            written
        }
        .boxed()
    }
}

struct UnderWay<'a>(&'a Target);

impl<'a> UnderWay<'a> {
    fn begin(target: &'a Target) -> Self {
        let (now, most) = &mut *target.under_way.lock();
        *now += 1;
        *most = (*most).max(*now);
        Self(target)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.lock().0 -= 1;
    }
}

/// The file that gets the copies of dead letters.
struct CopyFile(Arc<Target>);

impl Sink for CopyFile {
    fn batch_style(&self) -> BatchStyle {
        BatchStyle::StopsAtFirstFailure
    }

    fn write<'a>(&'a self, batch: &'a [Operation]) -> BoxFuture<'a, Written> {
        async move {
            sleep(Duration::from_millis(1)).await;
            let (fails, lines) = &mut *self.0.copies.lock();
            for (index, operation) in batch.iter().enumerate() {
                let line = operation.event.json().unwrap();
                match fails.filter(|verdict| *verdict != Verdict::Never || line["payload"]["n"] == 0) {
                    None => lines.push(line.clone()),
                    Some(verdict) => return Written { failed: vec![(index, Failure::new(verdict, "no copy"))] },
                }
            }
            Written::default()
        }
        .boxed()
    }
}

struct Bench {
    log: Arc<Memory>,
    revisions: Arc<Revisions>,
    target: Arc<Target>,
    plan: Arc<Plan>,
    clock: Clock,
    handle: BranchHandle,
    _ticker: tokio_util::task::AbortOnDropHandle<()>,
}

impl Target {
    /// One that takes everything.
    fn new() -> Arc<Self> {
        Arc::new(Self {
            judge: Mutex::new(Box::new(|_| None)),
            taken: Mutex::default(),
            asked: Mutex::default(),
            latency: Mutex::new(Duration::from_millis(1)),
            style: Mutex::new(BatchStyle::Independent),
            batches: Mutex::default(),
            under_way: Mutex::default(),
            copies: Mutex::default(),
        })
    }
}

/// A clock that follows tokio's.
fn ticking() -> (Clock, tokio_util::task::AbortOnDropHandle<()>) {
    let clock = Clock::manual(Timestamp::from_millis(1_764_000_000_000));
    let ticker = tokio::spawn({
        let clock = clock.clone();
        async move {
            loop {
                sleep(Duration::from_millis(10)).await;
                clock.advance(Duration::from_millis(10));
            }
        }
    });
    (clock, tokio_util::task::AbortOnDropHandle::new(ticker))
}

/// A record with this number for payload.
fn numbered(number: u64, key: Option<&str>) -> Write {
    let record = Record {
        id: RecordId::from_bytes([0; 16]),
        key: key.map(Into::into),
        ..crate::testing::record(&format!(r#"{{"n":{number}}}"#))
    };
    Write { record, due_at: None, idempotency: None }
}

impl Bench {
    /// A running branch of a stdout sink with these settings, its target taking everything.
    async fn new(settings: &str) -> Self {
        let (clock, ticker) = ticking();
        let log = Memory::new(1, clock.clone());
        let plan = Arc::new(plan(settings, &clock));
        let revisions = Arc::new(Revisions::new(Arc::clone(&log) as Arc<dyn Log>));
        let epoch = log.put_epoch(plan.files.clone()).await.unwrap();
        revisions.publish(epoch.number, Arc::clone(&plan));
        let target = Target::new();
        let handle = start(&log, &revisions, &target, &clock, &plan);
        Self { log, revisions, target, plan, clock, handle, _ticker: ticker }
    }

    /// Kills the branch and starts it again from what is stored.
    async fn restart(&mut self) {
        self.handle.stop().await;
        self.handle = start(&self.log, &self.revisions, &self.target, &self.clock, &self.plan);
    }

    /// Kills the branch and starts it again by an edited file.
    async fn restart_as(&mut self, settings: &str) {
        self.handle.stop().await;
        self.plan = Arc::new(plan(settings, &self.clock));
        let epoch = self.log.put_epoch(self.plan.files.clone()).await.unwrap();
        self.revisions.publish(epoch.number, Arc::clone(&self.plan));
        self.handle = start(&self.log, &self.revisions, &self.target, &self.clock, &self.plan);
    }

    async fn write(&self, number: u64, key: Option<&str>) -> RecordId {
        match self.log.admit(vec![numbered(number, key)]).await.unwrap().remove(0) {
            crate::source::Admitted::Appended { id, .. } => id,
            other => panic!("{other:?}"),
        }
    }

    fn branch(&self) -> BranchName {
        self.handle.name()
    }

    fn status(&self) -> BranchStatus {
        self.handle.board().status()
    }

    fn pause(&self) -> Option<&'static str> {
        self.status().pause.map(|pause| pause.cause)
    }

    async fn dead(&self) -> Vec<DeadLetter> {
        self.log.dead_letters(DeadQuery { limit: 100_000, ..DeadQuery::default() }).await.unwrap().rows
    }

    /// The numbers of the dead letters.
    async fn dead_numbers(&self) -> Vec<u64> {
        self.dead().await.iter().map(|letter| number(&letter.record)).collect()
    }

    fn lag(&self) -> u64 {
        self.log.lag(&self.branch()).records
    }

    fn aside(&self) -> u64 {
        self.log.counts().aside.iter().map(|(_, rows)| rows).sum()
    }

    /// Waits until everything has its end.
    async fn drained(&self) {
        self.until("everything has its end", |bench| bench.lag() == 0 && bench.aside() == 0).await;
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + Duration::from_secs(2 * 3_600);
        while !holds(self) {
            assert!(
                Instant::now() < end,
                "never: {what}; {:?}, lag {}, aside {}",
                self.status(),
                self.lag(),
                self.aside()
            );
            sleep(Duration::from_millis(50)).await;
        }
    }
}

fn number(record: &Record) -> u64 {
    serde_json::from_slice::<serde_json::Value>(&record.payload).unwrap()["n"].as_u64().unwrap()
}

fn plan(settings: &str, clock: &Clock) -> Plan {
    let environment = Environment::new([]);
    let yaml = format!("namespace: test\nsink:\n  stdout: {{}}\n{settings}");
    let loaded = load_text(Text::new("test.yaml", &yaml), Neighbours::kept([].into()), &environment);
    let made = make(&loaded, &environment, &Compiler::new(clock.clone(), environment.variables()));
    made.plan.unwrap_or_else(|| panic!("{:?}", made.diagnostics))
}

fn start(
    log: &Arc<Memory>,
    revisions: &Arc<Revisions>,
    target: &Arc<Target>,
    clock: &Clock,
    plan: &Plan,
) -> BranchHandle {
    start_branch(log, revisions, target, clock, plan, 0, &Arc::default())
}

fn start_branch(
    log: &Arc<Memory>,
    revisions: &Arc<Revisions>,
    target: &Arc<Target>,
    clock: &Clock,
    plan: &Plan,
    number: usize,
    shared: &Arc<Shared>,
) -> BranchHandle {
    let target = Arc::clone(target);
    let open_sink: OpenSink = Arc::new(move |kind, _| {
        let target = Arc::clone(&target);
        Ok(if matches!(kind, Kind::File(_)) { Box::new(CopyFile(target)) } else { Box::new(Double(target)) })
    });
    let deps = BranchDeps {
        namespace: plan.namespace.clone(),
        log: Arc::clone(log) as Arc<dyn Log>,
        shelf: Arc::clone(log) as Arc<dyn Shelf>,
        revisions: Arc::clone(revisions),
        shared: Arc::clone(shared),
        open_sink,
        clock: clock.clone(),
        start: Start::Earliest,
    };
    BranchHandle::start(deps, Arc::clone(&plan.branches[number]))
}

/// Few and short retries, so that a test sees them spent.
const IMPATIENT: &str = "  retry: { attempts: 3, backoff: { first: 50ms, max: 200ms } }\n";
