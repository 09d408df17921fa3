//! Dead letters: listed, sent back, thrown away; and where a record is, as far as rows tell.

use tokio_postgres::types::ToSql;

use super::Inner;
use super::rows::{Fields, id_bytes, reason_word, record, text, time};
use crate::clock::Timestamp;
use crate::record::RecordId;
use crate::source::foreign::store::StoredRecord;
use crate::source::{AsideRow, BranchName, DeadLetter, DeadQuery, Fate, LogError, Page, Replayed, RowKey};

/// What a query narrows by, as parameters 2 to 9.
struct Wanted {
    branch: Option<String>,
    reason: Option<String>,
    id: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    from: Option<i64>,
    to: Option<i64>,
    error: Option<String>,
    after: i64,
    limit: i64,
}

const WHERE: &str = "ns = $1 AND ($2::text IS NULL OR branch = $2) AND ($3::text IS NULL OR reason = $3)
  AND ($4::bytea IS NULL OR id = $4) AND ($5::bytea IS NULL OR key = $5) AND ($6::bigint IS NULL OR at >= $6)
  AND ($7::bigint IS NULL OR at < $7) AND ($8::text IS NULL OR position($8 in last_error) > 0) AND number > $9
  ORDER BY number LIMIT $10";

impl Wanted {
    fn new(query: &DeadQuery, more: usize) -> Self {
        Self {
            branch: query.branch.clone(),
            reason: query.reason.map(reason_word),
            id: query.id.map(|id| id.as_bytes().to_vec()),
            key: query.key.as_ref().map(|key| key.as_bytes().to_vec()),
            from: query.from.map(Timestamp::as_millis),
            to: query.to.map(Timestamp::as_millis),
            error: query.error_contains.as_deref().map(text),
            after: i64::try_from(query.after_number()).unwrap_or(i64::MAX),
            limit: i64::try_from(query.rows().saturating_add(more)).unwrap_or(i64::MAX),
        }
    }

    fn parameters<'a>(&'a self, namespace: &'a String) -> [&'a (dyn ToSql + Sync); 10] {
        [
            namespace,
            &self.branch,
            &self.reason,
            &self.id,
            &self.key,
            &self.from,
            &self.to,
            &self.error,
            &self.after,
            &self.limit,
        ]
    }
}

impl Inner {
    pub(super) async fn dead_page(&self, query: &DeadQuery) -> Result<Page<DeadLetter>, LogError> {
        const ACT: &str = "list dead letters";
        let client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let wanted = Wanted::new(query, 1);
        let text = self.sql(&format!("SELECT * FROM {{s}}.dead WHERE {WHERE}"));
        let rows = client.query(&text, &wanted.parameters(&self.namespace)).await.map_err(&failed)?;
        let limit = query.rows();
        let page = rows.get(..limit).unwrap_or(&rows);
        let letters: Vec<DeadLetter> =
            page.iter().map(|row| Fields(row).dead().map_err(&failed)?).collect::<Result<_, LogError>>()?;
        let last = page.last().filter(|_| rows.len() > limit);
        let next = last.map(|row| row.try_get::<_, i64>("number")).transpose().map_err(&failed)?;
        Ok(Page { rows: letters, next: next.map(|number| number.to_string()) })
    }

