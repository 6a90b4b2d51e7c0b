-- The end of a running job, if the worker still holds its lease and the job has not ended otherwise.
-- ARGV[3] GPU, [4] worker, [5] id, [6] execution, [7] status finished | failed | canceled, [8] event fields in pairs,
-- packed by msgpack.
-- -> 1 | 0
local gpu, worker, id = ARGV[3], ARGV[4], ARGV[5]
if not drop_lease(gpu, worker, id, ARGV[6]) then return 0 end
local f = call('HMGET', job_key(id), 'lane', 'req')
if not f[2] then return 0 end
unload(gpu, f[1])
local event = cmsgpack.unpack(ARGV[8])
finish(id, f[1], ARGV[7], event)
if event[2] == 'error' and event[4] ~= 'internal' and event[4] ~= 'expired' then -- bad input, found late
  call('XADD', P .. 'dead', 'MAXLEN', '~', 100000, '*', 'entry', '', 'code', event[4], 'error', event[6], 'id', id)
end
call('HINCRBY', 'rq:worker:' .. worker, ARGV[7] == 'finished' and 'successful_job_count' or 'failed_job_count', 1)
return 1
