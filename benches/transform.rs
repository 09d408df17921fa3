//! What a script costs: one record from its bytes through a compiled chain to the bytes that a sink gets.
//!
//! `cargo bench --bench transform` prints the median time of an event for each case: everything that a branch does between
//! the log and the driver, with the guard's deadline and its budget of memory. The native cases do the same five
//! changes in Rust on `serde_json::Value`, without a guard, to compare with. The cases take turns, so that all of them
//! meet the same noise.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "run by hand, for what it prints"
)]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde_json::Value;
use walflow::clock::{Clock, Timestamp};
use walflow::record::{Record, RecordId};
use walflow::transform::{Compiler, Event, Outcome, Place, StageKind, StageSource, Transform};

/// The binary's own, since the guard reads its counters.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

const FIVE_CHANGES: &str = r#"
    payload.status = "accepted";
    payload.attempt += 1;
    payload.customer.email = redact(payload.customer.email);
    payload.accepted_at = now();
    payload.remove("trace");
"#;
const TWO_FIELDS: &str = r#"payload.operation != "NOOP" && payload.amount > 10.0"#;

/// One turn of a case takes this long, near enough.
const TURN: Duration = Duration::from_millis(20);
/// Turns that count, after one that warms up.
const TURNS: usize = 61;

/// A record as a shop would write it, of 600 bytes and, with more lines, 3,000.
fn payload(lines: usize) -> String {
    let line =
        |n: usize| format!(r#"{{"sku":"AB-{:04}","quantity":{},"price":{}.95,"gift":false}}"#, 1000 + n, n + 1, 12 + n);
    let lines: Vec<String> = (0..lines).map(line).collect();
    format!(
        concat!(
            r#"{{"id":"ord_01J9ZK4T7Q2M","operation":"CREATE","status":"new","attempt":1,"amount":129.95,"currency":"EUR","#,
            r#""customer":{{"id":48213,"name":"Zoë Müller","email":"zoe.mueller@example.org","tier":"platinum","since":"2019-03-11"}},"#,
            r#""address":{{"street":"Lindenallee 12, 3. OG","city":"Köln","zip":"50667","country":"DE","geo":[50.9413,6.9583]}},"#,
            r#""lines":[{}],"tags":["web","first","eu"],"trace":"4bf92f3577b34da6a3ce929d0e0e4736","#,
            r#""paid":true,"coupon":null,"created_at":"2026-11-24T08:00:00.000Z"}}"#
        ),
        lines.join(",")
    )
}

fn record(payload: String) -> Arc<Record> {
    let written_at = Timestamp::from_millis(1_764_000_000_000);
    let mut record = Record::new(RecordId::new(written_at, 1, 7, 42), written_at, Bytes::from(payload));
    record.key = Some("ord_01J9ZK4T7Q2M".into());
    record.headers = vec![("source".into(), "shop".into())];
    Arc::new(record)
}

fn chain(kind: StageKind, text: &str) -> Transform {
    let place = Place { file: "bench.yaml".into(), line: 1, column: 1 };
    let stage = StageSource { name: "transform[0]".into(), kind, text: text.into(), place, env: Vec::new() };
    let compiler = Compiler::new(Clock::system(), BTreeMap::new()).within(&"bench".parse().unwrap(), 1 << 20);
    compiler.stages(&[stage]).unwrap()
}

/// The payload that a sink would get.
fn run(transform: &Transform, record: &Arc<Record>) -> Bytes {
    match transform.run(Event::original(Arc::clone(record))).unwrap() {
        Outcome::Deliver(events) => events[0].payload().clone(),
        Outcome::Drop(stage) => panic!("dropped by {stage}"),
    }
}

/// The same five changes without scripts.
fn native(record: &Record) -> Bytes {
    let mut payload: Value = serde_json::from_slice(&record.payload).unwrap();
    payload["status"] = "accepted".into();
    payload["attempt"] = (payload["attempt"].as_i64().unwrap() + 1).into();
    payload["customer"]["email"] = "***".into();
    payload["accepted_at"] = record.written_at.to_string().into();
    payload.as_object_mut().unwrap().shift_remove("trace");
    serde_json::to_vec(&payload).unwrap().into()
}

struct Case {
    name: &'static str,
    work: Box<dyn Fn() -> Bytes>,
    /// Events in one turn.
    events: u32,
    /// Nanoseconds an event, by turn.
    took: Vec<u128>,
}

impl Case {
    fn new(name: &'static str, work: impl Fn() -> Bytes + 'static) -> Self {
        Self { name, work: Box::new(work), events: 1_000, took: Vec::with_capacity(TURNS) }
    }

    fn turn(&self) -> Duration {
        let began = Instant::now();
        for _ in 0..self.events {
            black_box((self.work)());
        }
        began.elapsed()
    }
}

fn main() {
    if std::env::args().any(|word| word == "--list" || word == "--test") {
        return; // A test run asks what there is: nothing.
    }
    let (small, large) = (record(payload(2)), record(payload(43)));
    println!("events of {} and {} bytes", small.payload.len(), large.payload.len());
    let script = |text| chain(StageKind::Script, text);
    let scripted = |transform: Transform, record: &Arc<Record>| {
        let record = Arc::clone(record);
        move || run(&transform, &record)
    };
    let natively = |record: &Arc<Record>| {
        let record = Arc::clone(record);
        move || native(&record)
    };
    let equal = |one: &Bytes, other: &Bytes| {
        serde_json::from_slice::<Value>(one).unwrap() == serde_json::from_slice::<Value>(other).unwrap()
    };
    assert!(equal(&run(&script(FIVE_CHANGES), &large), &native(&large)), "the two ways differ");
    let mut cases = [
        Case::new("five changes, small", scripted(script(FIVE_CHANGES), &small)),
        Case::new("five changes, large", scripted(script(FIVE_CHANGES), &large)),
        Case::new("filter of two fields, small", scripted(chain(StageKind::Filter, TWO_FIELDS), &small)),
        Case::new("filter of two fields, large", scripted(chain(StageKind::Filter, TWO_FIELDS), &large)),
        Case::new("empty script", scripted(script(""), &small)),
        Case::new("native, five changes, small", natively(&small)),
        Case::new("native, five changes, large", natively(&large)),
    ];
    for case in &mut cases {
        let one = case.turn() / case.events;
        case.events = u32::try_from(TURN.as_nanos() / one.as_nanos().max(1)).unwrap_or(u32::MAX).max(1);
    }
    for _ in 0..TURNS {
        for case in &mut cases {
            let took = case.turn().as_nanos() / u128::from(case.events);
            case.took.push(took);
        }
    }
    for case in &mut cases {
        case.took.sort_unstable();
        let [fast, middle, slow] = [TURNS / 10, TURNS / 2, TURNS * 9 / 10].map(|at| case.took[at]);
        println!("{:<30} {middle:>7} ns   (p10 {fast}, p90 {slow})", case.name);
    }
}
