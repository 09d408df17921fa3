//! What has to be done in one step on the server.

use super::link::Text;

/// Appends a record together with its idempotency key, unless the key is known.
/// KEYS: key, stream. ARGV: record, fingerprint, id, time written, now, window (ms), how long to keep the key (ms).
/// Gives the entry's id, or what is known: fingerprint, id, time, due, state.
pub(super) static EXACT: Text = Text::new(
    r"
local known = redis.call('HMGET', KEYS[1], 'f', 'i', 'w', 'd', 's')
if known[1] and not (known[5] == 'k' and tonumber(known[3]) + tonumber(ARGV[6]) < tonumber(ARGV[5])) then
  return known
end
local at = redis.call('XADD', KEYS[2], '0-*', 'r', ARGV[1])
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'f', ARGV[2], 'i', ARGV[3], 'w', ARGV[4], 's', 'k')
redis.call('PEXPIRE', KEYS[1], ARGV[7])
return at
",
);

/// Says that a process lives and renews or takes its holds on streams.
/// KEYS: who lives, lease of each stream. ARGV: instance, token, lease (ms), 1 = take what is free.
/// Gives how many live, then for each stream: 0 = another's, 1 = ours still, 2 = ours from now on, 3 = free.
pub(super) static HOLD: Text = Text::new(
    r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[3])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3] * 10)
