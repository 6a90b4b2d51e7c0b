-- The heartbeat of a worker: its GPU, itself and every lease. A lease that it has not named for two leases belongs to an
-- answer that was lost on the way: that job goes back to its lane.
-- ARGV[3] GPU, [4] worker, [5] lease in ms, [6] seconds that RQ's record of the worker lives, [7] number of running jobs,
-- [8..] their ID:EXECUTION, then fields of yard:gpu:GPU in pairs.
-- -> the ID:EXECUTION whose lease is lost; 0 if the GPU has been given to another worker
local gpu, worker, lease, count = ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[7])
if call('HGET', gpu_key(gpu), 'worker') ~= worker then return 0 end
local score, seconds, lost = math.floor((now + lease) / 1000) + RQ_MARGIN_S, math.ceil(lease / 1000) + RQ_MARGIN_S, {}
call('HSET', gpu_key(gpu), 'beat_ms', now, unpack(ARGV, 8 + count))
call('HSET', 'rq:worker:' .. worker, 'last_heartbeat', utc(now), 'state', count > 0 and 'busy' or 'idle')
call('EXPIRE', 'rq:worker:' .. worker, ARGV[6])
for i = 8, 7 + count do
  local id, execution = string.match(ARGV[i], '^([^:]+):(.+)$')
  if call('ZSCORE', wip_key(gpu), ARGV[i]) then
    call('ZADD', wip_key(gpu), 'XX', score, ARGV[i])
    call('HSET', 'rq:execution:' .. ARGV[i], 'last_heartbeat', now / 1000)
    call('EXPIRE', 'rq:execution:' .. ARGV[i], seconds)
    call('ZADD', 'rq:executions:' .. id, 'XX', score, execution)
    call('EXPIRE', 'rq:executions:' .. id, seconds)
  else
    lost[#lost + 1] = ARGV[i]
  end
end
call('EXPIRE', 'rq:worker:' .. worker .. ':executions', seconds)
local back = {}
for _, composite in ipairs(call('ZRANGEBYSCORE', wip_key(gpu), '-inf', score - math.ceil(2 * lease / 1000))) do
  local id, execution = string.match(composite, '^([^:]+):(.+)$')
  drop_lease(gpu, worker, id, execution)
  local f = call('HMGET', job_key(id), 'status', 'lane')
  if f[1] == 'started' and f[2] then
    unload(gpu, f[2])
    if survives(id, f[2]) then back[#back + 1] = id end
  end
end
put_back(back)
return lost
