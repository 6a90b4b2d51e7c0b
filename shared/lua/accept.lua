-- Valid stream entries become jobs, each once: XACK, the first write for an entry, succeeds for one dispatcher only.
-- ARGV[3] most jobs of a class, [4..] an entry each, packed by msgpack: {stream, entry, id, lane CLASS:COMBINATION,
-- fingerprint, GPU to try first or '', fields of the job's hash in pairs}. The fields are reply, batch, req, ..., and ttl
-- as `keep`, because RQ would apply a field `ttl` to the waiting job.
-- -> for each entry accepted | assigned | duplicate | conflict | busy | expired | cancelled | stale, or - and what is wrong
-- in Redis, which harms no other entry
local limit = tonumber(ARGV[3])

local function accept(stream, entry, id, lane, fingerprint, gpu, fields)
  local key = job_key(id)
  local known = call('HMGET', key, 'fp', 'code')
  if known[1] and known[2] ~= 'busy' then
    if known[1] == fingerprint then return 'duplicate' end
    bury(stream, entry, 'bad_id', 'the id ' .. id .. ' is known with a different request; choose another')
    return 'conflict'
  end
  call('DEL', key, P .. 'out:' .. id, P .. 'reply:' .. id)
  call('HSET', key, 'fp', fingerprint, 'lane', lane, 'ms', now, 'status', 'deferred', 'origin', 'lanes',
    'created_at', utc(now), 'enqueued_at', '', 'started_at', '', 'ended_at', '', 'worker_name', '',
    unpack(fields))
  if call('DEL', P .. 'cancelled:' .. id) == 1 then
    answer(id, 'canceled', {'ev', 'cancelled'})
    return 'cancelled'
  end
  local class = class_of(lane)
  if tonumber(call('HGET', P .. 'depth', class) or 0) >= limit then
    local message = ARGV[3] .. ' jobs of class ' .. class .. ' are waiting; submit again later'
    bury(stream, entry, 'busy', message)
    answer(id, 'failed', {'ev', 'error', 'code', 'busy', 'error', message})
    return 'busy'
  end
  local deadline = call('HGET', key, 'deadline_ms')
  if deadline and tonumber(deadline) <= now then
    local message = 'the deadline had passed when the job arrived'
    bury(stream, entry, 'expired', message)
    answer(id, 'failed', {'ev', 'error', 'code', 'expired', 'error', message})
    return 'expired'
  end
  call('HINCRBY', P .. 'depth', class, 1)
  if deadline then call('ZADD', P .. 'deadlines', deadline, id) end
  if gpu ~= '' and call('EXISTS', lane_key(lane)) == 0 and room(gpu, combination_of(lane)) > 0 then
    queue_on(gpu, id, lane)
    call('RPUSH', queue_key(gpu), id)
    return 'assigned'
  end
  call('RPUSH', lane_key(lane), id)
  call('ZADD', P .. 'lanes', 'NX', now, lane)
  return 'accepted'
end

local function take(packed)
  local row = cmsgpack.unpack(packed)
  local stream, entry = row[1], row[2]
  if call('XACK', stream, 'yard', entry) == 0 then return 'stale' end
  local outcome = accept(unpack(row))
  call('XDEL', stream, entry)
  return outcome
end

local outcomes = {}
for i = 4, #ARGV do
  local ok, said = pcall(take, ARGV[i])
  outcomes[i - 3] = ok and said or '-' .. (type(said) == 'table' and said.err or tostring(said))
end
return outcomes
