//! What waits for its time: parked, marked when it is taken, removed when it is in the log.

use std::collections::HashMap;
use std::sync::Arc;

use super::Inner;
use super::rows::{encoded, id_bytes, record, time};
use crate::clock::Timestamp;
use crate::record::{Record, RecordId};
use crate::source::foreign::store::{Claimed, Parking, Releasing};
use crate::source::{LogError, Page, ParkedQuery, ParkedRow, Scheduled};

impl Inner {
    pub(super) async fn park(&self, rows: &[Parking]) -> Result<Vec<Claimed>, LogError> {
        const ACT: &str = "park records";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let transaction = client.transaction().await.map_err(&failed)?;
        let keyed: Vec<&Parking> = rows.iter().filter(|row| row.key.is_some()).collect();
        let mut known: HashMap<Vec<u8>, Claimed> = HashMap::new();
        if !keyed.is_empty() {
            let of = |row: &&Parking| row.key.clone();
            let owned: Vec<_> = keyed.iter().filter_map(of).collect();
            let keys: Vec<&[u8]> = owned.iter().map(|key| key.key.as_bytes()).collect();
            let prints: Vec<&[u8]> = owned.iter().map(|key| &key.fingerprint[..]).collect();
            let ids: Vec<&[u8]> = keyed.iter().map(|row| id_bytes(&row.record.id)).collect();
            let written: Vec<i64> = keyed.iter().map(|row| row.record.written_at.as_millis()).collect();
            let due: Vec<Option<i64>> = keyed.iter().map(|row| row.record.due_at.map(Timestamp::as_millis)).collect();
            let put = self.sql(
                "INSERT INTO {s}.keys AS k (ns, key, fingerprint, id, written_at, due, confirmed, claimed_at)
                 SELECT $1, t.key, t.fp, t.id, t.written, t.due, true, t.written
                 FROM unnest($2::bytea[], $3::bytea[], $4::bytea[], $5::bigint[], $6::bigint[]) AS t(key, fp, id, written, due)
                 ORDER BY t.key
                 ON CONFLICT (ns, key) DO UPDATE SET
                   fingerprint = excluded.fingerprint, id = excluded.id, written_at = excluded.written_at, due = excluded.due,
                   confirmed = true, claimed_at = excluded.claimed_at
                 WHERE k.written_at < $7 OR k.id = excluded.id
                 RETURNING key",
            );
            let window = self.window();
            let mine = transaction
                .query(&put, &[&self.namespace, &keys, &prints, &ids, &written, &due, &window])
                .await
                .map_err(&failed)?;
            let mine: Vec<Vec<u8>> =
                mine.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(&failed)?;
            let others: Vec<&[u8]> = keys.iter().copied().filter(|key| !mine.iter().any(|mine| mine == key)).collect();
            if !others.is_empty() {
                known = self.known(&*transaction, &others, Timestamp::MIN).await?;
            }
        }
        let is_known = |row: &&Parking| row.key.as_ref().is_some_and(|key| known.contains_key(key.key.as_bytes()));
        let fresh: Vec<&Parking> = rows.iter().filter(|row| !is_known(row)).collect();
        self.put_parked(&transaction, &fresh).await.map_err(&failed)?;
        transaction.commit().await.map_err(&failed)?;
        self.news.parked.notify_one();
        self.news.counts.notify_one();
        let outcome = |row: &Parking| {
            let fresh = Claimed::Fresh { id: row.record.id, written_at: row.record.written_at };
            row.key.as_ref().and_then(|key| known.get(key.key.as_bytes()).cloned()).unwrap_or(fresh)
        };
        Ok(rows.iter().map(outcome).collect())
    }

    async fn put_parked(
        &self,
        transaction: &tokio_postgres::Transaction<'_>,
        rows: &[&Parking],
    ) -> Result<(), tokio_postgres::Error> {
        let ids: Vec<&[u8]> = rows.iter().map(|row| id_bytes(&row.record.id)).collect();
        let due: Vec<i64> =
            rows.iter().map(|row| row.record.due_at.unwrap_or(row.record.written_at).as_millis()).collect();
        let keys: Vec<Option<&[u8]>> = rows.iter().map(|row| row.record.key.as_deref().map(str::as_bytes)).collect();
        let records: Vec<Vec<u8>> = rows.iter().map(|row| encoded(&row.record)).collect();
        let put = self.sql(
            "INSERT INTO {s}.parked (ns, id, due, key, record)
             SELECT $1, t.id, t.due, t.key, t.record
             FROM unnest($2::bytea[], $3::bigint[], $4::bytea[], $5::bytea[]) AS t(id, due, key, record)
             ON CONFLICT DO NOTHING",
        );
        transaction.execute(&put, &[&self.namespace, &ids, &due, &keys, &records]).await?;
        transaction.execute(&self.database.tell(), &[&self.namespace]).await.map(|_| ())
    }

