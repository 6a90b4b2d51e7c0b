-- Ends the jobs whose deadline has passed: waiting ones at once, running ones through their worker.
-- ARGV[3] most jobs. -> number of deadlines that were due
local due = call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', now, 'LIMIT', 0, ARGV[3])
for _, id in ipairs(due) do
  call('ZREM', P .. 'deadlines', id)
  local f = call('HMGET', job_key(id), 'status', 'lane', 'origin')
  if f[1] == 'started' then
    call('RPUSH', stops_key(f[3]), 'expire:' .. id)
  elseif f[1] == 'queued' or f[1] == 'deferred' then
    if f[1] == 'queued' then
      call('LREM', queue_key(f[3]), 1, id)
      unload(f[3], f[2])
    end
    finish_error(id, f[2], 'expired', 'the deadline passed while the job was waiting')
    if f[1] == 'deferred' then refresh_lane(f[2]) end
  end
end
return #due
