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
local later, rows = {}, {}

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
  local composite, at, seconds = id .. ':' .. execution, utc(now), math.ceil(lease / 1000) + RQ_MARGIN_S
  for _, earlier in ipairs(call('ZRANGE', 'rq:executions:' .. id, 0, -1)) do -- RQ has requeued it meanwhile
    drop_lease(gpu, worker, id, earlier)
  end
  call('HSET', 'rq:execution:' .. composite, 'id', execution, 'job_id', id, 'created_at', now / 1000,
    'last_heartbeat', now / 1000, 'worker_name', worker)
  call('EXPIRE', 'rq:execution:' .. composite, seconds)
  call('ZADD', 'rq:executions:' .. id, score, execution)
  call('EXPIRE', 'rq:executions:' .. id, seconds)
  call('ZADD', wip_key(gpu), score, composite)
  call('SADD', executions, composite)
  call('HSET', job_key(id), 'status', 'started', 'started_at', at, 'last_heartbeat', at, 'worker_name', worker)
  local attempt = call('HINCRBY', job_key(id), 'attempt', 1)
  if attempt > 1 and f[7] == '1' then call('XADD', P .. 'out:' .. id, '*', 'ev', 'restart', 'attempt', attempt) end
  local slot = combination_of(f[3]) == 'base' and -1 or slot_of(gpu, combination_of(f[3]))
  rows[#rows + 1] = {id, execution, f[4], attempt, slot, now - tonumber(f[8])}
  running = running + 1
end

while #rows < tonumber(ARGV[6]) do
  local id = call('LINDEX', queue_key(gpu), 0)
  if not id then break end
  local f = call('HMGET', job_key(id), 'status', 'origin', 'lane', 'req', 'deadline_ms', 'group', 'stream', 'ms', 'v')
  local mine = f[1] == 'queued' and f[2] == gpu and f[4] -- an answered job that RQ requeued has no request
  if mine and not joins(tonumber(f[6] or 0)) then break end
  call('LPOP', queue_key(gpu))
  if mine and f[5] and tonumber(f[5]) <= now then
    unload(gpu, f[3])
    finish_error(id, f[3], 'expired', 'the deadline passed before the job could start')
  elseif mine and tonumber(f[9]) > tonumber(ARGV[7]) then
    later[#later + 1] = id
  elseif mine then
    start(id, f)
  end
end
for i = #later, 1, -1 do call('LPUSH', queue_key(gpu), later[i]) end
if limit ~= tonumber(g[2] or 0) then call('HSET', gpu_key(gpu), 'group', limit) end
return #rows > 0 and cmsgpack.pack(rows) or ''
