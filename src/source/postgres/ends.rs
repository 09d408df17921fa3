//! How far the log has come, part by part, for who has to know it when the log itself has lost its end.

use super::Inner;
use super::rows::{position, sql};
use crate::source::{LogError, Reach};

impl Inner {
    pub(super) async fn keep_end(&self, end: &Reach) -> Result<(), LogError> {
        const ACT: &str = "keep how far the log has come";
        let parts: Vec<i32> = end.iter().map(|position| i32::from(position.part())).collect();
        let positions: Vec<i64> = end.iter().map(sql).collect();
        let keep = self.sql(
            "INSERT INTO {s}.ends AS e (ns, part, position)
             SELECT $1, t.part, t.position FROM unnest($2::int[], $3::bigint[]) AS t(part, position)
             ON CONFLICT (ns, part) DO UPDATE SET position = excluded.position WHERE e.position < excluded.position",
        );
        let client = self.database.lend(ACT).await?;
        let kept = client.execute(&keep, &[&self.namespace, &parts, &positions]).await;
        kept.map(|_| ()).map_err(self.database.error(ACT))
    }

    pub(super) async fn read_end(&self) -> Result<(), LogError> {
        const ACT: &str = "read how far the log has come";
        let read = self.sql("SELECT position FROM {s}.ends WHERE ns = $1");
        let client = self.database.lend(ACT).await?;
        let failed = self.database.error(ACT);
        let rows = client.query(&read, &[&self.namespace]).await.map_err(&failed)?;
        let end = rows.iter().map(|row| row.try_get(0).map(position)).collect::<Result<_, _>>().map_err(&failed)?;
        *self.end.lock() = end;
        Ok(())
    }
}
