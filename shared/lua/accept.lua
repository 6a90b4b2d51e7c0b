-- A valid stream entry becomes a job, once: XACK succeeds for one dispatcher only.
-- KEYS[1] intake stream. ARGV[3] entry, [4] id, [5] lane CLASS:COMBINATION, [6] fingerprint, [7] most jobs of the class,
-- [8] GPU to try first or '', [9] fields of the job's hash in pairs, packed by msgpack (reply, batch, req, ..., and ttl as
-- `keep`, because RQ would apply a field `ttl` to the waiting job).
-- -> accepted | assigned | duplicate | conflict | busy | expired | cancelled | stale
local stream, entry, id, lane, fingerprint = KEYS[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
if call('XACK', stream, 'yard', entry) == 0 then return 'stale' end
local key = job_key(id)

local function accept()
  local known = call('HMGET', key, 'fp', 'code')
  if known[1] and known[2] ~= 'busy' then
    if known[1] == fingerprint then return 'duplicate' end
    bury(stream, entry, 'bad_id', 'the id ' .. id .. ' is known with a different request; choose another')
    return 'conflict'
  end
  call('DEL', key, P .. 'out:' .. id, P .. 'reply:' .. id)
  call('HSET', key, 'fp', fingerprint, 'lane', lane, 'ms', now, 'status', 'deferred', 'origin', 'lanes',
    'created_at', utc(now), 'enqueued_at', '', 'started_at', '', 'ended_at', '', 'worker_name', '',
    unpack(cmsgpack.unpack(ARGV[9])))
  if call('DEL', P .. 'cancelled:' .. id) == 1 then
    answer(id, 'canceled', {'ev', 'cancelled'})
    return 'cancelled'
  end
  local class = class_of(lane)
  if tonumber(call('HGET', P .. 'depth', class) or 0) >= tonumber(ARGV[7]) then
    local message = ARGV[7] .. ' jobs of class ' .. class .. ' are waiting; submit again later'
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
  local gpu = ARGV[8]
  if gpu ~= '' and call('EXISTS', lane_key(lane)) == 0 and room(gpu, combination_of(lane)) > 0 then
    queue_on(gpu, id, lane)
    call('RPUSH', queue_key(gpu), id)
    return 'assigned'
  end
  call('RPUSH', lane_key(lane), id)
  call('ZADD', P .. 'lanes', 'NX', now, lane)
  return 'accepted'
end

local outcome = accept()
call('XDEL', stream, entry)
return outcome
