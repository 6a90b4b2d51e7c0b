-- The heartbeat of a worker: its GPU, itself and every lease.
-- ARGV[3] GPU, [4] worker, [5] lease in ms, [6] seconds that RQ's record of the worker lives, [7..] ID:EXECUTION of each
-- running job. -> the ID:EXECUTION whose lease is lost; 0 if the GPU has been given to another worker
local gpu, worker, lease = ARGV[3], ARGV[4], tonumber(ARGV[5])
if call('HGET', gpu_key(gpu), 'worker') ~= worker then return 0 end
local score, seconds, lost = math.floor((now + lease) / 1000), math.ceil(lease / 1000), {}
call('HSET', gpu_key(gpu), 'beat_ms', now)
call('HSET', 'rq:worker:' .. worker, 'last_heartbeat', utc(now))
call('EXPIRE', 'rq:worker:' .. worker, ARGV[6])
for i = 7, #ARGV do
  local id, execution = string.match(ARGV[i], '^([^:]+):(.+)$')
  if call('ZSCORE', wip_key(gpu), ARGV[i]) then
    call('ZADD', wip_key(gpu), 'XX', score, ARGV[i])
    call('HSET', 'rq:execution:' .. ARGV[i], 'last_heartbeat', now / 1000)
    call('EXPIRE', 'rq:execution:' .. ARGV[i], seconds + 60)
    call('ZADD', 'rq:executions:' .. id, 'XX', score + 60, execution)
    call('EXPIRE', 'rq:executions:' .. id, seconds + 60)
  else
    lost[#lost + 1] = ARGV[i]
  end
end
call('EXPIRE', 'rq:worker:' .. worker .. ':executions', seconds + 60)
return lost
