//! The embedded log as a whole: opened once for a data folder, gives a handle for each namespace.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::change::{Change, NamespaceNumber, Sequence};
use super::due::DueRow;
use super::namespace::EmbeddedNamespace;
use super::options::{NamespaceSettings, Options};
use super::queue::{Answer, Draft};
use super::recovery::{OpenError, Recovered, recover};
use super::segment::Segments;
use super::settle::Settler;
use super::shared::{Counters, Health, Shared};
use super::space::Space;
use super::state::State;
use super::writer::Writer;
use crate::record::{Namespace, Record};
use crate::source::LogError;

/// Parked records released in one group.
const RELEASE: usize = 1_000;

/// One embedded log. Close it before the runtime ends.
pub struct Embedded {
    shared: Arc<Shared>,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    writer: JoinHandle<()>,
    settler: JoinHandle<()>,
}

impl Embedded {
    /// Opens a data folder, repairs what the last stop left behind, and starts the threads. Blocks; must be called inside
    /// a runtime (`spawn_blocking` will do).
    ///
    /// # Errors
    /// When another process has the folder, or something durable is damaged.
    pub fn open(options: Options) -> Result<Arc<Self>, OpenError> {
        let runtime = Handle::current();
        let Recovered { shared, state, segments, file, last, time, commits, clean, lock } = recover(options)?;
        let reader = shared.reader.clone();
        let keys = shared.keys.clone();
        // A filter over millions of keys takes a while; until it is there each key is looked for in the store.
        std::thread::spawn(move || {
            if let Err(error) = keys.learn(1, |each| reader.each_key(each)) {
                tracing::warn!(%error, "the keys could not be read: each is looked for in the store");
            }
        });
        let failed =
            |source| OpenError::Storage { act: "start a thread for", path: shared.options.data.clone(), source };
        // The folder is ours until the last thread that may write to it has ended.
        let lock = Arc::new(lock);
        let settler = Settler::new(Arc::clone(&shared), state, segments, commits.len());
        let held_by_settler = Arc::clone(&lock);
        let settle = move || {
            settler.run();
            drop(held_by_settler);
        };
        let settler = std::thread::Builder::new().name("settle".into()).spawn(settle).map_err(failed)?;
        let writer = Writer::new(Arc::clone(&shared), file, last, time);
        let answers = Arc::clone(&shared);
        let journal = move || {
            writer.run();
            answers.writer_is_over.store(true, Ordering::Release);
            answers.nudge_finisher();
            drop(lock);
        };
        let writer = std::thread::Builder::new().name("journal".into()).spawn(journal).map_err(failed)?;
        for commit in commits {
            shared.settling.push_replay(commit);
        }
        runtime.spawn(Arc::clone(&shared).run_finisher());
        runtime.spawn(release(Arc::clone(&shared)));
        let started = vec![Draft::Change(Change::Started { clean })];
        // Queued before anybody can write: a stop right after the first delivery counts as one (LOG.md 15).
        shared.send(&shared.instance, started);
        Ok(Arc::new(Self { shared, threads: Mutex::new(Some(Threads { writer, settler })) }))
    }

    /// A namespace that the log holds, with the bounds that it has.
    ///
    /// # Errors
    /// When the log is closed.
    pub fn held(&self, name: &Namespace) -> Result<Option<Arc<EmbeddedNamespace>>, LogError> {
        if let Some(reason) = self.shared.refusal() {
            return Err(LogError::Closed(reason));
        }
        let space = self.shared.spaces.read().by_name.get(name).cloned();
        Ok(space.map(|space| Arc::new(EmbeddedNamespace::new(Arc::clone(&self.shared), space))))
    }

    /// A namespace's log and shelf with these bounds; it is made when it is not there yet.
    ///
    /// # Errors
    /// When the log is closed.
    pub fn namespace(&self, name: &Namespace, settings: NamespaceSettings) -> Result<Arc<EmbeddedNamespace>, LogError> {
        if let Some(reason) = self.shared.refusal() {
            return Err(LogError::Closed(reason));
        }
        let mut spaces = self.shared.spaces.write();
        if let Some(space) = spaces.by_name.get(name) {
            let mut known = space.settings.write();
            if (known.backlog_age, known.drop_oldest) != (settings.backlog_age, settings.drop_oldest) {
                // Found by the bound of before; the next look goes by the new one.
                space.aged.store(0, Ordering::Release);
            }
            *known = settings;
            drop(known);
            space.told.store(true, Ordering::Release);
            return Ok(Arc::new(EmbeddedNamespace::new(Arc::clone(&self.shared), Arc::clone(space))));
        }
        let number = NamespaceNumber(spaces.next);
        spaces.next += 1;
        let segments = Segments::new(&self.shared.segments_root, number);
        let space = Arc::new(Space::new(number, Some(name.clone()), settings, segments));
        space.told.store(true, Ordering::Release);
        spaces.by_number.insert(number, Arc::clone(&space));
        spaces.by_name.insert(name.clone(), Arc::clone(&space));
        // Queued before any write of the namespace can be, and durable with or before the first of them.
        self.shared.send(&space, vec![Draft::Change(Change::NamespaceCreated { name: name.as_str().into() })]);
        Ok(Arc::new(EmbeddedNamespace::new(Arc::clone(&self.shared), space)))
    }

