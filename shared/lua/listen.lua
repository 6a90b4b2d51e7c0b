-- What a worker must know at each step: how many jobs wait for it, and which of its running ones it must stop.
-- ARGV[3] GPU, [4] worker, [5..] stops that it has obeyed. -> {jobs waiting, 'cancel:ID' | 'expire:ID' ...}, 0 if the
-- GPU has been given to another worker
local gpu = ARGV[3]
if call('HGET', gpu_key(gpu), 'worker') ~= ARGV[4] then return 0 end
for i = 5, #ARGV do call('LREM', stops_key(gpu), 0, ARGV[i]) end
local suspended = call('EXISTS', 'rq:suspended') == 1 -- `rq suspend` stops all workers from taking jobs
return {suspended and 0 or call('LLEN', queue_key(gpu)), unpack(call('LRANGE', stops_key(gpu), 0, 255))}