    pub(super) async fn lead(&self, until: Timestamp) -> Result<bool, LogError> {
        const ACT: &str = "become the one that releases";
        let client = self.database.lend(ACT).await?;
        let put = self.sql(
            "INSERT INTO {s}.leases AS l (ns, holder, until) VALUES ($1, $2, $3)
             ON CONFLICT (ns) DO UPDATE SET holder = excluded.holder, until = excluded.until
             WHERE l.holder = excluded.holder OR l.until < $4",
        );
        let put = client.prepare_cached(&put).await.map_err(self.database.error(ACT))?;
        let (until, now) = (until.as_millis(), self.clock.now().as_millis());
        let taken = client.execute(&put, &[&self.namespace, &self.holder, &until, &now]).await;
        Ok(taken.map_err(self.database.error(ACT))? == 1)
    }

    pub(super) async fn resign(&self) -> Result<(), LogError> {
        const ACT: &str = "let the lease go";
        let client = self.database.lend(ACT).await?;
        let text = self.sql("DELETE FROM {s}.leases WHERE ns = $1 AND holder = $2");
        client.execute(&text, &[&self.namespace, &self.holder]).await.map_err(self.database.error(ACT))?;
        client.execute(&self.database.tell(), &[&self.namespace]).await.map_err(self.database.error(ACT))?;
        Ok(())
    }

    pub(super) async fn next_due(&self) -> Result<Option<Timestamp>, LogError> {
        const ACT: &str = "ask what is due next";
        let client = self.database.lend(ACT).await?;
        let text = self.sql("SELECT due FROM {s}.parked WHERE ns = $1 AND place IS NULL ORDER BY due LIMIT 1");
        let text = client.prepare_cached(&text).await.map_err(self.database.error(ACT))?;
        let found = client.query_opt(&text, &[&self.namespace]).await.map_err(self.database.error(ACT))?;
        found.map(|row| row.try_get(0).map(time)).transpose().map_err(self.database.error(ACT))
    }

    pub(super) async fn take_due(
        &self,
        now: Timestamp,
        limit: usize,
        place: Arc<str>,
    ) -> Result<Vec<Releasing>, LogError> {
        const ACT: &str = "take what is due";
        let client = self.database.lend(ACT).await?;
        let mark = self.sql(
            "WITH taken AS (
               SELECT id FROM {s}.parked WHERE ns = $1 AND place IS NULL AND due <= $2
               ORDER BY due, id LIMIT $3 FOR UPDATE SKIP LOCKED)
             UPDATE {s}.parked AS p SET place = $4 FROM taken WHERE p.ns = $1 AND p.id = taken.id
             RETURNING p.due, p.id, p.record, p.place",
        );
        let mark = client.prepare_cached(&mark).await.map_err(self.database.error(ACT))?;
        let (now, limit) = (now.as_millis(), i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = client.query(&mark, &[&self.namespace, &now, &limit, &&*place]).await;
        self.releasing(&rows.map_err(self.database.error(ACT))?)
    }

    pub(super) async fn marked(&self, limit: usize) -> Result<Vec<Releasing>, LogError> {
        const ACT: &str = "look for what was under way";
        let client = self.database.lend(ACT).await?;
        let text = self.sql(
            "SELECT due, id, record, place FROM {s}.parked WHERE ns = $1 AND place IS NOT NULL ORDER BY due, id LIMIT $2",
        );
        let text = client.prepare_cached(&text).await.map_err(self.database.error(ACT))?;
        let rows = client.query(&text, &[&self.namespace, &i64::try_from(limit).unwrap_or(i64::MAX)]).await;
        self.releasing(&rows.map_err(self.database.error(ACT))?)
    }

    fn releasing(&self, rows: &[tokio_postgres::Row]) -> Result<Vec<Releasing>, LogError> {
        const ACT: &str = "read what is due";
        let mut found = Vec::with_capacity(rows.len());
        for row in rows {
            let read = || -> Result<_, tokio_postgres::Error> {
                Ok((
                    row.try_get::<_, i64>(0)?,
                    row.try_get::<_, Vec<u8>>(1)?,
                    row.try_get(2)?,
                    row.try_get::<_, &str>(3)?,
                ))
            };
            let (due, id, bytes, place) = read().map_err(self.database.error(ACT))?;
            found.push(((due, id), Releasing { record: record(bytes)?, place: place.into() }));
        }
        // An update gives its rows in no order.
        found.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(found.into_iter().map(|(_, releasing)| releasing).collect())
    }

    pub(super) async fn released(&self, ids: &[RecordId]) -> Result<(), LogError> {
        const ACT: &str = "remove what is in the log";
        let client = self.database.lend(ACT).await?;
        let ids: Vec<&[u8]> = ids.iter().map(id_bytes).collect();
        let text = self.sql("DELETE FROM {s}.parked WHERE ns = $1 AND id = ANY($2)");
        let text = client.prepare_cached(&text).await.map_err(self.database.error(ACT))?;
        client.execute(&text, &[&self.namespace, &ids]).await.map_err(self.database.error(ACT))?;
        self.news.counts.notify_one();
        Ok(())
    }

