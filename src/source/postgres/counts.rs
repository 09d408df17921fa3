//! How much lies here, read anew soon after something changed and now and then anyway.

use std::sync::Weak;
use std::time::Duration;

use super::Inner;
use super::rows::time;
use crate::source::{BranchName, LogError, ShelfCounts};

/// Counts are not read more often.
const SOON: Duration = Duration::from_millis(300);
/// Nor less often.
const LATE: Duration = Duration::from_secs(15);

/// Keeps the counts until the shelf is closed or dropped.
pub(super) async fn keep(shelf: Weak<Inner>) {
    loop {
        let Some(news) = shelf.upgrade().map(|inner| (std::sync::Arc::clone(&inner.news), inner.closed.clone())) else {
            return;
        };
        let (news, closed) = news;
        tokio::select! {
            () = news.counts.notified() => {}
            () = tokio::time::sleep(LATE) => {}
            () = closed.cancelled() => return,
        }
        let Some(inner) = shelf.upgrade() else { return };
        if let Err(error) = inner.database.in_time(inner.count()).await {
            tracing::debug!(shelf = %inner.database.shown(), %error, "rows could not be counted");
        }
        drop(inner);
        tokio::time::sleep(SOON).await;
    }
}

impl Inner {
    pub(super) async fn count(&self) -> Result<(), LogError> {
        const ACT: &str = "count rows";
        let client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let (parked, aside, dead) = (
            self.sql("SELECT count(*) FROM {s}.parked WHERE ns = $1"),
            self.sql("SELECT branch, count(*) FROM {s}.aside WHERE ns = $1 GROUP BY branch"),
            self.sql(
                "SELECT branch, count(*), coalesce(sum(bytes), 0)::bigint FROM {s}.dead WHERE ns = $1 GROUP BY branch",
            ),
        );
        let parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)] = &[&self.namespace];
        let (parked, aside, dead) = tokio::try_join!(
            client.query_one(&parked, parameters),
            client.query(&aside, parameters),
            client.query(&dead, parameters),
        )
        .map_err(&failed)?;
        let read = || -> Result<ShelfCounts, tokio_postgres::Error> {
            let mut counts = ShelfCounts {
                parked: parked.try_get::<_, i64>(0)?.cast_unsigned(),
                keys_since: Some(time(self.window())),
                ..ShelfCounts::default()
            };
            for row in &aside {
                counts
                    .aside
                    .push((BranchName::from_stored(row.try_get(0)?), row.try_get::<_, i64>(1)?.cast_unsigned()));
            }
            for row in &dead {
                let (letters, bytes) =
                    (row.try_get::<_, i64>(1)?.cast_unsigned(), row.try_get::<_, i64>(2)?.cast_unsigned());
                counts.dead.push((BranchName::from_stored(row.try_get(0)?), letters, bytes));
            }
            Ok(counts)
        };
        *self.counts.lock() = read().map_err(&failed)?;
        Ok(())
    }
}
