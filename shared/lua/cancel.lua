-- Cancels a job wherever it is: waiting, it never runs; running, its worker is told; unknown, it is remembered.
-- KEYS[1] control stream. ARGV[3] entry, [4] id, [5] seconds that an early cancellation is remembered.
-- -> cancelled | stopping | remembered | over | stale
local id = ARGV[4]
if call('XACK', KEYS[1], 'yard', ARGV[3]) == 0 then return 'stale' end
call('XDEL', KEYS[1], ARGV[3])
local f = call('HMGET', job_key(id), 'status', 'lane', 'origin', 'req')
if not f[1] then
  call('SET', P .. 'cancelled:' .. id, 1, 'EX', ARGV[5])
  return 'remembered'
elseif f[1] == 'started' then
  call('HSET', job_key(id), 'cancel', 1)
  call('RPUSH', stops_key(f[3]), 'cancel:' .. id)
  return 'stopping'
elseif not f[4] or (f[1] ~= 'queued' and f[1] ~= 'deferred') then -- an answered job has no request, whatever RQ calls it
  return 'over'
end
if f[1] == 'queued' then
  call('LREM', queue_key(f[3]), 1, id)
  unload(f[3], f[2])
end
finish(id, f[2], 'canceled', {'ev', 'cancelled'})
if f[1] == 'deferred' then refresh_lane(f[2]) end
return 'cancelled'
