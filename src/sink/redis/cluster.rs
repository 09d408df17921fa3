//! A Redis Cluster as a target: a batch is split by who serves each key's slot.
//!
//! Takes commands of one key each, gives what became of each. One connection a node, so that what one key is sent keeps its
//! order; a redirection is followed, in the order of the batch. A slot is executed by one node only, so a late command on an
//! old owner is refused there and never lands on a newer value. A node that is away is a part of the target as long as
//! others answer. Never asks a replica.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{join_all, select_ok};
use indexmap::IndexMap;
use parking_lot::Mutex;
use redis::{Cmd, ConnectionAddr, ConnectionInfo, Pipeline, RedisError, RedisResult, Value};
use tokio::time::Instant;

use super::command::key_of;
use super::connection::Connection;
use super::slots::{Place, SLOTS, Slots, slot_of};
use super::verdict::judge;
use crate::sink::{Failure, Verdict};

/// Redirections of one command in one attempt, at most.
const HOPS: u32 = 5;
/// The nodes are asked who serves what, at most so often.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// So many nodes are asked before the cluster counts as away.
const ASKED: usize = 9;

/// How a node answered last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Health {
    /// It was not asked yet, or could not be reached.
    Away,
    /// It refuses what it is sent, for a reason of its own: it loads, it is full, it is a replica now.
    Refuses,
    /// It does what it is told.
    Answers,
}

/// A node and the connection to it.
pub(super) struct Node {
    pub(super) place: Place,
    connection: Connection,
    health: AtomicU8,
}

impl Node {
    fn is(&self, health: Health) -> bool {
        self.health.load(Ordering::Relaxed) == health as u8
    }

    fn set(&self, health: Health) {
        self.health.store(health as u8, Ordering::Relaxed);
    }

    /// Runs a pipeline; gives each command's result, or one failure for all.
    pub(super) async fn run(&self, pipeline: &Pipeline) -> Result<Vec<RedisResult<Value>>, Failure> {
        let result = self.connection.run(pipeline).await;
        if result.is_err() {
            self.set(Health::Away);
        } else if self.is(Health::Away) {
            self.set(Health::Answers);
        }
        result
    }

    /// The server's address, for messages.
    pub(super) fn shown(&self) -> &str {
        self.connection.shown()
    }
}

#[derive(Default)]
struct Map {
    slots: Option<Slots>,
    /// Something showed that it no longer holds.
    stale: bool,
    nodes: HashMap<Place, Arc<Node>>,
}

/// Why a command has not been executed yet.
enum Pending {
    /// It goes to who serves its slot.
    First,
    /// It goes to this node, which takes its slot over: once, and after ASKING.
    Ask(Arc<Node>),
}

/// A cluster, as a branch knows it.
pub(super) struct Cluster {
    seeds: Vec<Place>,
    /// Of the first seed: its login and its TLS hold for every node.
    info: ConnectionInfo,
    timeout: Duration,
    shown: Box<str>,
    map: Mutex<Map>,
    /// Held while the nodes are asked; when that was done last, and why it failed.
    looking: tokio::sync::Mutex<Option<(Instant, Option<Failure>)>>,
}

impl Cluster {
    /// Reads the addresses; connects to nothing.
    pub(super) fn new(infos: Vec<ConnectionInfo>, timeout: Duration) -> Result<Self, String> {
        let seeds: Vec<Place> = infos.iter().filter_map(|info| Place::of(info.addr())).collect();
        let info = infos.into_iter().next().ok_or("there is no node")?;
        let names: Vec<String> = seeds.iter().take(3).map(ToString::to_string).collect();
        let more = if seeds.len() > 3 { ", …" } else { "" };
        let shown = format!("redis cluster {}{more}", names.join(", ")).into();
        Ok(Self { seeds, info, timeout, shown, map: Mutex::default(), looking: tokio::sync::Mutex::default() })
    }

