"""The operations of the Redis store on a job, as scripts in Lua, each of which Redis runs as a whole.

Strategy. A script gets all keys that it can be told beforehand, and finds the others in the job. All keys of the store
have one hash tag, so a Redis Cluster has them in one place. A script's first command that writes is one that Redis
refuses when its memory is full: it runs as a whole or not at all. Numbers of Lua are exact up to 2**53.

The keys, after their prefix::

    job:ID            hash     the job                      unfinished:USER   sorted set   ids, by unfinished_until
    counter:KEY       number                                account:DAY       hash         [USER, ENDPOINT] -> numbers
    days              sorted set, of the days in the account
"""

from __future__ import annotations

__all__ = ["ALL", "END", "GIVE_BACK", "RENAME", "RESERVE", "ROWS", "SETTLE"]

_COMMON = """
local function whole(number)
  return string.format('%.0f', number)
end

-- A counter that is forgotten stays so. None falls below zero.
local function add(keys, amount)
  if amount == 0 then return end
  for _, key in ipairs(cjson.decode(keys)) do
    if redis.call('EXISTS', key) == 1 then
      local value = redis.call('INCRBY', key, whole(amount))
      if value < 0 then redis.call('INCRBY', key, whole(-value)) end
    end
  end
end

-- A row is "jobs refused units cost". One that has only zeros is deleted.
local function account(day, row, jobs, refused, units, cost)
  local old = redis.call('HGET', day, row)
  if old then
    local j, r, u, c = string.match(old, '(%S+) (%S+) (%S+) (%S+)')
    jobs, refused, units, cost = jobs + j, refused + r, units + u, cost + c
  end
  if jobs == 0 and refused == 0 and units == 0 and cost == 0 then
    redis.call('HDEL', day, row)
  else
    redis.call('HSET', day, row, table.concat({whole(jobs), whole(refused), whole(units), whole(cost)}, ' '))
  end
end
"""

# Returns refused_by (-2: not refused), the user's unfinished jobs, and what is used of each counter.
RESERVE = (
    _COMMON
    + """
local key, unfinished, day, days = unpack(KEYS, 1, 4)
local job = cjson.decode(ARGV[1])

local running = redis.call('ZCOUNT', unfinished, '(' .. whole(job.at), '+inf')
local answer = {-2, running}
local adds, missing = {}, {}
for i = 1, #KEYS - 4 do
  local value = redis.call('GET', KEYS[4 + i])
  missing[i] = not value
  value = tonumber(value or 0)
  answer[2 + i] = value
  adds[i] = i <= #job.job_counters and job.jobs or job.cost
  if answer[1] == -2 and adds[i] > 0 and value + adds[i] > job.limits[i] then answer[1] = i - 1 end
end
if redis.call('EXISTS', key) == 1 then
  answer[1] = -2
  return answer
end
if answer[1] == -2 and job.max_unfinished ~= cjson.null and running >= job.max_unfinished then answer[1] = -1 end

if answer[1] == -2 then
  redis.call('HSET', key, 'user', job.user, 'endpoint', job.endpoint, 'day', day, 'row', job.row,
    'unfinished', unfinished, 'jobs', whole(job.jobs), 'units', whole(job.units), 'cost', whole(job.cost),
    'job_counters', cjson.encode(job.job_counters), 'cost_counters', cjson.encode(job.cost_counters))
  redis.call('EXPIRE', key, job.ttl)
  for i = 1, #adds do
    answer[2 + i] = redis.call('INCRBY', KEYS[4 + i], whole(adds[i]))
    if missing[i] then redis.call('EXPIRE', KEYS[4 + i], job.ttls[i]) end
  end
  redis.call('ZREMRANGEBYSCORE', unfinished, '-inf', whole(job.at))
  redis.call('ZADD', unfinished, whole(job.unfinished_until), job.id)
  redis.call('EXPIRE', unfinished, job.ttl)
  account(day, job.row, job.jobs, 0, job.units, job.cost)
  answer[2] = running + 1
else
  account(day, job.refused_row, 0, 1, 0, 0)
end
redis.call('EXPIRE', day, job.day_ttl)
redis.call('ZADD', days, 0, job.day)
redis.call('EXPIRE', days, job.day_ttl)
return answer
"""
)

RENAME = """
if redis.call('EXISTS', KEYS[1]) == 1 and redis.call('RENAMENX', KEYS[1], KEYS[2]) == 1 then
  local unfinished = redis.call('HGET', KEYS[2], 'unfinished')
  local unfinished_until = redis.call('ZSCORE', unfinished, ARGV[1])
  if unfinished_until then
    redis.call('ZADD', unfinished, unfinished_until, ARGV[2])  -- first: an empty set would lose its time to live
    redis.call('ZREM', unfinished, ARGV[1])
  end
end
"""

SETTLE = (
    _COMMON
    + """
local day, row, units, cost, cost_counters, unfinished, settled =
  unpack(redis.call('HMGET', KEYS[1], 'day', 'row', 'units', 'cost', 'cost_counters', 'unfinished', 'settled'))
if not day or settled then return end
local bill = ARGV[3] == '' and cost or ARGV[3]
redis.call('HSET', KEYS[1], 'settled', 1, 'units', ARGV[2], 'cost', bill)
redis.call('ZREM', unfinished, ARGV[1])
add(cost_counters, bill - cost)
account(day, row, 0, 0, ARGV[2] - units, bill - cost)
redis.call('EXPIRE', day, ARGV[4])
"""
)

END = """
local unfinished = redis.call('HGET', KEYS[1], 'unfinished')
if unfinished then redis.call('ZREM', unfinished, ARGV[1]) end
"""

GIVE_BACK = (
    _COMMON
    + """
local day, row, jobs, units, cost, job_counters, cost_counters, unfinished, settled = unpack(redis.call(
  'HMGET', KEYS[1], 'day', 'row', 'jobs', 'units', 'cost', 'job_counters', 'cost_counters', 'unfinished', 'settled'))
if not day or settled then return end
redis.call('DEL', KEYS[1])
redis.call('ZREM', unfinished, ARGV[1])
add(job_counters, -jobs)
add(cost_counters, -cost)
account(day, row, -jobs, 0, -units, -cost)
redis.call('EXPIRE', day, ARGV[2])
"""
)

# Returns where to go on, and some rows of a day as one text: [USER, ENDPOINT] and numbers in turn, each on a line. The
# library needs ten times as long for the same in single values.
ROWS = """
local found = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
return {found[1], table.concat(found[2], '\\n')}
"""

ALL = (RESERVE, RENAME, SETTLE, END, GIVE_BACK, ROWS)
