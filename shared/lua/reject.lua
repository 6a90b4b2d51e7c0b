-- A stream entry that is refused: an error event for its client, if the id is new, and an entry in yard:dead.
-- KEYS[1] intake stream. ARGV[3] entry, [4] id or '' if it is malformed, [5] fingerprint, [6] code, [7] sentence,
-- [8] reply, [9] batch, [10] ttl.
-- -> rejected | duplicate | stale
local stream, entry, id = KEYS[1], ARGV[3], ARGV[4]
if call('XACK', stream, 'yard', entry) == 0 then return 'stale' end

local function reject()
  if id ~= '' then
    local known = call('HMGET', job_key(id), 'fp', 'code')
    if known[1] == ARGV[5] and known[2] ~= 'busy' then return 'duplicate' end
    if not known[1] or known[2] == 'busy' then
      call('DEL', job_key(id), P .. 'out:' .. id, P .. 'reply:' .. id, P .. 'cancelled:' .. id)
      call('HSET', job_key(id), 'fp', ARGV[5], 'reply', ARGV[8], 'batch', ARGV[9], 'keep', ARGV[10],
        'origin', 'lanes', 'created_at', utc(now))
      answer(id, 'failed', {'ev', 'error', 'code', ARGV[6], 'error', ARGV[7]})
    end
  end
  bury(stream, entry, ARGV[6], ARGV[7])
  return 'rejected'
end

local outcome = reject()
call('XDEL', stream, entry)
return outcome