    /// The addresses that the file names, for messages.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// The node at a place, made when it is named for the first time.
    fn node(&self, map: &mut Map, place: &Place) -> Result<Arc<Node>, Failure> {
        if let Some(node) = map.nodes.get(place) {
            return Ok(Arc::clone(node));
        }
        let mut address = self.info.addr().clone();
        match &mut address {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                (*host, *port) = (place.host.to_string(), place.port);
            }
            _ => {}
        }
        let connection = Connection::new(self.info.clone().set_addr(address), self.timeout)
            .map_err(|why| Failure::new(Verdict::Down, format!("{}: {place}: {why}", self.shown)))?;
        let node = Arc::new(Node { place: place.clone(), connection, health: AtomicU8::new(Health::Away as u8) });
        map.nodes.insert(place.clone(), Arc::clone(&node));
        Ok(node)
    }

    /// Asks the nodes who serves what, if that is not known or no longer holds.
    ///
    /// # Errors
    /// When nothing is known and no node says it.
    pub(super) async fn look(&self) -> Result<(), Failure> {
        self.look_again(LOOK_EVERY).await
    }

    /// The same, where the last answer is `old` or nobody answered.
    async fn look_again(&self, old: Duration) -> Result<(), Failure> {
        let (known, holds) = self.knows();
        if holds {
            return Ok(());
        }
        let mut last = match self.looking.try_lock() {
            Ok(last) => last,
            // Who asks does it for all; what is known will do until then.
            Err(_) if known => return Ok(()),
            Err(_) => self.looking.lock().await,
        };
        let (known, holds) = self.knows();
        if holds {
            return Ok(());
        }
        if let Some((at, failure)) = &*last
            && at.elapsed() < if failure.is_some() { LOOK_EVERY } else { old }
        {
            return failure.clone().filter(|_| !known).map_or(Ok(()), Err);
        }
        let failure = self.ask().await.err();
        *last = Some((Instant::now(), failure.clone()));
        failure.filter(|_| !known).map_or(Ok(()), Err)
    }

    /// Whether it is known who serves what, and whether that still holds.
    fn knows(&self) -> (bool, bool) {
        let map = self.map.lock();
        (map.slots.is_some(), map.slots.is_some() && !map.stale)
    }

    async fn ask(&self) -> Result<(), Failure> {
        let (healthy, others) = {
            let mut map = self.map.lock();
            let known: Vec<Place> = map.slots.iter().flat_map(Slots::owners).map(|(place, _)| place.clone()).collect();
            let mut seen = HashSet::new();
            let places = known.iter().chain(&self.seeds).filter(|place| seen.insert(*place));
            let mut nodes = places.map(|place| self.node(&mut map, place)).collect::<Result<Vec<_>, _>>()?;
            let at = nodes.iter().position(|node| node.is(Health::Answers));
            let healthy = at.map(|at| nodes.swap_remove(at));
            // A few of many, and not always the same.
            fastrand::shuffle(&mut nodes);
            nodes.truncate(ASKED);
            (healthy, nodes)
        };
        if let Some(node) = healthy
            && self.ask_node(&node).await.is_ok()
        {
            return Ok(());
        }
        if others.is_empty() {
            return Err(Failure::new(Verdict::Down, format!("{}: no node answers", self.shown)));
        }
        select_ok(others.iter().map(|node| self.ask_node(node).boxed())).await.map(|_| ())
    }

    async fn ask_node(&self, node: &Node) -> Result<(), Failure> {
        let mut pipeline = Pipeline::with_capacity(1);
        pipeline.ignore_errors().cmd("CLUSTER").arg("SLOTS");
        let answer = node.run(&pipeline).await?.into_iter().next();
        let down = |why: String| Failure::new(Verdict::Down, format!("{}: {why}", node.shown()));
        let answer = answer.ok_or_else(|| down("no answer to CLUSTER SLOTS".to_owned()))?;
        let answer = answer.map_err(|error| {
            let failure = Failure { verdict: Verdict::Down, ..judge(node.shown(), &error) };
            if error.detail().is_some_and(|detail| detail.contains("cluster support disabled")) {
                return down("it is no node of a cluster: write `url:` instead of `cluster:`".to_owned());
            }
            failure
        })?;
        let slots = Slots::read(answer, &node.place).map_err(down)?;
        let mut map = self.map.lock();
        let owners: HashSet<Place> = slots.owners().map(|(place, _)| place.clone()).collect();
        // One without slots may be about to get some; only when many are left over are they forgotten.
        if map.nodes.len() > 2 * (owners.len() + self.seeds.len()) + ASKED {
            map.nodes.retain(|place, _| owners.contains(place) || self.seeds.contains(place));
        }
        (map.slots, map.stale) = (Some(slots), false);
        Ok(())
    }

    /// Each master with the number of its slots, and how many slots are served.
    pub(super) fn masters(&self) -> (Vec<(Arc<Node>, usize)>, usize) {
        let mut map = self.map.lock();
        let owners: Vec<(Place, usize)> =
            map.slots.iter().flat_map(Slots::owners).map(|(p, n)| (p.clone(), n)).collect();
        let served = map.slots.as_ref().map_or(0, Slots::served);
        let nodes = owners.iter().filter_map(|(place, count)| Some((self.node(&mut map, place).ok()?, *count)));
        (nodes.collect(), served)
    }

    /// Runs the commands, each of which names its key as its first argument; gives what became of each.
    pub(super) async fn run(&self, commands: &[Cmd]) -> Vec<Result<(), Failure>> {
        let began = Instant::now();
        let mut outcomes: Vec<Outcome> = commands.iter().map(|_| Outcome::Pending(Pending::First)).collect();
        if let Err(failure) = self.look().await {
            return commands.iter().map(|_| Err(failure.clone())).collect();
        }
        for hop in 0..=HOPS {
            let batches = self.split(commands, &mut outcomes);
            if batches.is_empty() {
                break;
            }
            let answers = join_all(batches.iter().map(|batch| batch.node.run(&batch.pipeline))).await;
            for (batch, answers) in batches.iter().zip(answers) {
                self.read(batch, answers, &mut outcomes);
            }
            // What is redirected for so long is not sent once more in this attempt, whose time is over.
            if hop == HOPS || began.elapsed() >= self.timeout {
                break;
            }
        }
        if outcomes.iter().any(|outcome| matches!(outcome, Outcome::OfNode(..))) {
            // Whether others answer decides what it means; and the next attempt finds who took the slots over.
            let _ = self.look_again(Duration::ZERO).await;
        }
        let answering = self.answering();
        outcomes.into_iter().map(|outcome| self.decide(outcome, &answering)).collect()
    }

    /// The masters that did what they were told last.
    fn answering(&self) -> Vec<Place> {
        let map = self.map.lock();
        let owners = map.slots.iter().flat_map(Slots::owners).map(|(place, _)| place);
        let answers = |place: &&Place| map.nodes.get(*place).is_some_and(|node| node.is(Health::Answers));
        owners.filter(answers).cloned().collect()
    }

    /// What is pending, by the node that it goes to.
    fn split(&self, commands: &[Cmd], outcomes: &mut [Outcome]) -> Vec<Batch> {
        let mut batches: IndexMap<Place, Batch> = IndexMap::new();
        let mut map = self.map.lock();
        for (index, (command, outcome)) in commands.iter().zip(outcomes).enumerate() {
            let Outcome::Pending(pending) = outcome else { continue };
            let slot = slot_of(key_of(command));
            let node = match pending {
                Pending::Ask(node) => Ok(Arc::clone(node)),
                Pending::First => match map.slots.as_ref().and_then(|slots| slots.owner(slot)).cloned() {
                    Some(place) => self.node(&mut map, &place),
                    None => {
                        map.stale = true;
                        let why = format!("{}: no node serves the slot {slot} of its key", self.shown);
                        Err(Failure::new(Verdict::Down, why))
                    }
                },
            };
            match node {
                Err(failure) => *outcome = Outcome::OfNode(None, failure),
                Ok(node) => {
                    let batch = batches.entry(node.place.clone()).or_insert_with(|| Batch::new(node));
                    if matches!(pending, Pending::Ask(_)) {
                        batch.pipeline.cmd("ASKING");
                        batch.indexes.push(None);
                    }
                    batch.pipeline.add_command(command.clone());
                    batch.indexes.push(Some(index));
                }
            }
        }
        batches.into_values().collect()
    }

    fn read(&self, batch: &Batch, answers: Result<Vec<RedisResult<Value>>, Failure>, outcomes: &mut [Outcome]) {
        let node = &batch.node;
        let mut set = |index: &Option<usize>, outcome: Outcome| {
            if let Some(place) = index.and_then(|index| outcomes.get_mut(index)) {
                *place = outcome;
            }
        };
        let answers = answers.and_then(|answers| {
            let (count, commands) = (answers.len(), batch.indexes.len());
            let why = || format!("{}: {count} answers to {commands} commands", node.shown());
            if count == commands { Ok(answers) } else { Err(Failure::new(Verdict::Backoff, why())) }
        });
        match answers {
            Err(failure) => {
                self.map.lock().stale = true;
                for index in &batch.indexes {
                    set(index, Outcome::OfNode(Some(Arc::clone(node)), failure.clone()));
                }
            }
            Ok(answers) => {
                for (index, answer) in batch.indexes.iter().zip(answers) {
                    if index.is_some() {
                        set(index, self.outcome(node, answer.err()));
                    }
                }
            }
        }
    }

    /// What an answer to one command means.
    fn outcome(&self, node: &Arc<Node>, error: Option<RedisError>) -> Outcome {
        let Some(error) = error else {
            node.set(Health::Answers);
            return Outcome::Done;
        };
        let failure = judge(node.shown(), &error);
        let redirected = error.redirect_node().and_then(|(to, slot)| Some((Place::parse(to, &node.place)?, slot)));
        match (error.code(), redirected) {
            (Some("MOVED"), Some((to, slot))) => {
                let mut map = self.map.lock();
                map.stale = true;
                if let Some(slots) = &mut map.slots {
                    slots.moved(slot, to);
                }
                Outcome::Pending(Pending::First)
            }
            (Some("ASK"), Some((to, _))) => match self.node(&mut self.map.lock(), &to) {
                Ok(other) => Outcome::Pending(Pending::Ask(other)),
                Err(failure) => Outcome::OfNode(None, failure),
            },
            (Some("CLUSTERDOWN"), _) => {
                let mut map = self.map.lock();
                map.stale = true;
                // The node itself is well; it is the slot that nobody serves, or all of the cluster.
                let of_the_slot = error.detail().is_some_and(|detail| detail.contains("not served"));
                if of_the_slot && map.slots.as_ref().is_some_and(|slots| slots.served() > 0) {
                    return Outcome::Failed(Failure { verdict: Verdict::Part, ..failure });
                }
                // The nodes learn of it one after the other: as long as one answers it is not the whole.
                node.set(Health::Refuses);
                Outcome::OfNode(Some(Arc::clone(node)), failure)
            }
            // A slot is on its way to another node.
            (Some("TRYAGAIN"), _) => Outcome::Failed(Failure { verdict: Verdict::Part, ..failure }),
            (code, _) if failure.verdict == Verdict::Down && is_of_the_node(code, &error) => {
                node.set(Health::Refuses);
                self.map.lock().stale = true;
                Outcome::OfNode(Some(Arc::clone(node)), failure)
            }
            _ => {
                node.set(Health::Answers);
                Outcome::Failed(failure)
            }
        }
    }

    /// What became of a command. What one node failed at is a part of the target as long as another answers.
    fn decide(&self, outcome: Outcome, answering: &[Place]) -> Result<(), Failure> {
        match outcome {
            Outcome::Done => Ok(()),
            Outcome::Failed(failure) => Err(failure),
            Outcome::Pending(_) => {
                let why = format!("{}: a slot moves, and its nodes refer to each other", self.shown);
                Err(Failure::new(Verdict::Part, why))
            }
            Outcome::OfNode(node, failure) => {
                let others = answering.iter().any(|place| node.as_ref().is_none_or(|node| node.place != *place));
                Err(if others { Failure { verdict: Verdict::Part, ..failure } } else { failure })
            }
        }
    }
}