    pub(super) async fn parked_page(&self, query: &ParkedQuery) -> Result<Page<ParkedRow>, LogError> {
        const ACT: &str = "list what is parked";
        let client = self.database.lend(ACT).await?;
        let after = query.after.as_deref().and_then(|token| {
            let (due, id) = token.split_once('.')?;
            Some((due.parse::<i64>().ok()?, id.parse::<RecordId>().ok()?.as_bytes().to_vec()))
        });
        let limit = query.limit.max(1);
        let text = self.sql(
            "SELECT due, record FROM {s}.parked WHERE ns = $1 AND place IS NULL
               AND ($2::bytea IS NULL OR key = $2) AND ($3::bigint IS NULL OR due >= $3) AND ($4::bigint IS NULL OR due < $4)
               AND ($5::bigint IS NULL OR (due, id) > ($5, $6::bytea))
             ORDER BY due, id LIMIT $7",
        );
        let rows = client
            .query(
                &text,
                &[
                    &self.namespace,
                    &query.key.as_deref().map(str::as_bytes),
                    &query.from.map(Timestamp::as_millis),
                    &query.to.map(Timestamp::as_millis),
                    &after.as_ref().map(|(due, _)| *due),
                    &after.as_ref().map(|(_, id)| id.as_slice()),
                    &i64::try_from(limit + 1).unwrap_or(i64::MAX),
                ],
            )
            .await
            .map_err(self.database.error(ACT))?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let read = || -> Result<_, tokio_postgres::Error> { Ok((row.try_get(0)?, row.try_get(1)?)) };
            let (due, bytes) = read().map_err(self.database.error(ACT))?;
            found.push(ParkedRow { record: record(bytes)?, due_at: time(due) });
        }
        let more = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| more).map(|row| format!("{}.{}", row.due_at.as_millis(), row.record.id));
        Ok(Page { rows: found, next })
    }

    pub(super) async fn cancel(&self, which: &Scheduled) -> Result<u64, LogError> {
        const ACT: &str = "cancel what is parked";
        let client = self.database.lend(ACT).await?;
        let (column, wanted) = meant(which);
        let text = self.sql(&format!(
            "WITH gone AS (DELETE FROM {{s}}.parked WHERE ns = $1 AND place IS NULL AND {column} = $2 RETURNING id),
             noted AS (INSERT INTO {{s}}.cancelled SELECT $1, id, $3 FROM gone ON CONFLICT DO NOTHING)
             SELECT count(*) FROM gone"
        ));
        let now = self.clock.now().as_millis();
        let gone =
            client.query_one(&text, &[&self.namespace, &wanted, &now]).await.map_err(self.database.error(ACT))?;
        self.news.counts.notify_one();
        let count: i64 = gone.try_get(0).map_err(self.database.error(ACT))?;
        Ok(count.cast_unsigned())
    }

    pub(super) async fn reschedule(&self, which: &Scheduled, due_at: Timestamp) -> Result<u64, LogError> {
        const ACT: &str = "move what is parked";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let (column, wanted) = meant(which);
        let transaction = client.transaction().await.map_err(&failed)?;
        let text = self.sql(&format!(
            "SELECT id, record FROM {{s}}.parked WHERE ns = $1 AND place IS NULL AND {column} = $2 FOR UPDATE"
        ));
        let rows = transaction.query(&text, &[&self.namespace, &wanted]).await.map_err(&failed)?;
        let (mut ids, mut records): (Vec<Vec<u8>>, Vec<Vec<u8>>) = (Vec::new(), Vec::new());
        for row in &rows {
            let found = record(row.try_get(1).map_err(&failed)?)?;
            ids.push(row.try_get(0).map_err(&failed)?);
            records.push(encoded(&Record { due_at: Some(due_at), ..(*found).clone() }));
        }
        let put = self.sql(
            "UPDATE {s}.parked AS p SET due = $2, record = t.record
             FROM unnest($3::bytea[], $4::bytea[]) AS t(id, record) WHERE p.ns = $1 AND p.id = t.id",
        );
        let due = due_at.as_millis();
        transaction.execute(&put, &[&self.namespace, &due, &ids, &records]).await.map_err(&failed)?;
        transaction.execute(&self.database.tell(), &[&self.namespace]).await.map_err(&failed)?;
        transaction.commit().await.map_err(&failed)?;
        self.news.parked.notify_one();
        Ok(ids.len() as u64)
    }
}

/// The column that says which rows, and what must stand in it.
fn meant(which: &Scheduled) -> (&'static str, Vec<u8>) {
    match which {
        Scheduled::Id(id) => ("id", id.as_bytes().to_vec()),
        Scheduled::Key(key) => ("key", key.as_bytes().to_vec()),
    }
}
