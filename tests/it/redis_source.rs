//! Redis Streams as the log, on real servers: what is confirmed is read, whoever ends, and each key keeps its order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use walflow::clock::Clock;
use walflow::record::{Position, Record, RecordId};
use walflow::source::foreign::broker::{Begin, Broker, Exactly, Opened};
use walflow::source::foreign::open::Context;
use walflow::source::foreign::store::Claimed;
use walflow::source::redis::{Durability, RedisSourceSpec, open, probe};
use walflow::source::{AdmitError, BranchName, DeadLetter, DeadReason, Entry, IdempotencyKey, LogError, Reach, RowKey};

use crate::servers::Server;

/// Longest wait for anything; a wait that needs it has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn shared() -> String {
    std::env::var("WALFLOW_TEST_REDIS").expect("WALFLOW_TEST_REDIS names a Redis server: run tests/run")
}

pub fn unique() -> String {
    format!("redis-{:012x}", fastrand::u64(..) >> 16)
}

pub fn spec(url: &str, streams: u16) -> RedisSourceSpec {
    RedisSourceSpec { url: Some(url.to_owned()), streams: Some(streams), ..RedisSourceSpec::default() }
}

pub fn context(namespace: &str) -> Context {
    Context {
        namespace: namespace.parse().unwrap(),
        number: 1,
        clock: Clock::system(),
        record_bytes: 1 << 20,
        key_window: Duration::from_secs(3_600),
        backlog_bytes: 1 << 30,
        strict: false,
    }
}

pub fn handle(url: &str, namespace: &str, streams: u16) -> Arc<dyn Broker> {
    open(&spec(url, streams), &context(namespace)).unwrap()
}

pub fn record(key: Option<&str>, payload: &str) -> Arc<Record> {
    let now = Clock::system().now();
    let bare =
        Record::new(RecordId::new(now, 0, 1, fastrand::u64(..)), now, Bytes::copy_from_slice(payload.as_bytes()));
    Arc::new(Record { key: key.map(Into::into), ..bare })
}

pub fn branch() -> BranchName {
    BranchName::new("sink", None)
}

pub async fn append(broker: &Arc<dyn Broker>, records: Vec<Arc<Record>>) -> Vec<Result<Position, AdmitError>> {
    broker.append(records).await.unwrap().await
}

pub async fn opened(broker: &Arc<dyn Broker>) -> Opened {
    opened_at(broker, Begin::Earliest).await
}

async fn opened_at(broker: &Arc<dyn Broker>, begin: Begin) -> Opened {
    let started = tokio::time::Instant::now();
    loop {
        match broker.open(&branch(), begin.clone()).await {
            Ok(opened) => return opened,
            Err(error) => assert!(started.elapsed() < PATIENCE, "{error}"),
        }
    }
}

/// The next entries of a hold; `None` = it is over.
async fn next(opened: &mut Opened) -> Option<Vec<Entry>> {
    let next = tokio::time::timeout(PATIENCE, async {
        tokio::select! {
            biased;
            () = opened.moved.cancelled() => None,
            entries = opened.subscription.next(16, usize::MAX) => Some(entries.unwrap()),
        }
    });
    next.await.expect("nothing came")
}

pub async fn read(opened: &mut Opened, count: usize) -> Vec<Entry> {
    let mut entries = Vec::new();
    while entries.len() < count {
        entries.extend(next(opened).await.expect("the hold has ended"));
    }
    entries
}

