-- A worker takes a GPU. What a dead predecessor held goes back to the lanes first.
-- ARGV[3] GPU, [4] worker, [5] ms after which a silent worker counts as dead, [6..] fields of yard:gpu:GPU in pairs.
-- -> {1, jobs put back} | {0, name of the live worker that has it}
local gpu, worker = ARGV[3], ARGV[4]
local present = call('HMGET', gpu_key(gpu), 'worker', 'beat_ms')
local back = 0
if present[1] and present[1] ~= worker then
  if now - (tonumber(present[2] or 0) or 0) < tonumber(ARGV[5]) then return {0, present[1]} end
  back = reclaim(gpu, present[1])
elseif not present[1] then
  back = reclaim(gpu, worker)
end
call('SADD', P .. 'gpus', gpu)
call('SADD', 'rq:queues', queue_key(gpu))
call('HSET', gpu_key(gpu), 'worker', worker, 'beat_ms', now, 'swaps', 0, unpack(ARGV, 6))
return {1, back}
