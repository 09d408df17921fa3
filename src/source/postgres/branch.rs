//! A branch's rows: what it finds when it starts, the ends that it writes, what it reads back.

use std::collections::BTreeMap;

use bytes::Bytes;
use tokio_postgres::{GenericClient, Transaction};

use super::Inner;
use super::rows::{Fields, count, encoded, id_bytes, part_end, position, reason_word, sql, text, time};
use crate::clock::Timestamp;
use crate::record::Position;
use crate::source::foreign::store::{StoredBranch, StoredEpoch};
use crate::source::{AsideLane, AsideRow, BranchName, DeadLetter, LogError, Reach, RowKey, Settlement, StoredPause};

/// How often replays are looked for that nobody told of.
const LOOK: std::time::Duration = std::time::Duration::from_secs(5);

/// What becomes of a row by several settlements: the last word counts.
enum End {
    Aside(AsideRow),
    Dead(DeadLetter),
    Returned,
}

impl Inner {
    pub(super) async fn open_branch(
        &self,
        branch: &BranchName,
        cursor: &Reach,
        instance: &str,
    ) -> Result<StoredBranch, LogError> {
        const ACT: &str = "read what a branch left behind";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let transaction = client.transaction().await.map_err(&failed)?;
        let name = branch.as_str();
        let known = self.sql("INSERT INTO {s}.branches (ns, name) VALUES ($1, $2) ON CONFLICT DO NOTHING");
        transaction.execute(&known, &[&self.namespace, &name]).await.map_err(&failed)?;
        let parts: Vec<i32> = cursor.iter().map(|position| i32::from(position.part())).collect();
        let from: Vec<i64> = cursor.iter().map(sql).collect();
        let to: Vec<i64> = cursor.iter().map(part_end).collect();
        // A part that somebody left without a word at this very place has stopped here once more.
        let hold = self.sql(
            "INSERT INTO {s}.holds AS h (ns, branch, part, cursor, instance, unclean)
             SELECT $1, $2, t.part, t.cursor, $5, 0 FROM unnest($3::int[], $4::bigint[]) AS t(part, cursor)
             ON CONFLICT (ns, branch, part) DO UPDATE SET
               unclean = CASE WHEN h.cursor <> excluded.cursor OR h.instance IS NULL THEN 0
                              WHEN h.instance = excluded.instance THEN h.unclean ELSE h.unclean + 1 END,
               cursor = excluded.cursor, instance = excluded.instance
             RETURNING unclean",
        );
        let holds =
            transaction.query(&hold, &[&self.namespace, &name, &parts, &from, &instance]).await.map_err(&failed)?;
        let beyond = |table: &str, columns: &str| {
            self.sql(&format!(
                "SELECT {columns} FROM {{s}}.{table} AS r JOIN unnest($3::bigint[], $4::bigint[]) AS t(low, high)
                 ON r.position > t.low AND r.position <= t.high WHERE r.ns = $1 AND r.branch = $2"
            ))
        };
        let mut stored = StoredBranch::default();
        for hold in &holds {
            let unclean = count(hold.try_get::<_, i32>(0).map_err(&failed)?.into());
            stored.unclean_stops = stored.unclean_stops.max(unclean);
        }
        for table in ["aside", "dead", "tombstones"] {
            let query = beyond(table, "r.position, r.child");
            let rows = transaction.query(&query, &[&self.namespace, &name, &from, &to]).await.map_err(&failed)?;
            for row in &rows {
                stored.ended.push(Fields(row).row_key().map_err(&failed)?);
            }
        }
        let marks = beyond("marks", "r.position, r.count");
        for row in &transaction.query(&marks, &[&self.namespace, &name, &from, &to]).await.map_err(&failed)? {
            let read = || -> Result<_, tokio_postgres::Error> { Ok((row.try_get(0)?, row.try_get::<_, i32>(1)?)) };
            let (at, marks) = read().map_err(&failed)?;
            stored.marks.push((position(at), count(marks.into())));
        }
        let pause = self.sql("SELECT pause FROM {s}.branches WHERE ns = $1 AND name = $2");
        let pause = transaction.query_one(&pause, &[&self.namespace, &name]).await.map_err(&failed)?;
        let pause: Option<String> = pause.try_get(0).map_err(&failed)?;
        stored.pause = pause.and_then(|pause| serde_json::from_str::<StoredPause>(&pause).ok());
        stored.lanes = self.lanes(&*transaction, branch, None).await?;
        let newest = self.sql("SELECT coalesce(max(replay), 0) FROM {s}.aside WHERE ns = $1 AND branch = $2");
        let newest = transaction.query_one(&newest, &[&self.namespace, &name]).await.map_err(&failed)?;
        let newest: i64 = newest.try_get(0).map_err(&failed)?;
        transaction.commit().await.map_err(&failed)?;
        self.branches.lock().insert(branch.clone());
        self.replays.lock().insert(branch.clone(), newest);
        Ok(stored)
    }

