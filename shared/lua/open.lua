-- A slot takes a combination: only a live GPU's, only when the jobs of its present one have drained from the GPU queue
-- and the batch, and only if no other slot holds it. A closing slot takes its own combination back at any time.
-- ARGV[3] GPU, [4] slot index, [5] combination. -> 1 | 0
local gpu, slot, combination = ARGV[3], ARGV[4], ARGV[5]
local g = call('HMGET', gpu_key(gpu), 'state', 'slots')
if g[1] ~= 'ready' or tonumber(slot) >= tonumber(g[2]) then return 0 end
local key = slots_key(gpu)
local present = call('HGET', key, slot)
if present ~= combination then
  if present and call('HEXISTS', load_key(gpu), present) == 1 then return 0 end
  if slot_of(gpu, combination) then return 0 end
  if present then call('HINCRBY', gpu_key(gpu), 'swaps', 1) end
end
call('HSET', key, slot, combination, slot .. '.state', 'open', slot .. '.since', now)
return 1
