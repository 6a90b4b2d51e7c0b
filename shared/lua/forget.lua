-- Answered jobs are forgotten before their ttl, because their client has what it needs: their ids are free again.
-- KEYS[1] control stream. ARGV[3] entry, [4..] ids. A job that has no answer yet stays. -> number forgotten, or stale
if call('XACK', KEYS[1], 'yard', ARGV[3]) == 0 then return 'stale' end
call('XDEL', KEYS[1], ARGV[3])
local forgotten = 0
for i = 4, #ARGV do
  local id = ARGV[i]
  local f = call('HMGET', job_key(id), 'status', 'gpu', 'req')
  if f[1] and not f[3] then
    call('UNLINK', job_key(id), P .. 'out:' .. id, P .. 'reply:' .. id)
    if f[2] then call('ZREM', 'rq:' .. f[1] .. ':' .. f[2], id) end
    forgotten = forgotten + 1
  end
end
return tostring(forgotten)
