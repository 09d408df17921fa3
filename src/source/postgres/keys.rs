//! Idempotency keys: claimed before their record is appended, sure after it.

use std::collections::HashMap;

use super::Inner;
use super::rows::{id, id_bytes, time};
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::LogError;
use crate::source::foreign::store::{Claim, Claimed};

impl Inner {
    /// Since when keys count.
    pub(super) fn window(&self) -> i64 {
        self.clock.now().saturating_sub(self.key_window).as_millis()
    }

    pub(super) async fn claim(&self, claims: &[Claim], abandoned: Timestamp) -> Result<Vec<Claimed>, LogError> {
        const ACT: &str = "claim idempotency keys";
        let client = self.database.lend(ACT).await?;
        let keys: Vec<&[u8]> = claims.iter().map(|claim| claim.key.key.as_bytes()).collect();
        let prints: Vec<&[u8]> = claims.iter().map(|claim| &claim.key.fingerprint[..]).collect();
        let ids: Vec<&[u8]> = claims.iter().map(|claim| id_bytes(&claim.record.id)).collect();
        let written: Vec<i64> = claims.iter().map(|claim| claim.record.written_at.as_millis()).collect();
        let due: Vec<Option<i64>> = claims.iter().map(|claim| claim.record.due_at.map(Timestamp::as_millis)).collect();
        let now = self.clock.now().as_millis();
        // In order of the keys, so that two calls never wait for each other's rows in a ring. A claim that was given up on
        // keeps its first id; one that is older than the window is gone.
        let put = self.sql(
            "INSERT INTO {s}.keys AS k (ns, key, fingerprint, id, written_at, due, confirmed, claimed_at)
             SELECT $1, t.key, t.fp, t.id, t.written, t.due, false, $2
             FROM unnest($3::bytea[], $4::bytea[], $5::bytea[], $6::bigint[], $7::bigint[]) AS t(key, fp, id, written, due)
             ORDER BY t.key
             ON CONFLICT (ns, key) DO UPDATE SET
               fingerprint = excluded.fingerprint, confirmed = false, claimed_at = excluded.claimed_at, due = excluded.due,
               id = CASE WHEN k.written_at < $8 THEN excluded.id ELSE k.id END,
               written_at = CASE WHEN k.written_at < $8 THEN excluded.written_at ELSE k.written_at END
             WHERE k.written_at < $8
                OR (NOT k.confirmed AND k.fingerprint = excluded.fingerprint AND (k.claimed_at < $9 OR k.id = excluded.id))
             RETURNING key, id, written_at",
        );
        let put = client.prepare_cached(&put).await.map_err(self.database.error(ACT))?;
        let (window, abandoned_at) = (self.window(), abandoned.as_millis());
        let mine = client
            .query(&put, &[&self.namespace, &now, &keys, &prints, &ids, &written, &due, &window, &abandoned_at])
            .await
            .map_err(self.database.error(ACT))?;
        let mut fresh: HashMap<Vec<u8>, Claimed> = HashMap::new();
        for row in mine {
            let read = || -> Result<_, tokio_postgres::Error> {
                let claimed = Claimed::Fresh { id: id(row.try_get::<_, &[u8]>(1)?), written_at: time(row.try_get(2)?) };
                Ok((row.try_get(0)?, claimed))
            };
            let (key, claimed) = read().map_err(self.database.error(ACT))?;
            fresh.insert(key, claimed);
        }
        let others: Vec<&[u8]> = keys.iter().copied().filter(|key| !fresh.contains_key(*key)).collect();
        let known = if others.is_empty() { HashMap::new() } else { self.known(&**client, &others, abandoned).await? };
        let outcome = |key: &&[u8]| fresh.get(*key).or_else(|| known.get(*key)).cloned().unwrap_or(Claimed::Running);
        Ok(keys.iter().map(outcome).collect())
    }

    /// What keys stand for that others have.
    pub(super) async fn known(
        &self,
        client: &(impl tokio_postgres::GenericClient + Sync),
        keys: &[&[u8]],
        abandoned: Timestamp,
    ) -> Result<HashMap<Vec<u8>, Claimed>, LogError> {
        const ACT: &str = "look idempotency keys up";
        let query = self.sql(
            "SELECT key, fingerprint, id, written_at, due, confirmed, claimed_at FROM {s}.keys WHERE ns = $1 AND key = ANY($2)",
        );
        let rows = client.query(&query, &[&self.namespace, &keys]).await.map_err(self.database.error(ACT))?;
        let mut known = HashMap::new();
        for row in rows {
            let read = || -> Result<_, tokio_postgres::Error> {
                let first = Claimed::Known {
                    fingerprint: row.try_get::<_, &[u8]>(1)?.try_into().unwrap_or_default(),
                    id: id(row.try_get::<_, &[u8]>(2)?),
                    written_at: time(row.try_get(3)?),
                    due_at: row.try_get::<_, Option<i64>>(4)?.map(time),
                };
                // One that was given up on and stood for something else: its record may be in the log.
                let over = row.try_get::<_, bool>(5)? || row.try_get::<_, i64>(6)? < abandoned.as_millis();
                Ok((row.try_get(0)?, if over { first } else { Claimed::Running }))
            };
            let (key, claimed): (Vec<u8>, Claimed) = read().map_err(self.database.error(ACT))?;
            known.insert(key, claimed);
        }
        Ok(known)
    }

    pub(super) async fn confirm(&self, ids: &[(Box<str>, RecordId)]) -> Result<(), LogError> {
        self.change_keys("confirm idempotency keys", "UPDATE {s}.keys AS k SET confirmed = true", ids).await
    }

    pub(super) async fn give_up(&self, ids: &[(Box<str>, RecordId)]) -> Result<(), LogError> {
        self.change_keys("free idempotency keys", "DELETE FROM {s}.keys AS k", ids).await
    }

    async fn change_keys(&self, act: &'static str, change: &str, ids: &[(Box<str>, RecordId)]) -> Result<(), LogError> {
        let client = self.database.lend(act).await?;
        let keys: Vec<&[u8]> = ids.iter().map(|(key, _)| key.as_bytes()).collect();
        let ids: Vec<&[u8]> = ids.iter().map(|(_, id)| id_bytes(id)).collect();
        let join = if change.starts_with("UPDATE") { "FROM" } else { "USING" };
        let text = self.sql(&format!(
            "{change} {join} unnest($2::bytea[], $3::bytea[]) AS t(key, id)
             WHERE k.ns = $1 AND k.key = t.key AND k.id = t.id AND NOT k.confirmed"
        ));
        let statement = client.prepare_cached(&text).await.map_err(self.database.error(act))?;
        let done = client.execute(&statement, &[&self.namespace, &keys, &ids]).await;
        done.map(|_| ()).map_err(self.database.error(act))
    }
}