local live = redis.call('ZCARD', KEYS[1])
local fair = math.ceil((#KEYS - 1) / live)
local out, mine = { live }, 0
for i = 2, #KEYS do
  local owner = redis.call('GET', KEYS[i])
  if not owner then
    out[i] = 3
  elseif string.sub(owner, 1, #ARGV[1]) == ARGV[1] then
    redis.call('SET', KEYS[i], ARGV[2], 'PX', ARGV[3])
    out[i] = 1
    mine = mine + 1
  else
    out[i] = 0
  end
end
if ARGV[4] == '1' then
  for i = 2, #KEYS do
    if out[i] == 3 and mine < fair then
      redis.call('SET', KEYS[i], ARGV[2], 'PX', ARGV[3], 'NX')
      out[i] = 2
      mine = mine + 1
    end
  end
end
return out
",
);

/// Lets holds go. KEYS: who lives, leases. ARGV: instance, 1 = it does not live any more.
pub(super) static RELEASE: Text = Text::new(
    r"
if ARGV[2] == '1' then redis.call('ZREM', KEYS[1], ARGV[1]) end
for i = 2, #KEYS do
  local owner = redis.call('GET', KEYS[i])
  if owner and string.sub(owner, 1, #ARGV[1]) == ARGV[1] then redis.call('DEL', KEYS[i]) end
end
return 1
",
);

/// Makes a branch's group on a stream if there is none. KEYS: stream. ARGV: group, where it begins (`0`, `$` or a number).
/// Gives 1 if it was made, the last id given to the group, its first pending id or '', the stream's last id, and how many are
/// pending for other consumers.
pub(super) static BEGIN: Text = Text::new(
    r"
local function last_of(key)
  local info = redis.call('XINFO', 'STREAM', key)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then return info[i + 1] end
  end
end
local begin = ARGV[2]
if begin ~= '$' then
  local last = redis.call('EXISTS', KEYS[1]) == 1 and last_of(KEYS[1]) or '0-0'
  -- A place beyond the end is one of a stream that is no more.
  if tonumber(begin) > tonumber(string.match(last, '%-(%d+)$')) then begin = '0' end
  begin = '0-' .. begin
end
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], begin, 'MKSTREAM')
if type(made) == 'table' and made.err then
  if not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
  made = 0
else
  made = 1
end
local given = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[1] then given = fields['last-delivered-id'] end
end
local pending = redis.call('XPENDING', KEYS[1], ARGV[1])
local others = 0
for _, consumer in ipairs(pending[4] or {}) do
  if consumer[1] ~= 'walflow' then others = others + tonumber(consumer[2]) end
end
return { made, given, pending[2] or '', last_of(KEYS[1]), others }
",
);

/// Which of some groups have not finished with an entry. KEYS: stream. ARGV: the entry's number, groups.
pub(super) static UNFINISHED: Text = Text::new(
    r"
local out, at = {}, '0-' .. ARGV[1]
if redis.call('EXISTS', KEYS[1]) == 0 then return out end
local given = {}
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  given[fields['name']] = tonumber(string.match(fields['last-delivered-id'], '%-(%d+)$'))
end
for i = 2, #ARGV do
  local last = given[ARGV[i]]
  if last and (last < tonumber(ARGV[1]) or #redis.call('XPENDING', KEYS[1], ARGV[i], at, at, 1) > 0) then
    out[#out + 1] = ARGV[i]
  end
end
return out
",
);

/// Lets streams go on after what is known to have been there. KEYS: streams. ARGV: for each the newest number that is known.
/// Gives for each where it ended if that was before, else -1.
pub(super) static FENCE: Text = Text::new(
    r"
local out = {}
for i, key in ipairs(KEYS) do
  local last = 0
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then last = tonumber(string.match(info[j + 1], '%-(%d+)$')) end
    end
  end
  if last < tonumber(ARGV[i]) then
    redis.call('XADD', key, string.format('0-%.0f', tonumber(ARGV[i]) + 1), 'skipped', last)
    out[i] = last
  else
    out[i] = -1
  end
end
return out
",
);

/// Takes over some of what is pending for whatever consumer, if the stream is still held.
/// KEYS: lease, stream. ARGV: token, group, where to begin. Gives where to go on (`0-0` = that was all), and what was pending
/// though its entry is gone.
pub(super) static CLAIM: Text = Text::new(
    r"
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return redis.error_reply('NOTHELD the hold on ' .. KEYS[1] .. ' has ended') end
local found = redis.call('XAUTOCLAIM', KEYS[2], ARGV[2], 'walflow', '0', ARGV[3], 'COUNT', '500', 'JUSTID')
return { found[1], found[3] }
",
);

/// Reads as a group, if every stream is still held and the group is not behind what it was given.
/// KEYS: leases, then streams. ARGV: token, group, most entries a stream, then for each stream where to read, then for each the
/// newest number that the group was given.
/// Gives the streams of which others have read as this group, each with the newest number that it was given; if there are none,
/// also what was read.
pub(super) static FETCH: Text = Text::new(
    r"
local count = #KEYS / 2
for i = 1, count do
  if redis.call('GET', KEYS[i]) ~= ARGV[1] then
    -- What a master that was replaced knows is old: a write tells whether it is one still.
    redis.call('XACK', KEYS[count + i], ARGV[2], '0-0')
    return redis.error_reply('NOTHELD the hold on ' .. KEYS[i] .. ' has ended')
  end
end
local others = {}
local read = { 'XREADGROUP', 'GROUP', ARGV[2], 'walflow', 'COUNT', ARGV[3], 'STREAMS' }
for i = 1, count do
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[count + i])) do
    local fields = {}
    for j = 1, #group, 2 do fields[group[j]] = group[j + 1] end
    if fields['name'] == ARGV[2] then
      local given = tonumber(string.match(fields['last-delivered-id'], '%-(%d+)$'))
      if given < tonumber(ARGV[3 + count + i]) then
        return redis.error_reply(string.format('WENTBACK group %s of %s was given entries up to 0-%s, and the server says 0-%.0f',
          ARGV[2], KEYS[count + i], ARGV[3 + count + i], given))
      end
      -- What others were given comes before what is new.
      if given > tonumber(ARGV[3 + count + i]) and ARGV[3 + i] == '>' then others[#others + 1] = { i, given } end
    end
  end
  read[#read + 1] = KEYS[count + i]
end
if #others > 0 then return { others, false } end
for i = 1, count do read[#read + 1] = ARGV[3 + i] end
return { others, redis.call(unpack(read)) }
",
);

/// Acknowledges, if the stream is still held. KEYS: lease, stream. ARGV: instance, group, '' or where the group goes on, ids.
pub(super) static ACK: Text = Text::new(
    r"
local owner = redis.call('GET', KEYS[1])
if not owner or string.sub(owner, 1, #ARGV[1]) ~= ARGV[1] then
  -- A master that was replaced says so here.
  redis.call('XACK', KEYS[2], ARGV[2], '0-0')
  return 0
end
for i = 4, #ARGV, 500 do
  redis.call('XACK', KEYS[2], ARGV[2], unpack(ARGV, i, math.min(i + 499, #ARGV)))
end
if ARGV[3] ~= '' then redis.call('XGROUP', 'SETID', KEYS[2], ARGV[2], ARGV[3]) end
return 1
",
);

/// Looks at streams, and removes what every group has finished. KEYS: streams. ARGV: for each up to which number, '' = nothing.
/// Gives for each: the last number, the lowest unfinished one ('' = it has no group), how many entries, how many bytes.
pub(super) static LOOK: Text = Text::new(
    r"
local out = {}
local function number(id) return tonumber(string.match(id, '%-(%d+)$')) end
for i, key in ipairs(KEYS) do
  local last, low, length, bytes = 0, '', 0, 0
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for j = 1, #info, 2 do
      if info[j] == 'last-generated-id' then last = number(info[j + 1]) end
    end
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
      local fields = {}
      for j = 1, #group, 2 do fields[group[j]] = group[j + 1] end
      local at = number(fields['last-delivered-id']) + 1
      if fields['pending'] > 0 then
        at = math.min(at, number(redis.call('XPENDING', key, fields['name'])[2]))
      end
      if low == '' or at < low then low = at end
    end
    if low ~= '' and ARGV[i] ~= '' then
      redis.call('XTRIM', key, 'MINID', '=', string.format('0-%.0f', math.min(low, tonumber(ARGV[i]))))
    end
    length = redis.call('XLEN', key)
    local used = redis.pcall('MEMORY', 'USAGE', key)
    if type(used) == 'number' then bytes = used end
  end
  if low ~= '' then low = string.format('%.0f', low) end
  out[i] = { string.format('%.0f', last), low, length, bytes }
end
return out
",
);

/// Gives a group another name, with what is pending. KEYS: stream. ARGV: from, to.
pub(super) static RENAME: Text = Text::new(
    r"
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local given
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[2] then return 0 end
  if fields['name'] == ARGV[1] then given = fields['last-delivered-id'] end
end
if not given then return 0 end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[2], given)
local from = '-'
while true do
  local page = redis.call('XPENDING', KEYS[1], ARGV[1], from, '+', 500)
  if #page == 0 then break end
  local claim = { 'XCLAIM', KEYS[1], ARGV[2], 'walflow', '0' }
  for _, row in ipairs(page) do claim[#claim + 1] = row[1] end
  claim[#claim + 1] = 'FORCE'
  claim[#claim + 1] = 'JUSTID'
  redis.call(unpack(claim))
  from = '(' .. page[#page][1]
end
redis.call('XGROUP', 'DESTROY', KEYS[1], ARGV[1])
return 1
",
);

/// Ends groups. KEYS: who lives, then lease and stream in turn. ARGV: group.
pub(super) static FORGET: Text = Text::new(
    r"
redis.call('DEL', KEYS[1])
for i = 2, #KEYS, 2 do
  redis.call('DEL', KEYS[i])
  if redis.call('EXISTS', KEYS[i + 1]) == 1 then redis.call('XGROUP', 'DESTROY', KEYS[i + 1], ARGV[1]) end
end
return 1
",
);
