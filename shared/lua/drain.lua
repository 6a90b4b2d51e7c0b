-- A worker that will stop takes no more jobs: those queued on its GPU go back to the heads of their lanes.
-- ARGV[3] GPU, [4] worker. -> jobs put back, -1 if the GPU has been given to another worker
local gpu = ARGV[3]
if call('HGET', gpu_key(gpu), 'worker') ~= ARGV[4] then return -1 end
call('HSET', gpu_key(gpu), 'state', 'draining')
local ids = take_queue(gpu)
for _, id in ipairs(ids) do unload(gpu, call('HGET', job_key(id), 'lane')) end
put_back(ids)
return #ids