    /// The lanes that are set aside; only those with rows that were replayed after `since`, if it is given.
    async fn lanes(
        &self,
        client: &(impl GenericClient + Sync),
        branch: &BranchName,
        since: Option<i64>,
    ) -> Result<Vec<AsideLane>, LogError> {
        const ACT: &str = "read what is set aside";
        let failed = self.database.error(ACT);
        let query = self.sql(
            "SELECT DISTINCT ON (lane) lane, position, child, attempts, first_failed, next_try,
               count(*) OVER w AS rows, last_value(position) OVER w AS last, last_value(child) OVER w AS last_child
             FROM {s}.aside AS a WHERE ns = $1 AND branch = $2
               AND ($3::bigint IS NULL OR lane IN (SELECT lane FROM {s}.aside WHERE ns = $1 AND branch = $2 AND replay > $3))
             WINDOW w AS (PARTITION BY lane ORDER BY position, child ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
             ORDER BY lane, position, child",
        );
        let rows = client.query(&query, &[&self.namespace, &branch.as_str(), &since]).await.map_err(&failed)?;
        let lane = |row: &tokio_postgres::Row| -> Result<AsideLane, tokio_postgres::Error> {
            Ok(AsideLane {
                lane: Fields(row).lane()?,
                first: Fields(row).row_key()?,
                last: RowKey { position: position(row.try_get("last")?), child: count(row.try_get("last_child")?) },
                rows: row.try_get::<_, i64>("rows")?.cast_unsigned(),
                next_try: time(row.try_get("next_try")?),
                attempts: count(row.try_get("attempts")?),
                first_failed: time(row.try_get("first_failed")?),
            })
        };
        rows.iter().map(lane).collect::<Result<_, _>>().map_err(&failed)
    }

    pub(super) async fn leave_branch(&self, branch: &BranchName, instance: &str) -> Result<(), LogError> {
        const ACT: &str = "leave a branch in order";
        let client = self.database.lend(ACT).await?;
        let text = self.sql("UPDATE {s}.holds SET instance = NULL WHERE ns = $1 AND branch = $2 AND instance = $3");
        let left = client.execute(&text, &[&self.namespace, &branch.as_str(), &instance]).await;
        left.map(|_| ()).map_err(self.database.error(ACT))
    }

    pub(super) async fn settle(&self, branch: &BranchName, settlements: Vec<Settlement>) -> Result<(), LogError> {
        const ACT: &str = "write the ends of deliveries";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let (mut ends, mut overtaken, mut marks) = (BTreeMap::new(), Vec::new(), BTreeMap::<Position, i32>::new());
        let (mut pause, mut frontier) = (None, Reach::none());
        for settlement in settlements {
            ends.extend(settlement.aside.into_iter().map(|row| (row.row, End::Aside(row))));
            ends.extend(settlement.returned.into_iter().map(|row| (row, End::Returned)));
            ends.extend(settlement.dead.into_iter().map(|letter| (letter.row, End::Dead(letter))));
            overtaken.extend(settlement.overtaken);
            if let Some(mark) = settlement.mark {
                *marks.entry(mark).or_default() += 1;
            }
            pause = settlement.pause.or(pause);
            frontier.advance_all(&settlement.frontier);
        }
        let transaction = client.transaction().await.map_err(&failed)?;
        let write = async {
            let (mut aside, mut gone, mut dead) = (Vec::new(), Vec::new(), Vec::new());
            for (row, end) in ends {
                match end {
                    End::Aside(end) => aside.push(end),
                    End::Dead(letter) => {
                        gone.push(row);
                        dead.push(letter);
                    }
                    End::Returned => gone.push(row),
                }
            }
            self.put_aside(&transaction, branch, &aside).await?;
            let buried: Vec<RowKey> = dead.iter().map(|letter| letter.row).collect();
            let beyond = gone.iter().copied().filter(|row| !frontier.covers(row.position) && !buried.contains(row));
            self.delete_rows(&transaction, "aside", branch, &gone).await?;
            self.put_tombstones(&transaction, branch, &beyond.collect::<Vec<_>>()).await?;
            self.put_dead(&transaction, branch, &dead).await?;
            self.mark_overtaken(&transaction, branch, &overtaken).await?;
            self.put_marks(&transaction, branch, &marks).await?;
            if let Some(pause) = pause {
                let pause = pause.and_then(|pause: StoredPause| serde_json::to_string(&pause).ok());
                let put = self.sql("UPDATE {s}.branches SET pause = $3 WHERE ns = $1 AND name = $2");
                transaction.execute(&put, &[&self.namespace, &branch.as_str(), &pause]).await?;
            }
            self.pass(&transaction, branch, &frontier).await
        };
        write.await.map_err(&failed)?;
        transaction.commit().await.map_err(&failed)?;
        self.news.counts.notify_one();
        Ok(())
    }

    /// Forgets ends and marks that the frontier has passed.
    async fn pass(
        &self,
        transaction: &Transaction<'_>,
        branch: &BranchName,
        frontier: &Reach,
    ) -> Result<(), tokio_postgres::Error> {
        if frontier.is_empty() {
            return Ok(());
        }
        let low: Vec<i64> = frontier.iter().map(|position| sql(Position::in_part(position.part(), 0))).collect();
        let high: Vec<i64> = frontier.iter().map(sql).collect();
        for table in ["tombstones", "marks"] {
            let text = self.sql(&format!(
                "DELETE FROM {{s}}.{table} AS r USING unnest($3::bigint[], $4::bigint[]) AS t(low, high)
                 WHERE r.ns = $1 AND r.branch = $2 AND r.position BETWEEN t.low AND t.high"
            ));
            transaction.execute(&text, &[&self.namespace, &branch.as_str(), &low, &high]).await?;
        }
        Ok(())
    }

    pub(super) async fn put_aside(
        &self,
        transaction: &Transaction<'_>,
        branch: &BranchName,
        rows: &[AsideRow],
    ) -> Result<(), tokio_postgres::Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let positions: Vec<i64> = rows.iter().map(|row| sql(row.row.position)).collect();
        let children: Vec<i64> = rows.iter().map(|row| row.row.child.into()).collect();
        let lanes: Vec<&[u8]> = rows.iter().map(|row| row.lane.as_bytes()).collect();
        let attempts: Vec<i64> = rows.iter().map(|row| row.attempts.into()).collect();
        let failed: Vec<i64> = rows.iter().map(|row| row.first_failed.as_millis()).collect();
        let tries: Vec<i64> = rows.iter().map(|row| row.next_try.as_millis()).collect();
        let errors: Vec<String> = rows.iter().map(|row| text(&row.last_error)).collect();
        let rendered: Vec<Option<&[u8]>> = rows.iter().map(|row| row.rendered.as_deref()).collect();
        let records: Vec<Vec<u8>> = rows.iter().map(|row| encoded(&row.record)).collect();
        let ids: Vec<&[u8]> = rows.iter().map(|row| id_bytes(&row.record.id)).collect();
        let replayed: Vec<bool> = rows.iter().map(|row| row.replayed).collect();
        let epochs: Vec<i64> = rows.iter().map(|row| row.record.epoch.into()).collect();
        let put = self.sql(
            "INSERT INTO {s}.aside AS a (ns, branch, position, child, lane, attempts, first_failed, next_try, last_error, rendered,
               record, id, replay, epoch)
             SELECT $1, $2, t.position, t.child, t.lane, t.attempts, t.failed, t.try, t.error, t.rendered, t.record, t.id,
               CASE WHEN t.replayed THEN nextval('{s}.replays') END, t.epoch
             FROM unnest($3::bigint[], $4::bigint[], $5::bytea[], $6::bigint[], $7::bigint[], $8::bigint[], $9::text[],
               $10::bytea[], $11::bytea[], $12::bytea[], $13::bool[], $14::bigint[])
               AS t(position, child, lane, attempts, failed, try, error, rendered, record, id, replayed, epoch)
             ORDER BY t.position, t.child
             ON CONFLICT (ns, branch, position, child) DO UPDATE SET
               lane = excluded.lane, attempts = excluded.attempts, first_failed = excluded.first_failed,
               next_try = excluded.next_try, last_error = excluded.last_error, rendered = excluded.rendered,
               record = excluded.record, replay = coalesce(a.replay, excluded.replay)",
        );
        transaction
            .execute(
                &put,
                &[
                    &self.namespace,
                    &branch.as_str(),
                    &positions,
                    &children,
                    &lanes,
                    &attempts,
                    &failed,
                    &tries,
                    &errors,
                    &rendered,
                    &records,
                    &ids,
                    &replayed,
                    &epochs,
                ],
            )
            .await
            .map(|_| ())
    }

    pub(super) async fn delete_rows(
        &self,
        transaction: &Transaction<'_>,
        table: &str,
        branch: &BranchName,
        rows: &[RowKey],
    ) -> Result<(), tokio_postgres::Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let (positions, children) = as_arrays(rows);
        let text = self.sql(&format!(
            "DELETE FROM {{s}}.{table} AS r USING unnest($3::bigint[], $4::bigint[]) AS t(position, child)
             WHERE r.ns = $1 AND r.branch = $2 AND r.position = t.position AND r.child = t.child"
        ));
        let gone = transaction.execute(&text, &[&self.namespace, &branch.as_str(), &positions, &children]).await;
        gone.map(|_| ())
    }

    pub(super) async fn put_tombstones(
        &self,
        transaction: &Transaction<'_>,
        branch: &BranchName,
        rows: &[RowKey],
    ) -> Result<(), tokio_postgres::Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let (positions, children) = as_arrays(rows);
        let text = self.sql(
            "INSERT INTO {s}.tombstones SELECT $1, $2, t.position, t.child
             FROM unnest($3::bigint[], $4::bigint[]) AS t(position, child) ON CONFLICT DO NOTHING",
        );
        let put = transaction.execute(&text, &[&self.namespace, &branch.as_str(), &positions, &children]).await;
        put.map(|_| ())
    }

    async fn put_dead(
        &self,
        transaction: &Transaction<'_>,
        branch: &BranchName,
        letters: &[DeadLetter],
    ) -> Result<(), tokio_postgres::Error> {
        let put = self.sql(
            "INSERT INTO {s}.dead (ns, branch, position, child, at, reason, attempts, last_error, stage, revision, rendered,
               record, id, key, bytes, overtaken, epoch)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)
             ON CONFLICT (ns, branch, position, child) DO UPDATE SET
               at = excluded.at, reason = excluded.reason, attempts = excluded.attempts, last_error = excluded.last_error,
               stage = excluded.stage, revision = excluded.revision, rendered = excluded.rendered",
        );
        if letters.is_empty() {
            return Ok(());
        }
        let put = transaction.prepare(&put).await?;
        let each = letters.iter().map(|letter| {
            let put = &put;
            async move {
                let bytes = letter.record.weight() + letter.rendered.as_ref().map_or(0, Bytes::len);
                let values: [&(dyn tokio_postgres::types::ToSql + Sync); 17] = [
                    &self.namespace,
                    &branch.as_str(),
                    &sql(letter.row.position),
                    &i64::from(letter.row.child),
                    &letter.at.as_millis(),
                    &reason_word(letter.reason),
                    &i64::from(letter.attempts),
                    &text(&letter.last_error),
                    &text(&letter.stage),
                    &text(&letter.revision),
                    &letter.rendered.as_deref(),
                    &encoded(&letter.record),
                    &id_bytes(&letter.record.id),
                    &letter.record.key.as_deref().map(str::as_bytes),
                    &i64::try_from(bytes).unwrap_or(i64::MAX),
                    &letter.overtaken,
                    &i64::from(letter.record.epoch),
                ];
                transaction.execute(put, &values).await
            }
        });
        // Sent together, answered in order: one round trip for all.
        futures::future::try_join_all(each).await.map(|_| ())
    }

    async fn mark_overtaken(
        &self,
        transaction: &Transaction<'_>,
        branch: &BranchName,
        rows: &[RowKey],
    ) -> Result<(), tokio_postgres::Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let (positions, children) = as_arrays(rows);
        let text = self.sql(
            "UPDATE {s}.dead AS r SET overtaken = true FROM unnest($3::bigint[], $4::bigint[]) AS t(position, child)
             WHERE r.ns = $1 AND r.branch = $2 AND r.position = t.position AND r.child = t.child",
        );
        let put = transaction.execute(&text, &[&self.namespace, &branch.as_str(), &positions, &children]).await;
        put.map(|_| ())
    }

    async fn put_marks(
        &self,
        transaction: &Transaction<'_>,
        branch: &BranchName,
        marks: &BTreeMap<Position, i32>,
    ) -> Result<(), tokio_postgres::Error> {
        let text = self.sql(
            "INSERT INTO {s}.marks AS m VALUES ($1, $2, $3, $4)
             ON CONFLICT (ns, branch, position) DO UPDATE SET count = m.count + excluded.count",
        );
        for (position, count) in marks {
            transaction.execute(&text, &[&self.namespace, &branch.as_str(), &sql(*position), count]).await?;
        }
        Ok(())
    }

    pub(super) async fn aside_rows(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> Result<Vec<AsideRow>, LogError> {
        const ACT: &str = "read what is set aside";
        let client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let text = self.sql(
            "SELECT * FROM {s}.aside WHERE ns = $1 AND branch = $2 AND lane = $3 ORDER BY position, child LIMIT $4",
        );
        let text = client.prepare_cached(&text).await.map_err(&failed)?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = client
            .query(&text, &[&self.namespace, &branch.as_str(), &lane.as_bytes(), &limit])
            .await
            .map_err(&failed)?;
        rows.iter().map(|row| Fields(row).aside().map_err(&failed)?).collect()
    }

    pub(super) async fn wait_for_replays(&self, branch: &BranchName) -> Vec<AsideLane> {
        loop {
            let news = self.news.replayed.notified();
            tokio::pin!(news);
            news.as_mut().enable();
            match self.database.in_time(self.replayed_since(branch)).await {
                Ok((lanes, newest)) if !lanes.is_empty() => {
                    // Told with this very answer, which nobody can drop any more.
                    self.replays.lock().insert(branch.clone(), newest);
                    return lanes;
                }
                Ok(_) => {}
                Err(LogError::Closed(_)) => return std::future::pending().await,
                Err(error) => tracing::debug!(%branch, %error, "replays could not be looked for, trying again"),
            }
            tokio::select! {
                () = news => {}
                () = tokio::time::sleep(LOOK) => {}
                () = self.closed.cancelled() => return std::future::pending().await,
            }
        }
    }

    async fn replayed_since(&self, branch: &BranchName) -> Result<(Vec<AsideLane>, i64), LogError> {
        const ACT: &str = "look for what was replayed";
        self.still_open()?;
        let since = self.replays.lock().get(branch).copied().unwrap_or(0);
        let client = self.database.lend(ACT).await?;
        let newest = self.sql("SELECT coalesce(max(replay), 0) FROM {s}.aside WHERE ns = $1 AND branch = $2");
        let newest = client.query_one(&newest, &[&self.namespace, &branch.as_str()]).await;
        let newest: i64 = newest.and_then(|row| row.try_get(0)).map_err(self.database.error(ACT))?;
        if newest <= since {
            return Ok((Vec::new(), since));
        }
        Ok((self.lanes(&**client, branch, Some(since)).await?, newest))
    }

    pub(super) async fn forget_branch(&self, branch: &BranchName) -> Result<(), LogError> {
        const ACT: &str = "forget a branch";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let transaction = client.transaction().await.map_err(&failed)?;
        for (table, column) in BY_BRANCH {
            let text = self.sql(&format!("DELETE FROM {{s}}.{table} WHERE ns = $1 AND {column} = $2"));
            transaction.execute(&text, &[&self.namespace, &branch.as_str()]).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)?;
        self.branches.lock().remove(branch);
        self.news.counts.notify_one();
        Ok(())
    }

    pub(super) async fn rename_branch(&self, from: &BranchName, to: &BranchName) -> Result<(), LogError> {
        const ACT: &str = "rename a branch";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let transaction = client.transaction().await.map_err(&failed)?;
        let known = self.sql("SELECT name FROM {s}.branches WHERE ns = $1 AND name IN ($2, $3) FOR UPDATE");
        let known =
            transaction.query(&known, &[&self.namespace, &from.as_str(), &to.as_str()]).await.map_err(&failed)?;
        let names: Vec<String> = known.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(&failed)?;
        if names != [from.as_str()] {
            return Ok(());
        }
        for (table, column) in BY_BRANCH {
            let text = self.sql(&format!("UPDATE {{s}}.{table} SET {column} = $3 WHERE ns = $1 AND {column} = $2"));
            transaction.execute(&text, &[&self.namespace, &from.as_str(), &to.as_str()]).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)?;
        let mut branches = self.branches.lock();
        branches.remove(from);
        branches.insert(to.clone());
        drop(branches);
        self.news.counts.notify_one();
        Ok(())
    }

    pub(super) async fn put_epoch(&self, files: Bytes, place: std::sync::Arc<str>) -> Result<StoredEpoch, LogError> {
        const ACT: &str = "keep a revision of the file";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let transaction = client.transaction().await.map_err(&failed)?;
        // Two processes with one new file keep it once.
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))";
        transaction.execute(lock, &[&self.namespace]).await.map_err(&failed)?;
        let newest = self.sql("SELECT number, files FROM {s}.epochs WHERE ns = $1 ORDER BY number DESC LIMIT 1");
        let newest = transaction.query_opt(&newest, &[&self.namespace]).await.map_err(&failed)?;
        let known = match &newest {
            None => None,
            Some(row) => {
                let read = || -> Result<_, tokio_postgres::Error> {
                    Ok((row.try_get::<_, i32>(0)?, row.try_get::<_, &[u8]>(1)?))
                };
                Some(read().map_err(&failed)?)
            }
        };
        if known.is_none_or(|(_, kept)| *kept != *files) {
            let number = known.map_or(0, |(number, _)| number) + 1;
            let put = self.sql("INSERT INTO {s}.epochs VALUES ($1, $2, $3, $4)");
            transaction.execute(&put, &[&self.namespace, &number, &&*place, &&*files]).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)?;
        drop(client);
        self.refresh().await?;
        self.epochs.lock().last().cloned().ok_or(LogError::Unsupported("no revision was kept"))
    }

    pub(super) async fn refresh(&self) -> Result<(), LogError> {
        const ACT: &str = "read branches and revisions";
        let client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let branches = self.sql("SELECT name FROM {s}.branches WHERE ns = $1");
        let branches = client.query(&branches, &[&self.namespace]).await.map_err(&failed)?;
        let epochs = self.sql("SELECT number, place, files FROM {s}.epochs WHERE ns = $1 ORDER BY number");
        let epochs = client.query(&epochs, &[&self.namespace]).await.map_err(&failed)?;
        let epoch = |row: &tokio_postgres::Row| -> Result<StoredEpoch, tokio_postgres::Error> {
            Ok(StoredEpoch {
                number: count(row.try_get::<_, i32>(0)?.into()),
                place: row.try_get::<_, &str>(1)?.into(),
                files: row.try_get::<_, Vec<u8>>(2)?.into(),
            })
        };
        let epochs = epochs.iter().map(epoch).collect::<Result<Vec<_>, _>>().map_err(&failed)?;
        let name = |row: &tokio_postgres::Row| row.try_get::<_, &str>(0).map(BranchName::from_stored);
        let branches = branches.iter().map(name).collect::<Result<_, _>>().map_err(&failed)?;
        (*self.epochs.lock(), *self.branches.lock()) = (epochs, branches);
        Ok(())
    }

    pub(super) async fn tidy(&self, keys_before: Timestamp, cursors: &[(BranchName, Reach)]) -> Result<(), LogError> {
        const ACT: &str = "forget what is over";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let before = keys_before.as_millis();
        // At most so many at once: a day's keys are a long transaction.
        let keys = self.sql(
            "DELETE FROM {s}.keys WHERE ns = $1 AND key IN (SELECT key FROM {s}.keys WHERE ns = $1 AND written_at < $2 LIMIT 50000)",
        );
        client.execute(&keys, &[&self.namespace, &before]).await.map_err(&failed)?;
        let cancelled = self.sql("DELETE FROM {s}.cancelled WHERE ns = $1 AND at < $2");
        client.execute(&cancelled, &[&self.namespace, &before]).await.map_err(&failed)?;
        // Which revision the oldest record in the log belongs to only the broker could tell, so the newest hundred stay; and
        // those of rows that may be sent again, however old.
        let epochs = self.sql(
            "DELETE FROM {s}.epochs WHERE ns = $1 AND number <= (SELECT max(number) FROM {s}.epochs WHERE ns = $1) - 100
               AND number < (SELECT coalesce(min(epoch), 4294967296) FROM (
                 SELECT epoch FROM {s}.aside WHERE ns = $1 UNION ALL SELECT epoch FROM {s}.dead WHERE ns = $1) AS needed)",
        );
        client.execute(&epochs, &[&self.namespace]).await.map_err(&failed)?;
        let transaction = client.transaction().await.map_err(&failed)?;
        for (branch, reach) in cursors {
            self.pass(&transaction, branch, reach).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)
    }

    pub(super) async fn delete(&self) -> Result<(), LogError> {
        const ACT: &str = "delete a namespace";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let transaction = client.transaction().await.map_err(&failed)?;
        for table in super::schema::TABLES {
            let text = self.sql(&format!("DELETE FROM {{s}}.{table} WHERE ns = $1"));
            transaction.execute(&text, &[&self.namespace]).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)?;
        drop(client);
        self.refresh().await?;
        self.count().await
    }
}

/// Tables with rows of branches, and the column with the branch's name.
const BY_BRANCH: [(&str, &str); 6] = [
    ("branches", "name"),
    ("holds", "branch"),
    ("aside", "branch"),
    ("dead", "branch"),
    ("tombstones", "branch"),
    ("marks", "branch"),
];

/// Rows as the two arrays that `unnest` puts together again.
fn as_arrays(rows: &[RowKey]) -> (Vec<i64>, Vec<i64>) {
    rows.iter().map(|row| (sql(row.position), i64::from(row.child))).unzip()
}
