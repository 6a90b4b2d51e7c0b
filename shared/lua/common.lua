-- Spliced in front of every script. ARGV[1] prefix, ARGV[2] time in unix ms or 0 for Redis' own clock.
-- Scripts build the names of job keys themselves: one Redis primary, not Cluster.
local P = ARGV[1]
local now = tonumber(ARGV[2])
if now == 0 then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local call = redis.call
-- A full Redis refuses a script's writes unless an earlier write of the script needed no memory. With this one, which
-- changes nothing, work that is in the system still finishes when clients are already refused.
call('PERSIST', P .. 'info')
local KEPT_FIELDS, KEPT_BYTES = 64, 4096 -- of a refused entry
local RQ_MARGIN_S = 60 -- RQ sees a lease end this much later, so that our reclaim always comes before its own clean-up

local function job_key(id) return 'rq:job:' .. id end
local function queue_key(gpu) return 'rq:queue:' .. gpu end
local function wip_key(gpu) return 'rq:wip:' .. gpu end
local function lane_key(lane) return P .. 'lane:' .. lane end
local function gpu_key(gpu) return P .. 'gpu:' .. gpu end
local function slots_key(gpu) return P .. 'slots:' .. gpu end
local function load_key(gpu) return P .. 'load:' .. gpu end
local function stops_key(gpu) return P .. 'stops:' .. gpu end
local function held_key(holder) return P .. 'held:' .. holder end
local function class_of(lane) return string.match(lane, '^[^:]*') end
local function combination_of(lane) return string.match(lane, ':(.*)$') end

-- The digest in what a holder says of an adapter.
local function digest_of(text) return string.match(text, '"digest": ?"(%x+)"') or '' end

-- RQ's text form of a time: 2026-01-31T23:59:59.123456Z
local function utc(ms)
  local days, rest = math.floor(ms / 86400000), ms % 86400000
  local z = days + 719468 -- civil date from days (Howard Hinnant's algorithm)
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local s = math.floor(rest / 1000)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%06dZ', year, month, day, math.floor(s / 3600),
    math.floor(s / 60) % 60, s % 60, (rest % 1000) * 1000)
end

local stamp = nil
local function utc_now()
  stamp = stamp or utc(now)
  return stamp
end

