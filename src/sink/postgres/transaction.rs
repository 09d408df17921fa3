//! A batch in one transaction: its rows written run by run, each that is refused found and taken out.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use deadpool_postgres::{ClientWrapper as Client, Object};
use tokio_postgres::Transaction;
use tokio_postgres::error::SqlState;

use super::copy::Copied;
use super::statement::{Row, Run, runs};
use super::verdict::{Ended, is_for_insert, is_the_columns, is_the_values, within};
use super::{PostgresSink, make_barrier, refusal};
use crate::sink::{Failure, Operation, Verdict};

/// How a transaction is gone about.
#[derive(Clone, Copy)]
struct How {
    /// Constraints are checked row by row, also those that could wait.
    at_once: bool,
    /// Many rows may go by COPY.
    bulk: bool,
}

impl PostgresSink {
    /// Makes the barrier's table unless it is there.
    async fn prepare(&self, client: &Client) -> Result<(), Failure> {
        let Some(barrier) = self.barrier.as_ref().filter(|_| !self.prepared.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let make = make_barrier(barrier);
        let look = async {
            let there = client.query_one("SELECT to_regclass($1) IS NOT NULL", &[barrier]).await?;
            if there.try_get::<_, bool>(0)? { Ok(()) } else { client.batch_execute(&make).await }
        };
        within(self.timeout, look).await.map_err(|ended| {
            let why = ended.judge("the barrier's table is not there").message;
            let message = format!("{}: {why}; somebody with the right runs: {make}", self.shown());
            Failure::new(Verdict::Down, message)
        })?;
        self.prepared.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Writes the rows; those that are refused come back, each with its reason. `at_once` checks also those constraints row
    /// by row that would be checked when the transaction ends.
    pub(super) async fn write_rows<'a>(
        &self,
        batch: &'a [Operation],
        rows: Vec<(usize, Row)>,
        refused: HashSet<&'a str>,
        at_once: bool,
    ) -> Result<Vec<(usize, Failure)>, Failure> {
        let mut client = self.lend().await?;
        self.prepare(&client).await?;
        // Checked row by row means that one has to be found, which COPY cannot; and what goes with each row is no bulk.
        let bulk = !at_once && self.barrier.is_none();
        let how = How { at_once, bulk };
        let mut ended = match self.transact(&mut client, batch, rows, refused.clone(), how).await {
            Ok(failed) => return Ok(failed),
            Err(ended) => ended,
        };
        if matches!(&ended, Ended::NotCopied(error) if is_for_insert(error)) {
            drop(Object::take(client));
            client = self.lend().await?;
            let (rows, _) = self.rendered(batch);
            ended = match self.transact(&mut client, batch, rows, refused, How { at_once, bulk: false }).await {
                Ok(failed) => return Ok(failed),
                Err(ended) => ended,
            };
        }
        match &ended {
            // What it still waits for would be taken for the next answer. A transaction that nobody ends is rolled back, and
            // until then its rows are locked, so nothing older comes after what is sent next.
            Ended::Silent(_) | Ended::NotCopied(_) => drop(Object::take(client)),
            Ended::Said(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => {
                self.prepared.store(false, Ordering::Relaxed);
            }
            Ended::Said(_) => {}
        }
        Err(ended.judge(self.shown()))
    }

    async fn transact<'a>(
        &self,
        client: &mut Client,
        batch: &'a [Operation],
        rows: Vec<(usize, Row)>,
        mut refused_keys: HashSet<&'a str>,
        how: How,
    ) -> Result<Vec<(usize, Failure)>, Ended> {
        let longest = self.timeout;
        let mut transaction = within(longest, client.transaction()).await?;
        if how.at_once {
            within(longest, transaction.batch_execute("SET CONSTRAINTS ALL IMMEDIATE")).await?;
        }
        let rows = match &self.barrier {
            None => rows,
            Some(barrier) => self.new_ones(&transaction, barrier, batch, rows).await?,
        };
        let mut failed = Vec::new();
        // From the back, so that the next is popped.
        let mut left: Vec<Run> = runs(rows, how.bulk);
        left.reverse();
        while let Some(mut run) = left.pop() {
            // What follows a refused record of its key waits: whether it may pass is for the driver to say.
            run.rows.retain(|(index, _)| {
                let key = batch.get(*index).and_then(|operation| operation.event.key.as_deref());
                let waits = key.is_some_and(|key| refused_keys.contains(key));
                if waits {
                    let why = "not sent: an earlier record of its key in the same batch was refused";
                    failed.push((*index, Failure::new(Verdict::Backoff, why)));
                }
                !waits
            });
            if run.rows.is_empty() {
                continue;
            }
            let Some(case) = self.cases.get(run.case) else { continue };
            let savepoint = within(longest, transaction.savepoint("walflow_run")).await?;
            if run.bulk {
                run.bulk = false;
                match self.copy(&savepoint, case, &run).await? {
                    Copied::All => {
                        within(longest, savepoint.commit()).await?;
                        continue;
                    }
                    Copied::NotTried => {}
                    Copied::InVain => {
                        within(longest, savepoint.rollback()).await?;
                        left.push(run);
                        continue;
                    }
                }
            }
            match case.execute(&savepoint, &run, longest).await {
                Ok(()) => within(longest, savepoint.commit()).await?,
                Err(Ended::Said(error))
                    if is_the_values(&error) || (case.record_names_columns() && is_the_columns(&error)) =>
                {
                    within(longest, savepoint.rollback()).await?;
                    if run.rows.len() > 1 {
                        let right = run.split();
                        left.push(right);
                        left.push(run);
                        continue;
                    }
                    let Some((_, row)) = run.rows.first() else { continue };
                    let why = refusal::explain(&mut transaction, case, row, &error, longest).await?;
                    let failure = Failure::new(Verdict::Never, format!("{}: {why}", self.shown()));
                    for (index, _) in run.rows {
                        refused_keys.extend(batch.get(index).and_then(|operation| operation.event.key.as_deref()));
                        failed.push((index, failure.clone()));
                    }
                }
                Err(ended) => return Err(ended),
            }
        }
        if let Some(barrier) = &self.barrier {
            self.forget(&transaction, barrier, batch, &failed).await?;
        }
        within(longest, transaction.commit()).await?;
        Ok(failed)
    }

    /// The rows that the barrier has not seen; it has seen them from now on.
    async fn new_ones(
        &self,
        transaction: &Transaction<'_>,
        barrier: &str,
        batch: &[Operation],
        rows: Vec<(usize, Row)>,
    ) -> Result<Vec<(usize, Row)>, Ended> {
        let ids: Vec<String> =
            rows.iter().filter_map(|(index, _)| batch.get(*index)).map(Operation::delivery_id).collect();
        let text = format!("INSERT INTO {barrier} (id) SELECT unnest($1::text[]) ON CONFLICT DO NOTHING RETURNING id");
        let new = within(self.timeout, transaction.query(&text, &[&ids])).await?;
        let new: HashSet<String> = new.iter().filter_map(|row| row.try_get(0).ok()).collect();
        let is_new = |(index, _): &(usize, Row)| {
            batch.get(*index).is_some_and(|operation| new.contains(&operation.delivery_id()))
        };
        Ok(rows.into_iter().filter(is_new).collect())
    }

    /// What failed was not delivered.
    async fn forget(
        &self,
        transaction: &Transaction<'_>,
        barrier: &str,
        batch: &[Operation],
        failed: &[(usize, Failure)],
    ) -> Result<(), Ended> {
        let ids: Vec<String> =
            failed.iter().filter_map(|(index, _)| batch.get(*index)).map(Operation::delivery_id).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let text = format!("DELETE FROM {barrier} WHERE id = ANY($1)");
        within(self.timeout, transaction.execute(&text, &[&ids])).await.map(|_| ())
    }
}
