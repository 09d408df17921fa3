//! One Redis server, over a few connections.
//!
//! A server reads some 16 KiB of a connection before it turns to the next, and syncs its disk only after a turn: over one
//! connection a batch would cost many syncs. Each key has its own connection, so that what is tried again comes after what
//! may still be under way.

use std::time::Duration;

use futures::future::join_all;
use redis::{Cmd, ConnectionInfo, Pipeline, RedisError};

use super::command::key_of;
use super::connection::Connection;
use super::slots::slot_of;
use super::verdict::judge;
use crate::sink::{Failure, Verdict};

/// So many connections.
const CONNECTIONS: usize = 16;

/// A server.
pub(super) struct Single {
    first: Connection,
    others: Vec<Connection>,
}

/// The part of a batch that goes over one connection.
#[derive(Default)]
struct Share {
    /// Where in the batch each command stands.
    indexes: Vec<usize>,
    pipeline: Pipeline,
}

impl Single {
    pub(super) fn new(info: &ConnectionInfo, timeout: Duration) -> Result<Self, String> {
        let others = (1..CONNECTIONS).map(|_| Connection::new(info.clone(), timeout));
        Ok(Self { first: Connection::new(info.clone(), timeout)?, others: others.collect::<Result<_, _>>()? })
    }

    /// Any of the connections.
    pub(super) const fn connection(&self) -> &Connection {
        &self.first
    }

    /// Runs the commands; gives what became of each.
    pub(super) async fn run(&self, commands: Vec<Cmd>) -> Vec<Result<(), Failure>> {
        let count = commands.len();
        let mut shares: Vec<Share> = std::iter::repeat_with(Share::default).take(CONNECTIONS).collect();
        for (index, command) in commands.into_iter().enumerate() {
            if let Some(share) = shares.get_mut(usize::from(slot_of(key_of(&command))) % CONNECTIONS) {
                share.indexes.push(index);
                share.pipeline.add_command(command);
            }
        }
        let connections = std::iter::once(&self.first).chain(&self.others);
        let sent = connections.zip(shares).filter(|(_, share)| !share.indexes.is_empty());
        let mut outcomes = vec![Ok(()); count];
        for failed in join_all(sent.map(|(connection, share)| share.run(connection))).await {
            for (index, failure) in failed {
                if let Some(outcome) = outcomes.get_mut(index) {
                    *outcome = Err(failure);
                }
            }
        }
        outcomes
    }
}

impl Share {
    /// Gives what failed.
    async fn run(mut self, connection: &Connection) -> Vec<(usize, Failure)> {
        let (shown, sent) = (connection.shown(), self.indexes.len());
        let all = |indexes: Vec<usize>, failure: Failure| {
            indexes.into_iter().map(|index| (index, failure.clone())).collect::<Vec<_>>()
        };
        match connection.run(self.pipeline.ignore_errors()).await {
            Err(failure) => all(self.indexes, failure),
            Ok(results) if results.len() == sent => {
                let pairs = self.indexes.into_iter().zip(results);
                pairs.filter_map(|(index, result)| Some((index, of_one(shown, &result.err()?)))).collect()
            }
            Ok(results) => {
                let why = format!("{shown}: {} answers to {sent} commands", results.len());
                all(self.indexes, Failure::new(Verdict::Backoff, why))
            }
        }
    }
}

/// What one server's error means; that it refers to another shows that it is none of its own.
fn of_one(shown: &str, error: &RedisError) -> Failure {
    let failure = judge(shown, error);
    if error.redirect_node().is_none() {
        return failure;
    }
    let help = "it is a node of a cluster, so name it under `cluster` instead of `url`";
    Failure::new(failure.verdict, format!("{}: {help}", failure.message))
}
