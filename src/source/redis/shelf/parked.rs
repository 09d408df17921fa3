//! What waits for its time.

use std::sync::Arc;

use bytes::Bytes;
use redis::Value;

use super::scripts::{CANCEL, FIND, LEAD, MARKED, MOVE, PARK, PARKED, PARKED_BY_KEY, RELEASED, RESIGN, TAKE};
use super::{ROWS, Shelf, known, rows, time};
use crate::clock::Timestamp;
use crate::record::{Record, RecordId};
use crate::source::foreign::store::{Claimed, Parking, Releasing, StoredRecord};
use crate::source::redis::link::{Call, Text};
use crate::source::{BranchName, Fate, LogError, Page, ParkedQuery, ParkedRow, Scheduled};

/// An id, a due time, a record.
type Row = (Vec<u8>, String, Vec<u8>);

/// A record as it stands there: moved, it has another time than when it came.
fn record(due: &str, body: Vec<u8>) -> Result<(Arc<Record>, Timestamp), LogError> {
    let due_at = time(due).ok_or_else(|| rows::damaged("a due time"))?;
    let record = Record::decode(&Bytes::from(body)).map_err(|_| rows::damaged("a parked record"))?;
    Ok((Arc::new(Record { due_at: Some(due_at), ..record }), due_at))
}

impl Shelf {
    pub(super) async fn park_rows(&self, rows: Vec<Parking>) -> Result<Vec<Claimed>, LogError> {
        let now = self.context.clock.now();
        // All or none, so all in one script, however many.
        let mut call = self
            .call(&PARK)
            .keys(rows.iter().filter_map(|row| row.key.as_ref()).map(|key| self.key(key)))
            .number(now.as_millis())
            .number(self.window());
        for Parking { record, key } in &rows {
            let mut body = Vec::new();
            record.encode(&mut body);
            let due_at = record.due_at.unwrap_or(record.written_at);
            call = call
                .number(u8::from(key.is_some()))
                .arg(key.as_ref().map(|key| key.fingerprint.to_vec()).unwrap_or_default())
                .arg(*record.id.as_bytes())
                .number(record.written_at.as_millis())
                .number(known::keep(record.written_at, now, self.context.key_window))
                .number(due_at.as_millis())
                .arg(record.key.as_ref().map(|key| format!("={key}")).unwrap_or_default())
                .arg(body);
        }
        let answers: Vec<Vec<Value>> = self.ask("park records", call, true).await?;
        self.told();
        answers.into_iter().map(Self::claimed).collect()
    }

    pub(super) async fn lead_until(&self, until: Timestamp) -> Result<bool, LogError> {
        let now = self.context.clock.now();
        let call = self.call(&LEAD).arg(self.instance.as_str()).number(now.as_millis()).number(until.as_millis());
        Ok(self.ask::<u8>("become the mover", call, false).await? == 1)
    }

    pub(super) async fn let_lead_go(&self) -> Result<(), LogError> {
        let call = self.call(&RESIGN).arg(self.instance.as_str());
        self.ask::<Value>("let the mover's lease go", call, false).await.map(|_| ())
    }

    pub(super) async fn first_due(&self) -> Result<Option<Timestamp>, LogError> {
        let call = self.call(&PARKED).arg("-inf").arg("+inf").number(0).number(1);
        let first: Vec<Row> = self.ask("see what is due", call, false).await?;
        Ok(first.first().and_then(|(_, due, _)| time(due)))
    }

    pub(super) async fn take(&self, now: Timestamp, limit: usize, place: Arc<str>) -> Result<Vec<Releasing>, LogError> {
        let call = self
            .call(&TAKE)
            .arg(self.instance.as_str())
            .number(now.as_millis())
            .number(limit.clamp(1, ROWS))
            .arg(&*place);
        let found: Vec<Row> = self.ask("mark what is due", call, true).await?;
        self.told();
        found
            .into_iter()
            .map(|(_, due, body)| Ok(Releasing { record: record(&due, body)?.0, place: Arc::clone(&place) }))
            .collect()
    }

    pub(super) async fn all_marked(&self, limit: usize) -> Result<Vec<Releasing>, LogError> {
        let call = self.call(&MARKED).number(limit.clamp(1, ROWS));
        let found: Vec<(Vec<u8>, String, Vec<u8>, String)> = self.ask("read what is marked", call, false).await?;
        found
            .into_iter()
            .map(|(_, due, body, place)| Ok(Releasing { record: record(&due, body)?.0, place: place.into() }))
            .collect()
    }

    pub(super) async fn are_released(&self, ids: Vec<RecordId>) -> Result<(), LogError> {
        for ids in ids.chunks(ROWS) {
            let call = self.call(&RELEASED).args(ids.iter().map(|id| id.as_bytes().to_vec()));
            self.ask::<Value>("remove what was released", call, true).await?;
        }
        self.told();
        Ok(())
    }

