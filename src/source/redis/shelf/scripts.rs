//! What a shelf does in one step on the server. Every script's first key is what all keys begin with; the others that it
//! touches begin with it too, and carry the same hash tag.
//!
//! `due` records that wait, by due time · `rec` their bytes · `rk` their keys · `bykey` key, 0, id · `marked` and `place` what
//! a mover has taken · `mover` who moves · `cancelled` · `branches` name → number · `b:N:…` rows of a branch · `dead` letters
//! by number · `dm`, `db` their heads and bodies · `over` those that were overtaken · `ids` id, kind, row, branch · `replayed`
//! what was sent back, by number.

use crate::source::redis::link::Text;

macro_rules! script {
    ($($part:tt)+) => { Text::new(concat!($($part)+)) };
}

/// Functions that several scripts share.
macro_rules! of_parked {
    () => {
        r"
local root = KEYS[1]
local function drop(id)
  redis.call('HDEL', root .. ':rec', id)
  redis.call('HDEL', root .. ':place', id)
  local key = redis.call('HGET', root .. ':rk', id)
  if key then
    redis.call('ZREM', root .. ':bykey', key .. '\0' .. id)
    redis.call('HDEL', root .. ':rk', id)
  end
end
-- The ids that are meant, and the last of them where there may be more.
local function meant(mode, value, from)
  if mode == 'id' then return { value }, '' end
  local min = from == '' and '[' .. value .. '\0' or '(' .. from
  local max = '[' .. value .. '\0' .. string.rep('\255', 17)
  local found = redis.call('ZRANGEBYLEX', root .. ':bykey', min, max, 'LIMIT', 0, 500)
  local ids = {}
  for _, member in ipairs(found) do
    if #member == #value + 17 then ids[#ids + 1] = string.sub(member, -16) end
  end
  return ids, #found == 500 and found[500] or ''
end
"
    };
}

macro_rules! of_rows {
    () => {
        r"
local root = KEYS[1]
local function number_of(name)
  local number = redis.call('HGET', root .. ':branches', name)
  if not number then
    number = tostring(redis.call('INCR', root .. ':branch'))
    redis.call('HSET', root .. ':branches', name, number)
  end
  return number
end
local function lane_of(meta)
  local length = struct.unpack('>I4', string.sub(meta, 17, 20))
  return string.sub(meta, 21, 20 + length)
end
local function end_aside(number, row)
  local at = root .. ':b:' .. number
  local meta = redis.call('HGET', at .. ':aside', row)
  if not meta then return end
  redis.call('ZREM', at .. ':lanes', lane_of(meta) .. '\0' .. row)
  redis.call('HDEL', at .. ':aside', row)
  redis.call('HDEL', at .. ':body', row)
  redis.call('ZREM', root .. ':ids', string.sub(meta, 1, 16) .. 'a' .. row .. number)
end
local function put_aside(number, row, meta, body)
  end_aside(number, row)
  local at = root .. ':b:' .. number
  redis.call('ZADD', at .. ':lanes', 0, lane_of(meta) .. '\0' .. row)
  redis.call('HSET', at .. ':aside', row, meta)
  redis.call('HSET', at .. ':body', row, body)
  redis.call('ZADD', root .. ':ids', 0, string.sub(meta, 1, 16) .. 'a' .. row .. number)
end
local function end_letter(letter, number, row, id, bytes)
  if redis.call('HDEL', root .. ':dm', letter) == 0 then return false end
  redis.call('HDEL', root .. ':db', letter)
  redis.call('ZREM', root .. ':dead', letter)
  redis.call('SREM', root .. ':over', letter)
  redis.call('HDEL', root .. ':b:' .. number .. ':deadrow', row)
  if tonumber(bytes) > 0 then redis.call('HINCRBY', root .. ':b:' .. number .. ':meta', 'bytes', '-' .. bytes) end
  redis.call('ZREM', root .. ':ids', id .. 'd' .. row .. number)
  return true
end
local function passed(number, part, offset, min, max)
  local at = root .. ':b:' .. number
  redis.call('ZREMRANGEBYLEX', at .. ':ended', min, max)
  for _, mark in ipairs(redis.call('HKEYS', at .. ':marks')) do
    local of, where = string.match(mark, '^(%d+):(%d+)$')
    if of == part and tonumber(where) <= tonumber(offset) then redis.call('HDEL', at .. ':marks', mark) end
  end
end
"
    };
}

