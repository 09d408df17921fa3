//! How far the log has come, part by part, for who has to know it when the log itself has lost its end.

use std::collections::BTreeMap;

use super::Shelf;
use crate::record::Position;
use crate::source::redis::link::Text;
use crate::source::{LogError, Reach};

/// `ends` by part. ARGV: part, number, and so on. Gives all that is kept.
static ENDS: Text = Text::new(
    r"
local key = KEYS[1] .. ':ends'
for i = 1, #ARGV, 2 do
  local known = redis.call('HGET', key, ARGV[i])
  if not known or tonumber(known) < tonumber(ARGV[i + 1]) then redis.call('HSET', key, ARGV[i], ARGV[i + 1]) end
end
return redis.call('HGETALL', key)
",
);

impl Shelf {
    /// Keeps it, as far as it is further than what was kept; gives how far it has come.
    pub(super) async fn further(&self, end: &Reach) -> Result<Reach, LogError> {
        let mut call = self.call(&ENDS);
        for position in end.iter() {
            call = call.number(position.part()).number(position.offset());
        }
        let kept: BTreeMap<u16, u64> = self.ask("keep how far the log has come", call, true).await?;
        Ok(kept.into_iter().map(|(part, offset)| Position::in_part(part, offset)).collect())
    }
}