-- Writes a refused stream entry into yard:dead; to be called before the entry is deleted.
local function bury(stream, entry, code, message)
  local found = call('XRANGE', stream, entry, entry)[1]
  local original = found and found[2] or {}
  local cut, fields = #original > 2 * KEPT_FIELDS, {}
  for i = 1, math.min(#original, 2 * KEPT_FIELDS) do
    cut = cut or #original[i] > KEPT_BYTES
    fields[i] = string.sub(original[i], 1, KEPT_BYTES)
  end
  -- Ours come last, because of a name that is given twice the last counts.
  for _, text in ipairs({'entry', entry, 'to', stream, 'cut', cut and 1 or 0, 'code', code, 'error', message}) do
    fields[#fields + 1] = text
  end
  call('XADD', P .. 'dead', 'MAXLEN', '~', 100000, '*', unpack(fields))
end

local NUMBERS = {prompt_tokens = 1, new_tokens = 1, attempt = 1, t_queue_ms = 1, t_first_ms = 1, t_total_ms = 1}

local function as_json(event)
  local object = {}
  for i = 1, #event, 2 do
    object[event[i]] = NUMBERS[event[i]] and tonumber(event[i + 1]) or event[i + 1]
  end
  return cjson.encode(object)
end

-- Writes where a client reads. A client that has put something else under that name gets no answer; nobody else suffers.
local tell = redis.pcall

local expiring = {}

-- As EXPIRE, once where many answers go to one stream.
local function expire(key, ttl)
  if expiring[key] ~= ttl then call('EXPIRE', key, ttl) end
  expiring[key] = ttl
end

-- Writes the one final event where the client asked for it, and turns the job into a tombstone that lives for ttl.
local function answer(id, status, event)
  local key = job_key(id)
  local f = call('HMGET', key, 'reply', 'batch', 'keep', 'gpu', 'deadline_ms')
  local ttl = tonumber(f[3])
  call('HDEL', key, 'req')
  if f[5] then call('ZREM', P .. 'deadlines', id) end
  if f[1] == 'list' then
    tell('RPUSH', P .. 'reply:' .. id, as_json(event))
    call('EXPIRE', P .. 'reply:' .. id, ttl)
  elseif f[1] == 'batch' then
    tell('XADD', P .. 'res:' .. f[2], '*', 'id', id, unpack(event))
    expire(P .. 'res:' .. f[2], ttl)
  elseif f[1] == 'stream' then
    tell('XADD', P .. 'out:' .. id, '*', unpack(event))
    call('EXPIRE', P .. 'out:' .. id, ttl)
  end
  local at = utc_now()
  call('HSET', key, 'status', status, 'ended_at', at, 'last_heartbeat', at)
  if event[2] == 'error' then call('HSET', key, 'code', event[4]) end
  call('EXPIRE', key, ttl)
  if f[4] then
    call('ZADD', 'rq:' .. status .. ':' .. f[4], math.floor(now / 1000) + ttl, id)
  end
end

-- Ends an accepted job: its final event, and its place in the count of its class.
local function finish(id, lane, status, event)
  call('HINCRBY', P .. 'depth', class_of(lane), -1)
  answer(id, status, event)
end

local function finish_error(id, lane, code, message)
  finish(id, lane, 'failed', {'ev', 'error', 'code', code, 'error', message})
end

-- One job of a lane fewer, queued or running, on a GPU; or so many.
local function unload(gpu, lane, jobs)
  local combination = combination_of(lane)
  if call('HINCRBY', load_key(gpu), combination, -(jobs or 1)) <= 0 then call('HDEL', load_key(gpu), combination) end
end

-- Index of the slot that holds a combination, its state; nil if none does.
local function slot_of(gpu, combination)
  local count = tonumber(call('HGET', gpu_key(gpu), 'slots') or 0)
  for i = 0, count - 1 do
    local s = call('HMGET', slots_key(gpu), i, i .. '.state')
    if s[1] == combination then return i, s[2] end
  end
end

-- How many more jobs of a combination may be queued on a GPU now: none unless it is alive and its slot is open.
local function room(gpu, combination)
  local g = call('HMGET', gpu_key(gpu), 'state', 'window')
  if g[1] ~= 'ready' then return 0 end
  if combination ~= 'base' then
    local _, state = slot_of(gpu, combination)
    if state ~= 'open' then return 0 end
  end
  return tonumber(g[2]) - call('LLEN', queue_key(gpu))
end

local function queue_on(gpu, id, lane)
  local key = job_key(id)
  call('HSET', key, 'status', 'queued', 'origin', gpu, 'gpu', gpu, 'enqueued_at', utc_now())
  call('HINCRBY', load_key(gpu), combination_of(lane), 1)
end

-- Notes when the head of a lane was accepted, or that the lane is empty. Skips heads that were cancelled meanwhile.
local function refresh_lane(lane)
  local key = lane_key(lane)
  while true do
    local head = call('LINDEX', key, 0)
    if not head then
      call('ZREM', P .. 'lanes', lane)
      return
    end
    local f = call('HMGET', job_key(head), 'status', 'lane', 'ms')
    if f[1] == 'deferred' and f[2] == lane then
      call('ZADD', P .. 'lanes', f[3], lane)
      return
    end
    call('LPOP', key)
  end
end

-- Puts jobs back at the heads of their lanes, in the order in which they were accepted.
local function put_back(ids)
  local jobs, lanes = {}, {}
  for i, id in ipairs(ids) do
    local f = call('HMGET', job_key(id), 'lane', 'ms')
    jobs[i] = {id = id, lane = f[1], ms = tonumber(f[2]), at = i}
  end
  table.sort(jobs, function(a, b)
    if a.ms ~= b.ms then return a.ms > b.ms end
    return a.at > b.at
  end)
  for _, job in ipairs(jobs) do
    call('HSET', job_key(job.id), 'status', 'deferred', 'origin', 'lanes', 'worker_name', '', 'started_at', '')
    call('HDEL', job_key(job.id), 'gpu')
    call('LPUSH', lane_key(job.lane), job.id)
    lanes[job.lane] = true
  end
  for lane in pairs(lanes) do refresh_lane(lane) end
end

-- Ends one lease. False if it was not held: somebody else owns the job now.
local function drop_lease(gpu, worker, id, execution)
  local composite = id .. ':' .. execution
  if call('ZREM', wip_key(gpu), composite) == 0 then return false end
  call('DEL', 'rq:execution:' .. composite)
  call('ZREM', 'rq:executions:' .. id, execution)
  call('SREM', 'rq:worker:' .. worker .. ':executions', composite)
  return true
end

-- A started job whose worker is gone or gives it back: true if it should run again, false if it has just been ended.
local function survives(id, lane)
  local f = call('HMGET', job_key(id), 'cancel', 'deadline_ms')
  if f[1] then
    finish(id, lane, 'canceled', {'ev', 'cancelled'})
    return false
  end
  if f[2] and tonumber(f[2]) <= now then
    finish_error(id, lane, 'expired', 'the deadline passed while the job was running')
    return false
  end
  return true
end

-- Ids of the jobs on a GPU's queue that still belong there; the queue is emptied.
local function take_queue(gpu)
  local ids = {}
  for _, id in ipairs(call('LRANGE', queue_key(gpu), 0, -1)) do
    local f = call('HMGET', job_key(id), 'status', 'origin', 'req')
    if f[1] == 'queued' and f[2] == gpu and f[3] then ids[#ids + 1] = id end
  end
  call('DEL', queue_key(gpu))
  return ids
end

-- After a death the jobs that ran together are suspects: they run again in groups of at most 64, then 8, then 1.
-- Only a suspect that died twice alone is condemned. A first death makes a suspect and proves nothing, even alone: on an
-- idle yard every job runs alone, and whoever kills its worker from outside must not condemn it.
local function suspect(id, lane, together)
  local key = job_key(id)
  local deaths = call('HINCRBY', key, 'deaths', 1)
  call('HSET', key, 'group', together > 64 and 64 or together > 8 and 8 or 1)
  if deaths == 1 or together > 1 or call('HINCRBY', key, 'deaths_alone', 1) < 2 then return true end
  finish_error(id, lane, 'crashed', 'the job killed its worker twice while it ran alone')
  return false
end

-- Everything a dead worker held goes back to the lanes; the GPU is forgotten until a worker registers on it again.
local function reclaim(gpu, worker)
  local back, died = {}, {}
  for _, composite in ipairs(call('ZRANGE', wip_key(gpu), 0, -1)) do
    local id, execution = string.match(composite, '^([^:]+):(.+)$')
    drop_lease(gpu, worker, id, execution)
    local f = call('HMGET', job_key(id), 'status', 'lane')
    if f[1] == 'started' and f[2] then died[#died + 1] = {id, f[2]} end
  end
  for _, job in ipairs(died) do
    if survives(job[1], job[2]) and suspect(job[1], job[2], #died) then back[#back + 1] = job[1] end
  end
  for _, id in ipairs(take_queue(gpu)) do back[#back + 1] = id end
  put_back(back)
  local name = 'rq:worker:' .. worker
  call('DEL', name .. ':executions', load_key(gpu), slots_key(gpu), stops_key(gpu), gpu_key(gpu), name)
  call('SREM', 'rq:workers', name)
  call('SREM', 'rq:workers:' .. gpu, name)
  return #back
end