    pub(super) async fn parked_page(&self, query: ParkedQuery) -> Result<Page<ParkedRow>, LogError> {
        let limit = query.limit.max(1);
        let after: Option<(Timestamp, RecordId)> = query.after.as_deref().and_then(|token| {
            let (due, id) = token.split_once('_')?;
            Some((Timestamp::from_millis(due.parse().ok()?), id.parse().ok()?))
        });
        let fits = |row: &ParkedRow| {
            after.is_none_or(|after| (row.due_at, row.record.id) > after)
                && query.from.is_none_or(|from| row.due_at >= from)
                && query.to.is_none_or(|to| row.due_at < to)
        };
        let row = |(_, due, body): Row| record(&due, body).map(|(record, due_at)| ParkedRow { record, due_at });
        let mut found: Vec<ParkedRow> = Vec::new();
        if let Some(key) = &query.key {
            let mut from = Vec::new();
            loop {
                let call = self.call(&PARKED_BY_KEY).arg(key.as_str()).arg(from);
                let (page, more): (Vec<Row>, Vec<u8>) = self.ask("list what is parked", call, false).await?;
                for one in page {
                    found.push(row(one)?);
                }
                if more.is_empty() {
                    break;
                }
                from = more;
            }
            found.retain(fits);
            found.sort_by_key(|row| (row.due_at, row.record.id));
        } else {
            let from = query.from.max(after.map(|(due, _)| due));
            let from = from.map_or_else(|| "-inf".to_owned(), |from| from.as_millis().to_string());
            let to = query.to.map_or_else(|| "+inf".to_owned(), |to| format!("({}", to.as_millis()));
            let mut passed = 0;
            loop {
                let call = self.call(&PARKED).arg(from.as_str()).arg(to.as_str()).number(passed).number(ROWS);
                let page: Vec<Row> = self.ask("list what is parked", call, false).await?;
                let count = page.len();
                for one in page {
                    found.push(row(one)?);
                }
                found.retain(fits);
                passed += count;
                if count < ROWS || found.len() > limit {
                    break;
                }
            }
        }
        let more = found.len() > limit;
        found.truncate(limit);
        let token = |row: &ParkedRow| format!("{}_{}", row.due_at.as_millis(), row.record.id);
        let next = found.last().filter(|_| more).map(token);
        Ok(Page { rows: found, next })
    }

    async fn each(&self, script: &'static Text, first: Timestamp, which: &Scheduled) -> Result<u64, LogError> {
        let mut count = 0;
        let mut from = Vec::new();
        loop {
            let call: Call = self.call(script).number(first.as_millis());
            let call = match which {
                Scheduled::Id(id) => call.arg("id").arg(*id.as_bytes()),
                Scheduled::Key(key) => call.arg("key").arg(key.as_str()),
            };
            let (done, more): (u64, Vec<u8>) = self.ask("change what is parked", call.arg(from), true).await?;
            count += done;
            if more.is_empty() {
                self.told();
                return Ok(count);
            }
            from = more;
        }
    }

    pub(super) async fn cancel_all(&self, which: Scheduled) -> Result<u64, LogError> {
        self.each(&CANCEL, self.context.clock.now(), &which).await
    }

    pub(super) async fn move_all(&self, which: Scheduled, due_at: Timestamp) -> Result<u64, LogError> {
        self.each(&MOVE, due_at, &which).await
    }

    pub(super) async fn find_record(&self, id: RecordId) -> Result<Option<StoredRecord>, LogError> {
        type Kept = (String, Vec<u8>, String, Vec<u8>, Vec<u8>);
        let call = self.call(&FIND).arg(*id.as_bytes());
        let (due, body, cancelled, kept): (String, Vec<u8>, u8, Vec<Kept>) =
            self.ask("find a record", call, false).await?;
        if cancelled == 1 {
            return Ok(Some(StoredRecord::Cancelled));
        }
        if !due.is_empty() {
            let (record, due_at) = record(&due, body)?;
            return Ok(Some(StoredRecord::Parked { record, due_at }));
        }
        let names: Vec<(BranchName, String)> =
            self.seen.lock().branches.iter().map(|(name, number)| (name.clone(), number.clone())).collect();
        let mut found = None;
        let mut branches = Vec::new();
        for (kind, row, number, head, body) in kept {
            let Some((name, _)) = names.iter().find(|(_, known)| *known == number) else { continue };
            let row = rows::row_of(&row).ok_or_else(|| rows::damaged("a row"))?;
            let fate = if kind == "a" {
                let row = rows::aside_of(row, &head, None)?;
                Fate::SetAside { attempts: row.attempts, next_try: row.next_try, last_error: row.last_error }
            } else {
                let head = rows::Head::of(&head, false)?;
                Fate::Dead { reason: head.letter().reason, last_error: head.letter().last_error.clone() }
            };
            branches.push((name.clone(), fate));
            if found.is_none() {
                found = Some((rows::body_of(body)?.0, row.position));
            }
        }
        Ok(found.map(|(record, position)| StoredRecord::Rows { record, position, branches }))
    }
}