/// What became of a command so far.
enum Outcome {
    Pending(Pending),
    Done,
    /// It failed for a reason that is the record's or the whole cluster's.
    Failed(Failure),
    /// It failed since this node is not there or does not want; none where nobody serves the slot.
    OfNode(Option<Arc<Node>>, Failure),
}

/// What goes to one node, in the order of the whole.
struct Batch {
    node: Arc<Node>,
    pipeline: Pipeline,
    /// For each command of the pipeline its place in the whole; none for ASKING.
    indexes: Vec<Option<usize>>,
}

impl Batch {
    fn new(node: Arc<Node>) -> Self {
        let mut pipeline = Pipeline::new();
        pipeline.ignore_errors();
        Self { node, pipeline, indexes: Vec::new() }
    }
}

/// Whether a node speaks of itself alone. What it says of us, our login or our commands, each of them would say.
fn is_of_the_node(code: Option<&str>, error: &RedisError) -> bool {
    match code {
        Some("ERR") => error.detail().is_some_and(|detail| detail.contains("max number of clients")),
        Some(code) => !["NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "NOPROTO"].contains(&code),
        None => true,
    }
}

/// How many slots have a master, in words.
pub(super) fn covered(served: usize) -> String {
    format!("{served} of {SLOTS} slots assigned")
}