    /// The namespaces that the log holds.
    pub fn namespace_names(&self) -> Vec<Namespace> {
        let mut names: Vec<Namespace> = self.shared.spaces.read().by_name.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Deletes a namespace with all it has; durable when it returns. Its number is never used again.
    ///
    /// # Errors
    /// When the log is closed.
    pub async fn delete_namespace(&self, name: &Namespace) -> Result<bool, LogError> {
        let Some(space) = self.shared.spaces.read().by_name.get(name).cloned() else { return Ok(false) };
        self.shared.change(&space, vec![Draft::Change(Change::NamespaceDeleted)]).await?;
        space.news.notify_waiters();
        Ok(true)
    }

    /// How the log is doing.
    pub fn health(&self) -> Health {
        self.shared.status.health()
    }

    /// Waits until a write or sync has failed for good, and gives why. The process should end then.
    pub async fn fenced(&self) -> Arc<str> {
        let mut stopped = self.shared.stopped.subscribe();
        loop {
            if let Some(reason) = self.shared.status.fenced() {
                return reason;
            }
            if stopped.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// What a scrape reads.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Takes nothing more, lets the views catch up, makes them durable, and ends the threads.
    pub async fn close(&self) {
        if self.shared.status.fenced().is_none() && !self.shared.status.is_closing() {
            let _ = self.shared.change(&self.shared.instance, vec![Draft::Change(Change::Stopped)]).await;
        }
        self.shared.status.close();
        let Some(threads) = self.threads.lock().take() else { return };
        let reason: Arc<str> = "the log is closing".into();
        let shared = Arc::clone(&self.shared);
        let ended = tokio::task::spawn_blocking(move || {
            shared.queue.close(&reason);
            let _ = threads.writer.join();
            shared.settling.close();
            let _ = threads.settler.join();
            shared.stop(&reason);
        });
        let _ = ended.await;
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.shared.stop(&"the log was dropped".into());
    }
}

/// One settle step of what falls due: memory is filled ahead from the store.
pub(super) fn scheduled_step(shared: &Arc<Shared>, state: &State) {
    match shared.due.step(state, shared.clock.now()) {
        Ok(true) => shared.due_news.notify_one(),
        Ok(false) => {}
        Err(error) => tracing::error!(%error, "what falls due next could not be read; it is tried again"),
    }
}

/// The releaser: moves what is due into the log, in (due, sequence) order, until the log stops.
async fn release(shared: Arc<Shared>) {
    let mut stopped = shared.stopped.subscribe();
    loop {
        if shared.refusal().is_some() || stopped.borrow().is_some() {
            return;
        }
        let now = shared.clock.now();
        let rows = shared.due.take_due(now, RELEASE);
        if rows.is_empty() {
            let next = shared.due.next_due();
            let clock = shared.clock.clone();
            tokio::select! {
                () = async { match next { Some(due) => clock.sleep_until(due).await, None => std::future::pending().await } } => {}
                () = shared.due_news.notified() => {}
                _ = stopped.changed() => return,
            }
            continue;
        }
        let looked = shared.committed();
        // One group for each namespace keeps the order inside it, and all of them share a sync.
        let mut groups: BTreeMap<NamespaceNumber, Vec<DueRow>> = BTreeMap::new();
        for row in rows {
            groups.entry(row.namespace).or_default().push(row);
        }
        let spaces = shared.spaces.read().by_number.clone();
        groups.retain(|number, rows| {
            let held = spaces.get(number).is_some_and(|space| space.held.load(Ordering::Acquire));
            if held {
                shared.held_rows.lock().append(rows);
            }
            !held
        });
        let known = groups.iter().filter_map(|(number, rows)| Some((spaces.get(number)?, rows)));
        join_all(known.map(|(space, rows)| release_rows(&shared, space, rows, looked))).await;
    }
}

async fn release_rows(shared: &Arc<Shared>, space: &Arc<Space>, rows: &[DueRow], looked: Sequence) {
    let draft = |row: &DueRow| {
        let record = Arc::new(Record::decode(&row.record).ok()?);
        Some(Draft::Release { parked: row.parked, due_at: row.due_at, record })
    };
    let drafts: Vec<Draft> = rows.iter().filter_map(draft).collect();
    match shared.change_looked(space, drafts, looked).await {
        Ok(Answer::LookAgain) => {
            // Too long in the queue to be judged: whoever still waits in the store is due again.
            if shared.flushed().await.is_ok() {
                let (reader, rows) = (shared.reader.clone(), rows.to_vec());
                let waits = move |row: &DueRow| {
                    let id = Record::peek_id(&row.record)?;
                    reader.parked_by_id(id).ok().flatten().filter(|found| found.parked == row.parked)
                };
                let left = tokio::task::spawn_blocking(move || {
                    rows.into_iter().filter(|row| waits(row).is_some()).collect::<Vec<_>>()
                });
                shared.due.give_back(left.await.unwrap_or_default());
            }
        }
        Ok(_) => {
            let now = shared.clock.now();
            for row in rows {
                shared.counters.lateness.observe(now.since(row.due_at));
            }
        }
        Err(LogError::Closed(_)) => {}
        Err(error) => {
            tracing::warn!(%error, "parked records could not be released; they are tried again");
            shared.due.give_back(rows.to_vec());
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
