//! Ends of deliveries, and what a branch finds of them when it starts.

use std::collections::BTreeMap;

use redis::Value;

use super::scripts::{ASIDE, ENDED, SETTLE};
use super::{ROWS, Shelf, rows};
use crate::source::{AsideLane, AsideRow, BranchName, LogError, Reach, RowKey, Settlement};

/// Where it stands in the order of lanes, its head, its body.
type Row = (Vec<u8>, Vec<u8>, Vec<u8>);

impl Shelf {
    pub(super) async fn settle_all(&self, branch: &BranchName, settlements: Vec<Settlement>) -> Result<(), LogError> {
        let mut call = self.call(&SETTLE).arg(branch.as_str());
        for settlement in &settlements {
            for row in &settlement.aside {
                let body = rows::body(&row.record, row.rendered.as_ref());
                call = call.arg("A").arg(rows::row_key(row.row)).arg(rows::aside_head(row)).arg(body);
            }
            for row in &settlement.returned {
                call = call.arg("R").arg(rows::row_key(*row));
            }
            for letter in &settlement.dead {
                call = call
                    .arg("D")
                    .arg(rows::row_key(letter.row))
                    .arg(*letter.record.id.as_bytes())
                    .number(rows::weight(letter))
                    .arg(rows::dead_head(letter))
                    .arg(rows::body(&letter.record, letter.rendered.as_ref()));
                if letter.overtaken {
                    call = call.arg("O").arg(rows::row_key(letter.row));
                }
            }
            if let Some(mark) = settlement.mark {
                call = call.arg("M").arg(format!("{}:{}", mark.part(), mark.offset()));
            }
            if let Some(pause) = &settlement.pause {
                let text = pause.as_ref().and_then(|pause| serde_json::to_string(pause).ok()).unwrap_or_default();
                call = call.arg("P").arg(text);
            }
            for row in &settlement.overtaken {
                call = call.arg("O").arg(rows::row_key(*row));
            }
            for position in settlement.frontier.iter() {
                let (first, last) = rows::up_to(position);
                call = call.arg("F").number(position.part()).number(position.offset()).arg(first).arg(last);
            }
        }
        self.ask::<Value>("settle", call, true).await?;
        self.told();
        Ok(())
    }

    /// What has ended above the cursor.
    pub(super) async fn ended(&self, number: &str, cursor: &Reach) -> Result<Vec<RowKey>, LogError> {
        let mut ended = Vec::new();
        let mut from = b"-".to_vec();
        loop {
            let call = self.call(&ENDED).arg(number).arg(from);
            let page: Vec<Vec<u8>> = self.ask("read what has ended", call, false).await?;
            let above = page.iter().filter_map(|row| rows::row_of(row)).filter(|row| !cursor.covers(row.position));
            ended.extend(above);
            match page.last() {
                Some(last) if page.len() == ROWS => from = [b"(", last.as_slice()].concat(),
                _ => return Ok(ended),
            }
        }
    }

    async fn page(
        &self,
        branch: &BranchName,
        lane: Option<&str>,
        from: &[u8],
        limit: usize,
        bodies: bool,
    ) -> Result<Vec<Row>, LogError> {
        let call = self
            .call(&ASIDE)
            .arg(branch.as_str())
            .arg(lane.map(|lane| format!("={lane}")).unwrap_or_default())
            .arg(from)
            .number(limit)
            .number(u8::from(bodies));
        self.ask("read what is set aside", call, false).await
    }

    /// The lanes that are set aside, or only this one.
    pub(super) async fn lanes(&self, branch: &BranchName, lane: Option<&str>) -> Result<Vec<AsideLane>, LogError> {
        let mut lanes: BTreeMap<Box<str>, AsideLane> = BTreeMap::new();
        let mut from = Vec::new();
        loop {
            let page = self.page(branch, lane, &from, ROWS, false).await?;
            for (member, head, _) in &page {
                let Some(row) = row_of(member, head)? else { continue };
                if lane.is_some_and(|lane| lane != &*row.lane) {
                    continue;
                }
                let more = |lane: &mut AsideLane| (lane.rows, lane.last) = (lane.rows + 1, row.row);
                lanes.entry(row.lane.clone()).and_modify(more).or_insert_with(|| AsideLane {
                    lane: row.lane.clone(),
                    first: row.row,
                    last: row.row,
                    rows: 1,
                    next_try: row.next_try,
                    attempts: row.attempts,
                    first_failed: row.first_failed,
                });
            }
            match page.into_iter().next_back() {
                Some((last, ..)) => from = last,
                None => return Ok(lanes.into_values().collect()),
            }
        }
    }

    pub(super) async fn rows_of(
        &self,
        branch: &BranchName,
        lane: &str,
        limit: usize,
    ) -> Result<Vec<AsideRow>, LogError> {
        let mut found = Vec::new();
        let mut from = Vec::new();
        while found.len() < limit {
            let page = self.page(branch, Some(lane), &from, ROWS.min(limit - found.len()), true).await?;
            let Some((last, ..)) = page.last() else { break };
            from.clone_from(last);
            for (member, head, body) in page {
                let Some(row) = row_key(&member) else { continue };
                let row = rows::aside_of(row, &head, Some(body))?;
                if &*row.lane == lane {
                    found.push(row);
                }
            }
        }
        Ok(found)
    }

    /// The lanes of a branch that rows were sent back to, which are told then; `None` = there are none.
    pub(super) async fn sent_back(&self, branch: &BranchName) -> Option<Vec<AsideLane>> {
        let (number, told) = {
            let seen = self.seen.lock();
            let number = seen.branches.get(branch)?.clone();
            let told = seen.replayed.get(&number).filter(|told| !told.is_empty())?.clone();
            (number, told)
        };
        let mut lanes = Vec::new();
        for lane in &told {
            match self.lanes(branch, Some(lane)).await {
                Ok(found) => lanes.extend(found),
                Err(error) => {
                    tracing::debug!(%branch, %error, "what was replayed could not be read yet");
                    return None;
                }
            }
        }
        if let Some(left) = self.seen.lock().replayed.get_mut(&number) {
            left.retain(|lane| !told.contains(lane));
        }
        (!lanes.is_empty()).then_some(lanes)
    }
}

/// The row that a place in the order of lanes ends with.
fn row_key(member: &[u8]) -> Option<RowKey> {
    rows::row_of(member.get(member.len().checked_sub(12)?..)?)
}

fn row_of(member: &[u8], head: &[u8]) -> Result<Option<AsideRow>, LogError> {
    row_key(member).map(|row| rows::aside_of(row, head, None)).transpose()
}
