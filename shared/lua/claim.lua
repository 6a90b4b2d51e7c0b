-- A worker takes jobs from its queue: pop, lease and status in one step, so that no death in between can lose one.
-- ARGV[3] GPU, [4] worker, [5] lease in ms, [6] most jobs, [7] newest request format that it reads, [8] random hex that
-- begins the execution ids, [9] number of jobs it is running.
-- -> rows {id, execution, req, attempt, slot or -1, ms since accept} packed by msgpack, '' for none; 0 if the GPU has been
-- given to another worker
local gpu, worker, lease = ARGV[3], ARGV[4], tonumber(ARGV[5])
local g = call('HMGET', gpu_key(gpu), 'worker', 'group')
if g[1] ~= worker then return 0 end
local running, limit = tonumber(ARGV[9]), tonumber(g[2] or 0) -- limit: size of a group of suspects; 0: no suspects run
if running == 0 then limit = 0 end
local executions = 'rq:worker:' .. worker .. ':executions'
local score = math.floor((now + lease) / 1000) + RQ_MARGIN_S
local seconds = math.ceil(lease / 1000) + RQ_MARGIN_S
local later, rows, wip, composites = {}, {}, {}, {}

-- Suspects run with suspects alone, in groups as small as the smallest of them asks for.
local function joins(group)
  if running == 0 then
    limit = group
    return true
  end
  if group == 0 then return limit == 0 end
  if limit == 0 then return false end
  local smaller = math.min(limit, group)
  if running >= smaller then return false end
  limit = smaller
  return true
end

local function start(id, f)
  local execution = ARGV[8] .. string.format('%06x', #rows)
  local composite, attempt = id .. ':' .. execution, tonumber(f[10] or 0) + 1
  if attempt > 1 then
    for _, earlier in ipairs(call('ZRANGE', 'rq:executions:' .. id, 0, -1)) do -- RQ has requeued it meanwhile
      drop_lease(gpu, worker, id, earlier)
    end
    if f[7] == '1' then tell('XADD', P .. 'out:' .. id, '*', 'ev', 'restart', 'attempt', attempt) end
  end
  call('HSET', 'rq:execution:' .. composite, 'id', execution, 'job_id', id, 'created_at', now / 1000,
    'last_heartbeat', now / 1000, 'worker_name', worker)
  call('EXPIRE', 'rq:execution:' .. composite, seconds)
  call('ZADD', 'rq:executions:' .. id, score, execution)
  call('EXPIRE', 'rq:executions:' .. id, seconds)
  wip[#wip + 1], wip[#wip + 2], composites[#composites + 1] = score, composite, composite
  call('HSET', job_key(id), 'status', 'started', 'started_at', utc_now(), 'last_heartbeat', utc_now(), 'worker_name',
    worker, 'attempt', attempt)
  local slot = combination_of(f[3]) == 'base' and -1 or slot_of(gpu, combination_of(f[3]))
  rows[#rows + 1] = {id, execution, f[4], attempt, slot, now - tonumber(f[8])}
  running = running + 1
end

local function look_at(id)
  local f = call('HMGET', job_key(id), 'status', 'origin', 'lane', 'req', 'deadline_ms', 'group', 'stream', 'ms', 'v',
    'attempt')
  if f[1] ~= 'queued' or f[2] ~= gpu or not f[4] then return true end -- an answered job that RQ requeued has no request
  if not joins(tonumber(f[6] or 0)) then return false end
  if f[5] and tonumber(f[5]) <= now then
    unload(gpu, f[3])
    finish_error(id, f[3], 'expired', 'the deadline passed before the job could start')
  elseif tonumber(f[9]) > tonumber(ARGV[7]) then
    later[#later + 1] = id
  else
    start(id, f)
  end
  return true
end

-- -> number of ids to take off the queue
local function look(most)
  local seen = 0
  while true do
    local ids = call('LRANGE', queue_key(gpu), seen, seen + most - 1)
    if #ids == 0 then return seen end
    for _, id in ipairs(ids) do
      if #rows == most or not look_at(id) then return seen end
      seen = seen + 1
    end
  end
end

local seen = look(tonumber(ARGV[6]))
if seen > 0 then call('LTRIM', queue_key(gpu), seen, -1) end
for i = #later, 1, -1 do call('LPUSH', queue_key(gpu), later[i]) end
if limit ~= tonumber(g[2] or 0) then call('HSET', gpu_key(gpu), 'group', limit) end
if #rows == 0 then return '' end
call('ZADD', wip_key(gpu), unpack(wip))
call('SADD', executions, unpack(composites))
call('HSET', 'rq:worker:' .. worker, 'state', 'busy') -- RQ's tools need not wait for the next beat
return cmsgpack.pack(rows)
