-- A worker that stops gives back what it holds, running and queued, and leaves the GPU. Nothing counts as a death.
-- ARGV[3] GPU, [4] worker. -> jobs put back, -1 if the GPU has been given to another worker
local gpu, worker = ARGV[3], ARGV[4]
if call('HGET', gpu_key(gpu), 'worker') ~= worker then return -1 end
local back = {}
for _, composite in ipairs(call('ZRANGE', wip_key(gpu), 0, -1)) do
  local id, execution = string.match(composite, '^([^:]+):(.+)$')
  drop_lease(gpu, worker, id, execution)
  local f = call('HMGET', job_key(id), 'status', 'lane')
  if f[1] == 'started' and f[2] and survives(id, f[2]) then back[#back + 1] = id end
end
for _, id in ipairs(take_queue(gpu)) do back[#back + 1] = id end
put_back(back)
reclaim(gpu, worker)
return #back
