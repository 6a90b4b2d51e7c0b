-- Moves jobs from a lane to the queue of a GPU whose slot for them is open, up to its window.
-- ARGV[3] lane CLASS:COMBINATION, [4] GPU, [5] most jobs. -> number moved
local lane, gpu = ARGV[3], ARGV[4]
local free = math.min(tonumber(ARGV[5]), room(gpu, combination_of(lane)))
local ids = {}
while #ids < free do
  local id = call('LPOP', lane_key(lane))
  if not id then break end
  local f = call('HMGET', job_key(id), 'status', 'lane')
  if f[1] == 'deferred' and f[2] == lane then
    queue_on(gpu, id, lane)
    ids[#ids + 1] = id
  end
end
if class_of(lane) == 'urgent' then
  for i = #ids, 1, -1 do call('LPUSH', queue_key(gpu), ids[i]) end
else
  for _, id in ipairs(ids) do call('RPUSH', queue_key(gpu), id) end
end
refresh_lane(lane)
return #ids