pub fn payload(entry: &Entry) -> String {
    String::from_utf8(entry.record.payload.to_vec()).unwrap()
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn what_ends_out_of_order_is_not_read_again_and_the_rest_is() {
    let (url, namespace) = (shared(), unique());
    let broker = handle(&url, &namespace, 1);
    let records = (0..5).map(|n| record(None, &n.to_string())).collect();
    let positions: Vec<Position> = append(&broker, records).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(positions, (1..=5).map(|n| Position::in_part(0, n)).collect::<Vec<_>>());
    let mut hold = opened(&broker).await;
    assert_eq!(read(&mut hold, 5).await.len(), 5);
    broker.progress(&branch(), &Position(1).into(), &[Position(1), Position(4)]);
    assert_eq!(broker.lag(&branch()).records, 3);
    drop(hold);
    broker.close().await;
    let broker = handle(&url, &namespace, 1);
    let mut hold = opened(&broker).await;
    assert_eq!(hold.cursor.single(), Position(1), "before the first that is pending");
    let again: Vec<u64> = read(&mut hold, 3).await.iter().map(|entry| entry.position.0).collect();
    assert_eq!(again, [2, 3, 5]);
    append(&broker, vec![record(None, "5")]).await;
    assert_eq!(payload(&read(&mut hold, 1).await[0]), "5");
    // A place tells what stands behind it.
    let place = broker.place().await.unwrap();
    let late = record(None, "late");
    append(&broker, vec![Arc::clone(&late)]).await;
    let found = broker.find_after(&place, vec![late.id, RecordId::from_bytes([9; 16])]).await.unwrap();
    assert_eq!(found.into_iter().collect::<Vec<_>>(), [(late.id, Position(7))]);
    broker.close().await;
}

/// Reads whatever it holds, over and over, and tells each record with who read it, in turn.
async fn consume(broker: Arc<dyn Broker>, who: usize, seen: Arc<std::sync::Mutex<Vec<(usize, String)>>>) {
    loop {
        let Ok(mut hold) = broker.open(&branch(), Begin::Earliest).await else {
            tokio::task::yield_now().await;
            continue;
        };
        let mut frontier = hold.cursor.clone();
        while let Some(entries) = next(&mut hold).await {
            for entry in &entries {
                seen.lock().unwrap().push((who, payload(entry)));
                frontier.advance(entry.position);
            }
            broker.progress(&branch(), &frontier, &entries.iter().map(|entry| entry.position).collect::<Vec<_>>());
        }
    }
}

async fn until(what: &str, mut fine: impl FnMut() -> bool) {
    let wait = tokio::time::timeout(PATIENCE, async {
        let mut look = tokio::time::interval(Duration::from_millis(20));
        while !fine() {
            look.tick().await;
        }
    });
    wait.await.unwrap_or_else(|_| panic!("{what} never came"));
}

#[test]
#[ignore = "needs a Redis server: run tests/run"]
fn two_share_the_streams_and_one_goes_on_alone_when_the_other_ends_without_a_word() {
    let (url, namespace) = (shared(), unique());
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let seen = Arc::new(std::sync::Mutex::new(Vec::<(usize, String)>::new()));
    let (one, other) = (runtime(), runtime());
    let write = |numbers: std::ops::Range<u32>| {
        let broker = handle(&url, &namespace, 8);
        async move {
            for n in numbers {
                let result =
                    append(&broker, vec![record(Some(&format!("k{}", n % 24)), &format!("{}/{n}", n % 24))]).await;
                result[0].as_ref().unwrap();
            }
            broker.close().await;
        }
    };
    let count = |who: Option<usize>, from: usize| {
        let seen = seen.lock().unwrap();
        let of = |(reader, _): &&(usize, String)| who.is_none_or(|who| *reader == who);
        seen.iter().skip(from).filter(of).map(|(_, payload)| payload.clone()).collect::<BTreeSet<_>>().len()
    };
    let readers: Vec<_> = [&one, &other]
        .iter()
        .enumerate()
        .map(|(who, runtime)| {
            let _within = runtime.enter();
            let broker = handle(&url, &namespace, 8);
            runtime.spawn(consume(Arc::clone(&broker), who, Arc::clone(&seen)));
            broker
        })
        .collect();
    let parts = |who: usize| readers[who].lag(&branch()).cursor.iter().count();
    one.block_on(until("an even share", || parts(0) == 4 && parts(1) == 4));
    one.block_on(async { write(0..480).await });
    one.block_on(until("all of the first", || count(None, 0) == 480));
    assert!(count(Some(0), 0) > 0 && count(Some(1), 0) > 0, "both read");
    // It ends with its runtime: nothing is stored, nothing let go.
    other.shutdown_background();
    let so_far = seen.lock().unwrap().len();
    one.block_on(async { write(480..960).await });
    one.block_on(until("all of the second", || count(Some(0), so_far) >= 480));
    assert_eq!(parts(0), 8);
    // By key the first time of each is in the order of writing.
    let mut first = BTreeSet::new();
    let mut by_key = BTreeMap::<String, Vec<u32>>::new();
    for (_, payload) in seen.lock().unwrap().iter() {
        let (key, n) = payload.split_once('/').unwrap();
        if first.insert(payload.clone()) {
            by_key.entry(key.to_owned()).or_default().push(n.parse().unwrap());
        }
    }
    for (key, numbers) in by_key {
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
    one.block_on(async { readers[0].close().await });
    one.shutdown_background();
    std::mem::forget(readers);
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn the_same_key_at_once_is_one_entry() {
    let (url, namespace) = (shared(), unique());
    let brokers: Vec<_> = (0..4).map(|_| handle(&url, &namespace, 4)).collect();
    let key = IdempotencyKey { key: "once".into(), fingerprint: [7; 16] };
    let calls = (0..100).map(|n| {
        let pair = (record(Some("k"), &n.to_string()), Some(key.clone()));
        brokers[n % 4].append_exactly(&[pair]).expect("it can")
    });
    let answers: Vec<Exactly> =
        futures::future::join_all(calls).await.into_iter().map(|answer| answer.unwrap().remove(0).unwrap()).collect();
    let appended: Vec<_> = answers.iter().filter(|answer| matches!(answer, Exactly::Appended(_))).collect();
    assert_eq!(appended.len(), 1, "{answers:?}");
    let same = |answer: &&Exactly| matches!(answer, Exactly::Known(Claimed::Known { fingerprint, .. }) if *fingerprint == [7; 16]);
    assert_eq!(answers.iter().filter(same).count(), 99);
    let total: u64 = { brokers[0].place().await.unwrap().split(',').map(|end| end.parse::<u64>().unwrap()).sum() };
    assert_eq!(total, 1);
    for broker in brokers {
        broker.close().await;
    }
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_server_that_may_lose_what_it_confirms_is_refused_with_the_reason() {
    for (name, arguments, told) in [
        ("redis", &["--appendonly", "no"][..], Some("appendonly is off")),
        ("redis", &["--appendonly", "yes", "--appendfsync", "everysec"], Some("appendfsync is everysec")),
        (
            "redis",
            &["--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "allkeys-lru"],
            Some("maxmemory-policy is allkeys-lru"),
        ),
        ("valkey", &["--appendonly", "yes", "--appendfsync", "everysec"], None),
    ] {
        let server = Server::start_with(name, arguments).await;
        let url = format!("redis://{}", server.address());
        let broker = handle(&url, "orders", 1);
        let written = append(&broker, vec![record(None, "0")]).await.remove(0);
        let probed = probe(&spec(&url, 1), "orders", &[]).await.remove(0);
        match told {
            None => {
                written.unwrap();
                assert!(broker.durable_note().contains("WAITAOF"), "{}", broker.durable_note());
                assert!(probed.ok, "{probed:?}");
            }
            Some(told) => {
                let refused = written.unwrap_err();
                assert!(matches!(refused, AdmitError::Unavailable { .. }), "{refused:?}");
                let said = [refused.to_string(), broker.trouble().unwrap(), probed.found.clone()];
                assert!(said.iter().all(|said| said.contains(told)), "{said:?}");
                assert!(!probed.ok && broker.caps().durable);
                let weak = open(&RedisSourceSpec { durability: Durability::Weak, ..spec(&url, 1) }, &context("orders"));
                let weak = weak.unwrap();
                append(&weak, vec![record(None, "0")]).await.remove(0).unwrap();
                assert!(weak.durable_note().contains(told) && !weak.caps().durable, "{}", weak.durable_note());
                weak.close().await;
            }
        }
        broker.close().await;
    }
}

pub async fn command(url: &str, words: &[&str]) -> redis::Value {
    let mut connection = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();
    let mut command = redis::cmd(words[0]);
    words[1..].iter().for_each(|word| _ = command.arg(*word));
    command.query_async(&mut connection).await.unwrap()
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn after_all_was_deleted_the_group_is_made_again_and_reads_what_comes() {
    let server = Server::start_with("redis", &["--appendonly", "yes", "--appendfsync", "always"]).await;
    let url = format!("redis://{}", server.address());
    let broker = handle(&url, "orders", 2);
    // Where a branch begins that nobody knows is the end; one that was known loses nothing that way.
    broker.prepare(&branch(), Begin::Earliest).await.unwrap();
    append(&broker, (0..6).map(|n| record(None, &n.to_string())).collect()).await;
    let mut hold = opened_at(&broker, Begin::Latest).await;
    read(&mut hold, 6).await;
    command(&url, &["FLUSHALL"]).await;
    append(&broker, vec![record(None, "after"), record(None, "after")]).await;
    tokio::time::timeout(PATIENCE, hold.moved.cancelled()).await.expect("the hold goes on on nothing");
    drop(hold);
    let mut hold = opened_at(&broker, Begin::Latest).await;
    assert_eq!(hold.cursor, [0, 1].into_iter().map(|part| Position::in_part(part, 0)).collect::<Reach>());
    let after = read(&mut hold, 2).await;
    assert!(after.iter().all(|entry| payload(entry) == "after" && entry.position.offset() == 1), "{after:?}");
    broker.progress(&branch(), &after.iter().map(|entry| entry.position).collect(), &[]);
    drop(hold);
    broker.close().await;
    let broker = handle(&url, "orders", 2);
    let hold = opened(&broker).await;
    // The numbers of what is gone are used by nothing else: it goes on after them.
    assert!(hold.cursor.iter().all(|position| position.offset() == 4), "{:?}", hold.cursor);
    drop(hold);
    broker.close().await;
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn what_comes_after_a_server_has_lost_its_newest_entries_is_delivered() {
    let server = Server::start_with("redis", &["--appendonly", "yes", "--appendfsync", "always"]).await;
    let url = format!("redis://{}", server.address());
    let broker = handle(&url, "orders", 1);
    let end = async |hold: &mut Opened, texts: &[&str]| {
        append(&broker, texts.iter().map(|text| record(None, text)).collect()).await;
        let entries = read(hold, texts.len()).await;
        assert_eq!(entries.iter().map(payload).collect::<Vec<_>>(), texts);
        broker.progress(&branch(), &entries.last().unwrap().position.into(), &[]);
        let pending = ["XPENDING", "walflow:{orders}:stream:0", "sink"];
        while !matches!(&command(&url, &pending).await, redis::Value::Array(parts) if parts[0] == redis::Value::Int(0))
        {
        }
    };
    let mut hold = opened(&broker).await;
    end(&mut hold, &["a", "b"]).await;
    let (files, kept) = (server.folder().join("appendonlydir"), server.folder().join("kept"));
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        std::fs::create_dir_all(to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    copy(&files, &kept);
    end(&mut hold, &["c", "d", "e"]).await;
    // As a replica that lagged would: the holds are there, the newest entries are not.
    server.kill().await;
    copy(&kept, &files);
    server.restart().await;
    let mut written = 0;
    while written < 2 {
        let text = format!("new {written}");
        written += u32::from(append(&broker, vec![record(None, &text)]).await.remove(0).is_ok());
    }
    let mut seen = BTreeSet::new();
    while !(seen.contains("new 0") && seen.contains("new 1")) {
        match next(&mut hold).await {
            Some(entries) => {
                assert!(entries.iter().all(|entry| entry.position.offset() > 5), "numbers are used again: {entries:?}");
                seen.extend(entries.iter().map(payload));
            }
            None => {
                drop(hold);
                hold = opened(&broker).await;
            }
        }
    }
    drop(hold);
    broker.close().await;
}

#[tokio::test]
#[ignore = "needs servers: run tests/run"]
async fn a_server_that_is_killed_and_comes_back_has_all_that_was_confirmed() {
    for (name, arguments) in [
        ("redis", &["--appendonly", "yes", "--appendfsync", "always"][..]),
        ("valkey", &["--appendonly", "yes", "--appendfsync", "everysec"]),
    ] {
        let server = Server::start_with(name, arguments).await;
        let url = format!("redis://{}", server.address());
        let broker = handle(&url, "orders", 4);
        let mut hold = opened(&broker).await;
        let writing = tokio::spawn({
            let broker = Arc::clone(&broker);
            async move {
                let mut confirmed = BTreeSet::new();
                let mut failed = 0;
                for n in 0.. {
                    let text = format!("{n}");
                    match append(&broker, vec![record(Some(&text), &text)]).await.remove(0) {
                        Ok(_) => _ = confirmed.insert(text),
                        Err(AdmitError::Unknown { .. } | AdmitError::Unavailable { .. }) => {
                            failed += 1;
                            tokio::task::yield_now().await;
                        }
                        Err(other) => panic!("{other}"),
                    }
                    if failed > 0 && confirmed.len() > 1_000 {
                        break;
                    }
                }
                confirmed
            }
        });
        let mut seen: BTreeSet<String> = read(&mut hold, 200).await.iter().map(payload).collect();
        server.kill().await;
        server.restart().await;
        let confirmed = tokio::time::timeout(PATIENCE, writing).await.unwrap().unwrap();
        while !confirmed.is_subset(&seen) {
            match next(&mut hold).await {
                Some(entries) => seen.extend(entries.iter().map(payload)),
                None => {
                    drop(hold);
                    hold = opened(&broker).await;
                }
            }
        }
        drop(hold);
        broker.close().await;
        assert!(matches!(broker.open(&branch(), Begin::Latest).await, Err(LogError::Closed(_))));
    }
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn what_is_finished_goes_and_what_is_not_stays_until_the_backlog_is_full() {
    let (url, namespace) = (shared(), unique());
    let small = Context { backlog_bytes: 200_000, ..context(&namespace) };
    let broker = open(&spec(&url, 1), &small).unwrap();
    let stream = format!("walflow:{{{namespace}}}:stream:0");
    let other = BranchName::new("other", None);
    for name in [branch(), other.clone()] {
        broker.prepare(&name, Begin::Earliest).await.unwrap();
    }
    let mut hold = opened(&broker).await;
    let text = "x".repeat(1_000);
    let mut written = 0;
    let full = loop {
        match broker.append(vec![record(None, &text)]).await {
            Ok(handed) => _ = handed.await.remove(0).map(|_| written += 1),
            Err(error) => break error,
        }
    };
    assert!(matches!(full, AdmitError::BacklogFull { limit: 200_000, .. }), "{full}");
    let read = read(&mut hold, written).await;
    assert_eq!(read.len(), written);
    let last = read.last().unwrap().position;
    broker.progress(&branch(), &last.into(), &[]);
    // The other branch has not finished anything.
    let length = || async { redis::from_redis_value::<usize>(command(&url, &["XLEN", &stream]).await).unwrap() };
    let mut behind = tokio::time::timeout(PATIENCE, broker.open(&other, Begin::Latest)).await.unwrap().unwrap();
    assert_eq!((behind.cursor.single(), length().await), (Position(0), written), "it begins where it was made");
    let mut seen = Vec::new();
    while seen.len() < written {
        seen.extend(next(&mut behind).await.unwrap());
    }
    let left = 3;
    let ended: Vec<_> =
        seen.iter().map(|entry| entry.position).filter(|at| at.offset() + left <= last.offset()).collect();
    broker.progress(&other, &ended.last().copied().unwrap().into(), &ended);
    let gone = tokio::time::timeout(PATIENCE, async {
        while length().await != 3 {
            tokio::task::yield_now().await;
        }
    });
    gone.await.expect("what both have finished goes, and nothing else");
    let accepted = tokio::time::timeout(PATIENCE, async {
        while broker.append(vec![record(None, "more")]).await.is_err() {
            tokio::task::yield_now().await;
        }
    });
    accepted.await.expect("there is room again");
    drop((hold, behind));
    broker.close().await;
}

#[tokio::test]
#[ignore = "needs a Redis server: run tests/run"]
async fn another_name_carries_what_is_pending_and_dead_letters_have_a_stream() {
    let (url, namespace) = (shared(), unique());
    let broker = handle(&url, &namespace, 1);
    let records: Vec<_> = (0..4).map(|n| record(Some("k"), &n.to_string())).collect();
    append(&broker, records.clone()).await;
    let mut hold = opened(&broker).await;
    read(&mut hold, 4).await;
    broker.progress(&branch(), &Reach::none(), &[Position(2)]);
    drop(hold);
    let to = BranchName::new("other", Some("eu"));
    broker.rename(&branch(), &to).await.unwrap();
    let mut hold = broker.open(&to, Begin::Latest).await.unwrap();
    let left: Vec<u64> = read(&mut hold, 3).await.iter().map(|entry| entry.position.0).collect();
    assert_eq!((hold.cursor.single(), left), (Position(0), vec![1, 3, 4]));
    // A name that is known already takes nothing over.
    broker.prepare(&branch(), Begin::Earliest).await.unwrap();
    broker.rename(&branch(), &to).await.unwrap();
    let letter = DeadLetter {
        row: RowKey { position: Position(1), child: 0 },
        branch: to.clone(),
        at: Clock::system().now(),
        reason: DeadReason::NoRoute,
        attempts: 1,
        last_error: "no".into(),
        stage: "route".into(),
        revision: "r".into(),
        record: Arc::clone(&records[0]),
        rendered: None,
        overtaken: false,
    };
    broker.bury(vec![letter]).await.unwrap();
    let buried = command(&url, &["XRANGE", &format!("walflow:{{{namespace}}}:dead"), "-", "+"]).await;
    let buried: Vec<(String, BTreeMap<String, Vec<u8>>)> = redis::from_redis_value(buried).unwrap();
    let fields = &buried[0].1;
    assert_eq!((fields["branch"].as_slice(), fields["reason"].as_slice()), (&b"other@eu"[..], &b"no_route"[..]));
    assert_eq!(Record::decode(&Bytes::from(fields["record"].clone())).unwrap(), *records[0]);
    drop(hold);
    broker.forget(&to).await.unwrap();
    let hold = broker.open(&to, Begin::Latest).await.unwrap();
    assert_eq!(hold.cursor.single(), Position(4), "it is a new one");
    drop(hold);
    broker.close().await;
}
