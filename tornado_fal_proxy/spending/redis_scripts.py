"""The operations of the Redis store on jobs, as a script in Lua, which Redis runs as a whole.

Strategy. The script does many operations in their order, because a command costs the proxy's library much more than it
costs Redis. Each operation is an object of JSON, and finds in the job what that does not tell. All keys of the store
have one hash tag, so a Redis Cluster has them in one place. An operation's first command that writes is one that Redis
refuses when its memory is full: it runs as a whole or not at all, and others run nevertheless. Numbers of Lua are exact
up to 2**53.

The keys, after their prefix::

    job:ID            hash     the job                      unfinished:USER   sorted set   ids, by unfinished_until
    counter:KEY       number                                account:DAY       hash         [USER, ENDPOINT] -> numbers
    days              sorted set, of the days in the account
"""

from __future__ import annotations

__all__ = ["ALL", "DO_ALL", "ROWS"]

# Returns a line for each operation: its numbers, or nothing, or an exclamation mark and the text of its error. A list
# would cost the library a few calls for each number.
DO_ALL = """
local days = KEYS[1]
local call = redis.call
local operations = {}


local function whole(number)
  return string.format('%.0f', number)
end

-- A counter that is forgotten stays so. None falls below zero.
local function add(keys, amount)
  if amount == 0 then return end
  for _, key in ipairs(cjson.decode(keys)) do
    if call('EXISTS', key) == 1 then
      local value = call('INCRBY', key, whole(amount))
      if value < 0 then call('INCRBY', key, whole(-value)) end
    end
  end
end

-- A row is "jobs refused units cost". One that has only zeros is deleted.
local function account(day, row, jobs, refused, units, cost)
  local old = call('HGET', day, row)
  if old then
    local j, r, u, c = string.match(old, '(%S+) (%S+) (%S+) (%S+)')
    jobs, refused, units, cost = jobs + j, refused + r, units + u, cost + c
  end
  if jobs == 0 and refused == 0 and units == 0 and cost == 0 then
    call('HDEL', day, row)
  else
    call('HSET', day, row, table.concat({whole(jobs), whole(refused), whole(units), whole(cost)}, ' '))
  end
end

-- Returns refused_by (-2: not refused), the user's unfinished jobs, and what is used of each counter.
function operations.reserve(job)
  local running = 0
  if job.max_unfinished ~= cjson.null then
    running = call('ZCOUNT', job.unfinished, '(' .. whole(job.at), '+inf')
  end
  local answer = {-2, running}
  local adds, missing = {}, {}
  for i, counter in ipairs(job.counters) do
    local value = call('GET', counter)
    missing[i] = not value
    value = tonumber(value or 0)
    answer[2 + i] = value
    adds[i] = i <= #job.job_counters and job.jobs or job.cost
    if answer[1] == -2 and adds[i] > 0 and value + adds[i] > job.limits[i] then answer[1] = i - 1 end
  end
  if call('EXISTS', job.key) == 1 then
    answer[1] = -2
    return answer
  end
  if answer[1] == -2 and job.max_unfinished ~= cjson.null and running >= job.max_unfinished then answer[1] = -1 end

  if answer[1] == -2 then
    local row = cjson.encode({job.user, job.endpoint})
    call('HSET', job.key, 'user', job.user, 'endpoint', job.endpoint, 'day', job.day_key, 'row', row,
      'unfinished', job.unfinished, 'jobs', whole(job.jobs), 'units', whole(job.units), 'cost', whole(job.cost),
      'job_counters', cjson.encode(job.job_counters), 'cost_counters', cjson.encode(job.cost_counters))
    call('EXPIRE', job.key, job.ttl)
    for i = 1, #adds do
      answer[2 + i] = call('INCRBY', job.counters[i], whole(adds[i]))
      if missing[i] then call('EXPIRE', job.counters[i], job.ttls[i]) end
    end
    call('ZREMRANGEBYSCORE', job.unfinished, '-inf', whole(job.at))
    call('ZADD', job.unfinished, whole(job.unfinished_until), job.id)
    call('EXPIRE', job.unfinished, job.ttl)
    account(job.day_key, row, job.jobs, 0, job.units, job.cost)
    if job.max_unfinished ~= cjson.null then answer[2] = running + 1 end
  else
    account(job.day_key, cjson.encode({job.user, job.refused_as}), 0, 1, 0, 0)
  end
  call('EXPIRE', job.day_key, job.day_ttl)
  call('ZADD', days, 0, job.day)
  call('EXPIRE', days, job.day_ttl)
  return answer
end

function operations.rename(note)
  if call('EXISTS', note.key) == 1 and call('RENAMENX', note.key, note.new_key) == 1 then
    local unfinished = call('HGET', note.new_key, 'unfinished')
    local unfinished_until = call('ZSCORE', unfinished, note.id)
    if unfinished_until then
      call('ZADD', unfinished, unfinished_until, note.new_id)  -- first: an empty set would lose its time to live
      call('ZREM', unfinished, note.id)
    end
  end
end

function operations.settle(note)
  local day, row, units, cost, cost_counters, unfinished, settled =
    unpack(call('HMGET', note.key, 'day', 'row', 'units', 'cost', 'cost_counters', 'unfinished', 'settled'))
  if not day or settled then return end
  local bill = note.cost == cjson.null and cost or note.cost
  call('HSET', note.key, 'settled', 1, 'units', whole(note.units), 'cost', whole(bill))
  call('ZREM', unfinished, note.id)
  add(cost_counters, bill - cost)
  account(day, row, 0, 0, note.units - units, bill - cost)
  call('EXPIRE', day, note.day_ttl)
end

operations['end'] = function(note)
  local unfinished = call('HGET', note.key, 'unfinished')
  if unfinished then call('ZREM', unfinished, note.id) end
end

function operations.give_back(note)
  local day, row, jobs, units, cost, job_counters, cost_counters, unfinished, settled = unpack(call(
    'HMGET', note.key, 'day', 'row', 'jobs', 'units', 'cost', 'job_counters', 'cost_counters', 'unfinished', 'settled'))
  if not day or settled then return end
  call('DEL', note.key)
  call('ZREM', unfinished, note.id)
  add(job_counters, -jobs)
  add(cost_counters, -cost)
  account(day, row, -jobs, 0, -units, -cost)
  call('EXPIRE', day, note.day_ttl)
end

local answers = {}
for i, operation in ipairs(cjson.decode(ARGV[1])) do
  local done, answer = pcall(operations[operation.kind], operation)
  if not done then
    answer = type(answer) == 'table' and answer.err or tostring(answer)
    answers[i] = '!' .. string.gsub(answer, '%c', ' ')
  elseif answer then
    for j = 1, #answer do answer[j] = whole(answer[j]) end
    answers[i] = table.concat(answer, ' ')
  else
    answers[i] = ''
  end
end
return table.concat(answers, string.char(10))
"""

# Returns where to go on, and some rows of a day as one text: [USER, ENDPOINT] and numbers in turn, each on a line. The
# library needs ten times as long for the same in single values.
ROWS = """
local found = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
return {found[1], table.concat(found[2], '\\n')}
"""

ALL = (DO_ALL, ROWS)
