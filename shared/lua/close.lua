-- A slot stops taking jobs so that it drains: what is queued on the GPU for it goes back to the head of its lanes.
-- ARGV[3] GPU, [4] slot index, [5] the combination it must hold. -> jobs put back, -1 if it holds another
local gpu, slot, combination = ARGV[3], ARGV[4], ARGV[5]
local key = slots_key(gpu)
if call('HGET', key, slot) ~= combination then return -1 end
local back = {}
for _, id in ipairs(call('LRANGE', queue_key(gpu), 0, -1)) do
  local f = call('HMGET', job_key(id), 'status', 'origin', 'lane', 'req')
  if f[1] == 'queued' and f[2] == gpu and f[4] and combination_of(f[3]) == combination then
    call('LREM', queue_key(gpu), 1, id)
    unload(gpu, f[3])
    back[#back + 1] = id
  end
end
call('HSET', key, slot .. '.state', 'closing')
put_back(back)
return #back