    pub(super) async fn replay(&self, query: &DeadQuery, force: bool) -> Result<Replayed, LogError> {
        const ACT: &str = "send dead letters back";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let wanted = Wanted::new(query, 0);
        let transaction = client.transaction().await.map_err(&failed)?;
        // One replay of a namespace at a time: numbers are then drawn in the order in which they can be seen, and whoever was
        // told up to one misses none below it.
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended($1, 1))";
        transaction.execute(lock, &[&self.namespace]).await.map_err(&failed)?;
        let text = self.sql(&format!("SELECT * FROM {{s}}.dead WHERE {WHERE} FOR UPDATE"));
        let rows = transaction.query(&text, &wanted.parameters(&self.namespace)).await.map_err(&failed)?;
        let now = self.clock.now();
        let mut answer = Replayed::default();
        let mut back: Vec<(BranchName, Vec<AsideRow>)> = Vec::new();
        for row in &rows {
            let letter = Fields(row).dead().map_err(&failed)??;
            if letter.overtaken && !force {
                answer.overtaken += 1;
                continue;
            }
            answer.replayed += 1;
            let branch = letter.branch.clone();
            let row = AsideRow::replayed(letter, now);
            match back.iter_mut().find(|(known, _)| *known == branch) {
                Some((_, rows)) => rows.push(row),
                None => back.push((branch, vec![row])),
            }
        }
        for (branch, rows) in &back {
            let keys: Vec<RowKey> = rows.iter().map(|row| row.row).collect();
            self.put_aside(&transaction, branch, rows).await.map_err(&failed)?;
            self.delete_rows(&transaction, "dead", branch, &keys).await.map_err(&failed)?;
        }
        transaction.execute(&self.database.tell(), &[&self.namespace]).await.map_err(&failed)?;
        transaction.commit().await.map_err(&failed)?;
        self.news.replayed.notify_waiters();
        self.news.counts.notify_one();
        Ok(answer)
    }

    pub(super) async fn purge(&self, query: &DeadQuery) -> Result<u64, LogError> {
        const ACT: &str = "purge dead letters";
        let mut client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let wanted = Wanted::new(query, 0);
        let transaction = client.transaction().await.map_err(&failed)?;
        let text = self.sql(&format!("SELECT branch, position, child FROM {{s}}.dead WHERE {WHERE} FOR UPDATE"));
        let rows = transaction.query(&text, &wanted.parameters(&self.namespace)).await.map_err(&failed)?;
        let mut gone: Vec<(BranchName, Vec<RowKey>)> = Vec::new();
        for row in &rows {
            let branch = BranchName::from_stored(row.try_get(0).map_err(&failed)?);
            let key = Fields(row).row_key().map_err(&failed)?;
            match gone.iter_mut().find(|(known, _)| *known == branch) {
                Some((_, keys)) => keys.push(key),
                None => gone.push((branch, vec![key])),
            }
        }
        for (branch, keys) in &gone {
            // The frontier may not have passed them: they have ended all the same.
            self.put_tombstones(&transaction, branch, keys).await.map_err(&failed)?;
            self.delete_rows(&transaction, "dead", branch, keys).await.map_err(&failed)?;
        }
        transaction.commit().await.map_err(&failed)?;
        self.news.counts.notify_one();
        Ok(rows.len() as u64)
    }

    pub(super) async fn find(&self, id: RecordId) -> Result<Option<StoredRecord>, LogError> {
        const ACT: &str = "look a record up";
        let client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let wanted: [&(dyn ToSql + Sync); 2] = [&self.namespace, &id_bytes(&id)];
        let parked = self.sql("SELECT due, record FROM {s}.parked WHERE ns = $1 AND id = $2");
        if let Some(row) = client.query_opt(&parked, &wanted).await.map_err(&failed)? {
            let due_at = time(row.try_get(0).map_err(&failed)?);
            return Ok(Some(StoredRecord::Parked { record: record(row.try_get(1).map_err(&failed)?)?, due_at }));
        }
        let cancelled = self.sql("SELECT 1 FROM {s}.cancelled WHERE ns = $1 AND id = $2");
        if client.query_opt(&cancelled, &wanted).await.map_err(&failed)?.is_some() {
            return Ok(Some(StoredRecord::Cancelled));
        }
        let mut found: Option<StoredRecord> = None;
        let mut add = |row: RowKey, record, branch: BranchName, fate: Fate| match &mut found {
            Some(StoredRecord::Rows { branches, .. }) => branches.push((branch, fate)),
            _ => found = Some(StoredRecord::Rows { record, position: row.position, branches: vec![(branch, fate)] }),
        };
        let aside = self.sql("SELECT * FROM {s}.aside WHERE ns = $1 AND id = $2 ORDER BY branch, position, child");
        for row in &client.query(&aside, &wanted).await.map_err(&failed)? {
            let branch = BranchName::from_stored(row.try_get("branch").map_err(&failed)?);
            let aside = Fields(row).aside().map_err(&failed)??;
            let (attempts, next_try, last_error) = (aside.attempts, aside.next_try, aside.last_error);
            add(aside.row, aside.record, branch, Fate::SetAside { attempts, next_try, last_error });
        }
        let dead = self.sql("SELECT * FROM {s}.dead WHERE ns = $1 AND id = $2 ORDER BY branch, position, child");
        for row in &client.query(&dead, &wanted).await.map_err(&failed)? {
            let letter = Fields(row).dead().map_err(&failed)??;
            let fate = Fate::Dead { reason: letter.reason, last_error: letter.last_error };
            add(letter.row, letter.record, letter.branch, fate);
        }
        Ok(found)
    }
}
