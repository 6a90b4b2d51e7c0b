-- The jobs of a worker that is known to be dead, or silent for longer than its lease, go back to the lanes.
-- ARGV[3] GPU, [4] worker or '' if none is registered, [5] ms of silence that prove it dead; 0: the caller knows. -> jobs put back, -1 if not its
local gpu, worker = ARGV[3], ARGV[4]
local present = call('HMGET', gpu_key(gpu), 'worker', 'beat_ms')
if (present[1] or '') ~= worker or now - (tonumber(present[2] or 0) or 0) < tonumber(ARGV[5]) then return -1 end
return reclaim(gpu, worker)