/// KEYS: root, idempotency keys. ARGV: now, window, abandoned; for each: fingerprint, id, time, how long to keep.
pub(super) static CLAIM: Text = script!(
    r"
local now, window, abandoned = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local out = {}
for i = 2, #KEYS do
  local key, at = KEYS[i], 4 + (i - 2) * 4
  local known = redis.call('HMGET', key, 'f', 'i', 'w', 'd', 's', 'c')
  if not known[1] or (known[5] == 'k' and tonumber(known[3]) + window < now) then
    redis.call('DEL', key)
    redis.call('HSET', key, 'f', ARGV[at], 'i', ARGV[at + 1], 'w', ARGV[at + 2], 's', 'r', 'c', ARGV[1])
    redis.call('PEXPIRE', key, ARGV[at + 3])
    out[#out + 1] = { 'fresh', ARGV[at + 1], ARGV[at + 2] }
  elseif known[5] == 'k' then
    out[#out + 1] = { 'known', known[1], known[2], known[3], known[4] }
  elseif known[2] == ARGV[at + 1] or tonumber(known[6]) < abandoned then
    redis.call('HSET', key, 'f', ARGV[at], 'c', ARGV[1])
    out[#out + 1] = { 'fresh', known[2], known[3] }
  else
    out[#out + 1] = { 'running' }
  end
end
return out
"
);

/// KEYS: root, idempotency keys. ARGV: `k` = they stand for a durable record, `` = they are free; ids.
pub(super) static CONFIRM: Text = script!(
    r"
for i = 2, #KEYS do
  local known = redis.call('HMGET', KEYS[i], 'i', 's')
  if known[1] == ARGV[i] and known[2] == 'r' then
    if ARGV[1] == 'k' then redis.call('HSET', KEYS[i], 's', 'k') else redis.call('DEL', KEYS[i]) end
  end
end
return 1
"
);

/// KEYS: root, the rows' idempotency keys. ARGV: now, window; for each row: 1 = it has a key, fingerprint, id, time, how long
/// to keep the key, due, `=` and the record's key or ``, record.
pub(super) static PARK: Text = script!(
    r"
local root, now, window = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local out, next_key = {}, 2
for at = 3, #ARGV, 8 do
  local id, told = ARGV[at + 2], nil
  if ARGV[at] == '1' then
    local key = KEYS[next_key]
    next_key = next_key + 1
    local known = redis.call('HMGET', key, 'f', 'i', 'w', 'd', 's')
    if known[1] and known[5] == 'r' then
      told = { 'running' }
    elseif known[1] and tonumber(known[3]) + window >= now then
      told = { 'known', known[1], known[2], known[3], known[4] }
    else
      redis.call('DEL', key)
      redis.call('HSET', key, 'f', ARGV[at + 1], 'i', id, 'w', ARGV[at + 3], 'd', ARGV[at + 5], 's', 'k')
      redis.call('PEXPIRE', key, ARGV[at + 4])
    end
  end
  if not told then
    redis.call('ZADD', root .. ':due', ARGV[at + 5], id)
    redis.call('HSET', root .. ':rec', id, ARGV[at + 7])
    if ARGV[at + 6] ~= '' then
      local key = string.sub(ARGV[at + 6], 2)
      redis.call('HSET', root .. ':rk', id, key)
      redis.call('ZADD', root .. ':bykey', 0, key .. '\0' .. id)
    end
    told = { 'fresh', id, ARGV[at + 3] }
  end
  out[#out + 1] = told
end
redis.call('INCR', root .. ':parked')
return out
"
);

/// ARGV: instance, now, until. Gives 1 = it moves.
pub(super) static LEAD: Text = script!(
    r"
local key = KEYS[1] .. ':mover'
local known = redis.call('HMGET', key, 'who', 'until')
if known[1] and known[1] ~= ARGV[1] and tonumber(known[2]) >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', key, 'who', ARGV[1], 'until', ARGV[3])
return 1
"
);

/// ARGV: instance.
pub(super) static RESIGN: Text = script!(
    r"
if redis.call('HGET', KEYS[1] .. ':mover', 'who') == ARGV[1] then redis.call('DEL', KEYS[1] .. ':mover') end
return 1
"
);

/// ARGV: instance, now, limit, place. Gives for each: id, due, record.
pub(super) static TAKE: Text = script!(
    r"
local root = KEYS[1]
if redis.call('HGET', root .. ':mover', 'who') ~= ARGV[1] then return redis.error_reply('NOTMOVER another process moves what is due') end
local found = redis.call('ZRANGEBYSCORE', root .. ':due', '-inf', ARGV[2], 'WITHSCORES', 'LIMIT', 0, ARGV[3])
local out = {}
for i = 1, #found, 2 do
  local id, due = found[i], found[i + 1]
  redis.call('ZREM', root .. ':due', id)
  redis.call('ZADD', root .. ':marked', due, id)
  redis.call('HSET', root .. ':place', id, ARGV[4])
  out[#out + 1] = { id, due, redis.call('HGET', root .. ':rec', id) }
end
return out
"
);

/// ARGV: limit. Gives for each: id, due, record, place.
pub(super) static MARKED: Text = script!(
    r"
local root = KEYS[1]
local found = redis.call('ZRANGE', root .. ':marked', 0, ARGV[1] - 1, 'WITHSCORES')
local out = {}
for i = 1, #found, 2 do
  local id = found[i]
  out[#out + 1] = { id, found[i + 1], redis.call('HGET', root .. ':rec', id), redis.call('HGET', root .. ':place', id) }
end
return out
"
);

/// ARGV: ids.
pub(super) static RELEASED: Text = script!(
    of_parked!(),
    r"
for _, id in ipairs(ARGV) do
  redis.call('ZREM', root .. ':marked', id)
  drop(id)
end
redis.call('INCR', root .. ':parked')
return 1
"
);

/// ARGV: now, mode, value, from. Gives how many, and from where to go on.
pub(super) static CANCEL: Text = script!(
    of_parked!(),
    r"
local ids, more = meant(ARGV[2], ARGV[3], ARGV[4])
local count = 0
for _, id in ipairs(ids) do
  if redis.call('ZREM', root .. ':due', id) == 1 then
    drop(id)
    redis.call('ZADD', root .. ':cancelled', ARGV[1], id)
    count = count + 1
  end
end
redis.call('INCR', root .. ':parked')
return { count, more }
"
);

/// ARGV: due, mode, value, from. Gives how many, and from where to go on.
pub(super) static MOVE: Text = script!(
    of_parked!(),
    r"
local ids, more = meant(ARGV[2], ARGV[3], ARGV[4])
local count = 0
for _, id in ipairs(ids) do
  if redis.call('ZSCORE', root .. ':due', id) then
    redis.call('ZADD', root .. ':due', ARGV[1], id)
    count = count + 1
  end
end
redis.call('INCR', root .. ':parked')
return { count, more }
"
);

/// ARGV: from, to, how many to pass over, how many. Gives for each: id, due, record.
pub(super) static PARKED: Text = script!(
    r"
local root = KEYS[1]
local found = redis.call('ZRANGEBYSCORE', root .. ':due', ARGV[1], ARGV[2], 'WITHSCORES', 'LIMIT', ARGV[3], ARGV[4])
local out = {}
for i = 1, #found, 2 do
  out[#out + 1] = { found[i], found[i + 1], redis.call('HGET', root .. ':rec', found[i]) }
end
return out
"
);

/// ARGV: key, from. Gives those of the key: for each id, due, record; and from where to go on.
pub(super) static PARKED_BY_KEY: Text = script!(
    of_parked!(),
    r"
local ids, more = meant('key', ARGV[1], ARGV[2])
local out = {}
for _, id in ipairs(ids) do
  local due = redis.call('ZSCORE', root .. ':due', id)
  if due then out[#out + 1] = { id, due, redis.call('HGET', root .. ':rec', id) } end
end
return { out, more }
"
);

/// ARGV: branch, instance, then for each part that it reads: part, cursor. Gives the branch's number, its pause, how often a
/// part was left without a word at this cursor, its marks.
pub(super) static OPEN: Text = script!(
    of_rows!(),
    r"
local number = number_of(ARGV[1])
local meta = root .. ':b:' .. number .. ':meta'
local mine, stops = {}, 0
for i = 3, #ARGV, 2 do
  local part, cursor = ARGV[i], ARGV[i + 1]
  mine['who:' .. part] = true
  local known = redis.call('HMGET', meta, 'who:' .. part, 'at:' .. part, 'stops:' .. part)
  local count = 0
  if known[1] == ARGV[2] then
    if known[2] == cursor then count = tonumber(known[3] or 0) end
  elseif known[1] then
    count = known[2] == cursor and tonumber(known[3] or 0) + 1 or 1
  end
  redis.call('HSET', meta, 'who:' .. part, ARGV[2], 'at:' .. part, cursor, 'stops:' .. part, count)
  stops = math.max(stops, count)
end
local all = redis.call('HGETALL', meta)
for i = 1, #all, 2 do
  -- What it has read before and does not read any more it has let go.
  if all[i + 1] == ARGV[2] and string.sub(all[i], 1, 4) == 'who:' and not mine[all[i]] then redis.call('HDEL', meta, all[i]) end
end
return { number, redis.call('HGET', meta, 'pause') or '', stops, redis.call('HGETALL', root .. ':b:' .. number .. ':marks') }
"
);

/// ARGV: branch, instance.
pub(super) static LEAVE: Text = script!(
    r"
local root = KEYS[1]
local number = redis.call('HGET', root .. ':branches', ARGV[1])
if not number then return 0 end
local meta = root .. ':b:' .. number .. ':meta'
local all = redis.call('HGETALL', meta)
for i = 1, #all, 2 do
  if all[i + 1] == ARGV[2] and string.sub(all[i], 1, 4) == 'who:' then redis.call('HDEL', meta, all[i]) end
end
return 1
"
);

/// ARGV: number, from. Gives at most 500 rows that have ended.
pub(super) static ENDED: Text = script!(
    r"return redis.call('ZRANGEBYLEX', KEYS[1] .. ':b:' .. ARGV[1] .. ':ended', ARGV[2], '+', 'LIMIT', 0, 500)"
);

/// ARGV: branch, `` or a lane, from, limit, 1 = with bodies. Gives for each row: where it stands in the order, its head, its
/// body.
pub(super) static ASIDE: Text = script!(
    r"
local root = KEYS[1]
local number = redis.call('HGET', root .. ':branches', ARGV[1])
if not number then return {} end
local at = root .. ':b:' .. number
local lane = string.sub(ARGV[2], 2)
local min, max = '-', '+'
if ARGV[2] ~= '' then
  min, max = '[' .. lane .. '\0', '[' .. lane .. '\0' .. string.rep('\255', 13)
end
if ARGV[3] ~= '' then min = '(' .. ARGV[3] end
local out = {}
for _, member in ipairs(redis.call('ZRANGEBYLEX', at .. ':lanes', min, max, 'LIMIT', 0, ARGV[4])) do
  local row = string.sub(member, -12)
  local meta = redis.call('HGET', at .. ':aside', row)
  out[#out + 1] = { member, meta, ARGV[5] == '1' and redis.call('HGET', at .. ':body', row) or '' }
end
return out
"
);

/// ARGV: branch, then what to do, in order: `A` row head body · `R` row · `D` row id bytes head body · `M` mark · `P` pause or
/// `` · `O` row · `F` part offset first last.
pub(super) static SETTLE: Text = script!(
    of_rows!(),
    r"
local number = number_of(ARGV[1])
local at = root .. ':b:' .. number
local i = 2
while i <= #ARGV do
  local verb = ARGV[i]
  if verb == 'A' then
    put_aside(number, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
    redis.call('ZADD', at .. ':ended', 0, ARGV[i + 1])
    i = i + 4
  elseif verb == 'R' then
    end_aside(number, ARGV[i + 1])
    i = i + 2
  elseif verb == 'D' then
    local row, id, bytes = ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
    end_aside(number, row)
    redis.call('ZADD', at .. ':ended', 0, row)
    local letter = redis.call('HGET', at .. ':deadrow', row)
    if not letter then
      letter = string.format('%.0f', redis.call('INCR', root .. ':letter'))
      redis.call('HSET', at .. ':deadrow', row, letter)
      redis.call('ZADD', root .. ':dead', letter, letter)
      redis.call('ZADD', root .. ':ids', 0, id .. 'd' .. row .. number)
      redis.call('HINCRBY', at .. ':meta', 'bytes', bytes)
    end
    redis.call('HSET', root .. ':dm', letter, id .. number .. '|' .. ARGV[i + 4])
    redis.call('HSET', root .. ':db', letter, ARGV[i + 5])
    i = i + 6
  elseif verb == 'M' then
    redis.call('HINCRBY', at .. ':marks', ARGV[i + 1], 1)
    i = i + 2
  elseif verb == 'P' then
    if ARGV[i + 1] == '' then redis.call('HDEL', at .. ':meta', 'pause') else redis.call('HSET', at .. ':meta', 'pause', ARGV[i + 1]) end
    i = i + 2
  elseif verb == 'O' then
    local letter = redis.call('HGET', at .. ':deadrow', ARGV[i + 1])
    if letter then redis.call('SADD', root .. ':over', letter) end
    i = i + 2
  else
    passed(number, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4])
    i = i + 5
  end
end
return number
"
);

/// ARGV: after. Gives for each of at most 500 letters: its number, its head, 1 = overtaken.
pub(super) static LETTERS: Text = script!(
    r"
local root = KEYS[1]
local out = {}
for _, letter in ipairs(redis.call('ZRANGEBYSCORE', root .. ':dead', '(' .. ARGV[1], '+inf', 'LIMIT', 0, 500)) do
  out[#out + 1] = { letter, redis.call('HGET', root .. ':dm', letter) or '', redis.call('SISMEMBER', root .. ':over', letter) }
end
return out
"
);

/// ARGV: 1 = also what was overtaken; for each letter: number, branch, row, id, bytes, head and body of its row.
/// Gives how many were sent back, and how many overtaken ones were left.
pub(super) static REPLAY: Text = script!(
    of_rows!(),
    r"
local sent, left = 0, 0
for i = 2, #ARGV, 7 do
  local letter, number, row = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if ARGV[1] ~= '1' and redis.call('SISMEMBER', root .. ':over', letter) == 1 then
    left = left + 1
  elseif end_letter(letter, number, row, ARGV[i + 3], ARGV[i + 4]) then
    put_aside(number, row, ARGV[i + 5], ARGV[i + 6])
    local news = string.format('%.0f', redis.call('INCR', root .. ':news'))
    redis.call('ZADD', root .. ':replayed', news, news .. ':' .. number .. ':' .. lane_of(ARGV[i + 5]))
    sent = sent + 1
  end
end
return { sent, left }
"
);

/// ARGV: for each letter: number, branch, row, id, bytes. Gives how many were there.
pub(super) static PURGE: Text = script!(
    of_rows!(),
    r"
local count = 0
for i = 1, #ARGV, 5 do
  if end_letter(ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]) then count = count + 1 end
end
return count
"
);

/// ARGV: id. Gives due or '', record, 1 = cancelled, and for each row: kind, row, branch's number, head, body.
pub(super) static FIND: Text = script!(
    r"
local root, id = KEYS[1], ARGV[1]
local due = redis.call('ZSCORE', root .. ':due', id) or redis.call('ZSCORE', root .. ':marked', id)
local cancelled = redis.call('ZSCORE', root .. ':cancelled', id) and 1 or 0
local rows = {}
for _, member in ipairs(redis.call('ZRANGEBYLEX', root .. ':ids', '[' .. id, '[' .. id .. string.rep('\255', 40), 'LIMIT', 0, 500)) do
  local kind, row, number = string.sub(member, 17, 17), string.sub(member, 18, 29), string.sub(member, 30)
  local at = root .. ':b:' .. number
  if kind == 'a' then
    rows[#rows + 1] = { kind, row, number, redis.call('HGET', at .. ':aside', row) or '', redis.call('HGET', at .. ':body', row) or '' }
  else
    local letter = redis.call('HGET', at .. ':deadrow', row) or ''
    rows[#rows + 1] = { kind, row, number, redis.call('HGET', root .. ':dm', letter) or '', redis.call('HGET', root .. ':db', letter) or '' }
  end
end
return { due or '', redis.call('HGET', root .. ':rec', id) or '', cancelled, rows }
"
);

/// ARGV: branch. Removes at most 500 of its rows; gives how many are left.
pub(super) static FORGET: Text = script!(
    of_rows!(),
    r"
local number = redis.call('HGET', root .. ':branches', ARGV[1])
if not number then return 0 end
local at = root .. ':b:' .. number
local members = redis.call('ZRANGE', at .. ':lanes', 0, 499)
for _, member in ipairs(members) do
  local row = string.sub(member, -12)
  end_aside(number, row)
  redis.call('ZREM', at .. ':lanes', member)
end
if #members == 500 then return 1 end
local rows = redis.call('HSCAN', at .. ':deadrow', 0, 'COUNT', 400)[2]
for i = 1, #rows, 2 do
  local row, letter = rows[i], rows[i + 1]
  local meta = redis.call('HGET', root .. ':dm', letter)
  end_letter(letter, number, row, string.sub(meta or '', 1, 16), 0)
  redis.call('HDEL', at .. ':deadrow', row)
end
if redis.call('HLEN', at .. ':deadrow') > 0 then return 1 end
for _, name in ipairs({ 'lanes', 'aside', 'body', 'deadrow', 'ended', 'marks', 'meta' }) do redis.call('DEL', at .. ':' .. name) end
redis.call('HDEL', root .. ':branches', ARGV[1])
return 0
"
);

/// ARGV: from, to.
pub(super) static RENAME: Text = script!(
    r"
local key = KEYS[1] .. ':branches'
local number = redis.call('HGET', key, ARGV[1])
if not number or redis.call('HEXISTS', key, ARGV[2]) == 1 then return 0 end
redis.call('HSET', key, ARGV[2], number)
redis.call('HDEL', key, ARGV[1])
return 1
"
);

/// ARGV: files, place. Gives the newest revision: its number, its place.
pub(super) static EPOCH: Text = script!(
    r"
local root = KEYS[1]
local number = redis.call('GET', root .. ':epoch')
if number and redis.call('HGET', root .. ':epoch:files', number) == ARGV[1] then
  return { number, redis.call('HGET', root .. ':epoch:place', number) }
end
number = tostring(redis.call('INCR', root .. ':epoch'))
redis.call('HSET', root .. ':epoch:files', number, ARGV[1])
redis.call('HSET', root .. ':epoch:place', number, ARGV[2])
return { number, ARGV[2] }
"
);

/// Gives the branches (name, number) and the revisions (number, files; number, place).
pub(super) static REFRESH: Text = script!(
    r"
local root = KEYS[1]
return {
  redis.call('HGETALL', root .. ':branches'),
  redis.call('HGETALL', root .. ':epoch:files'),
  redis.call('HGETALL', root .. ':epoch:place'),
}
"
);

/// ARGV: cancelled before; then `branch part offset first last` for each part of each cursor.
pub(super) static TIDY: Text = script!(
    of_rows!(),
    r"
redis.call('ZREMRANGEBYSCORE', root .. ':cancelled', '-inf', '(' .. ARGV[1])
redis.call('ZREMRANGEBYRANK', root .. ':replayed', 0, -10001)
for i = 2, #ARGV, 5 do
  local number = redis.call('HGET', root .. ':branches', ARGV[i])
  if number then passed(number, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]) end
end
return 1
"
);

/// ARGV: the newest news that is known, '' = none. Gives how many wait, how often that changed, the newest news, what was sent
/// back since, and for each branch: name, number, rows set aside, letters, their bytes.
pub(super) static COUNTS: Text = script!(
    r"
local root = KEYS[1]
local news = redis.call('GET', root .. ':news') or '0'
local replayed = {}
if ARGV[1] ~= '' and ARGV[1] ~= news then
  replayed = redis.call('ZRANGEBYSCORE', root .. ':replayed', '(' .. ARGV[1], news)
end
local branches = {}
local all = redis.call('HGETALL', root .. ':branches')
for i = 1, #all, 2 do
  local at = root .. ':b:' .. all[i + 1]
  local bytes = redis.call('HGET', at .. ':meta', 'bytes') or '0'
  branches[#branches + 1] = { all[i], all[i + 1], redis.call('HLEN', at .. ':aside'), redis.call('HLEN', at .. ':deadrow'), bytes }
end
return { redis.call('ZCARD', root .. ':due'), redis.call('GET', root .. ':parked') or '0', news, replayed, branches }
"
);
