-- The truth about a yard in one answer, for the tests: what is queued, running, waiting and answered.
-- ARGV[1] prefix, [2..] job ids. -> JSON
local P = ARGV[1]
local function pairs_of(key)
  local object, flat = {none = true}, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do object[flat[i]] = flat[i + 1] end
  return object
end
local function rows(ids)
  local found = {}
  for i, id in ipairs(ids) do
    local f = redis.call('HMGET', 'rq:job:' .. string.match(id, '^[^:]+'), 'status', 'origin', 'lane')
    found[i] = {string.match(id, '^[^:]+'), f[1] or '', f[2] or '', f[3] or ''}
  end
  return found
end
local gpus, lanes, jobs = {none = true}, {none = true}, {none = true}
for _, gpu in ipairs(redis.call('SMEMBERS', P .. 'gpus')) do
  gpus[gpu] = {
    said = pairs_of(P .. 'gpu:' .. gpu), slots = pairs_of(P .. 'slots:' .. gpu), load = pairs_of(P .. 'load:' .. gpu),
    queued = rows(redis.call('LRANGE', 'rq:queue:' .. gpu, 0, -1)), running = rows(redis.call('ZRANGE', 'rq:wip:' .. gpu, 0, -1)),
  }
end
for _, lane in ipairs(redis.call('ZRANGE', P .. 'lanes', 0, -1)) do
  lanes[lane] = redis.call('LRANGE', P .. 'lane:' .. lane, 0, -1)
end
for i = 2, #ARGV do
  local finals = 0
  for _, entry in ipairs(redis.call('XRANGE', P .. 'out:' .. ARGV[i], '-', '+')) do
    local ev = entry[2][2]
    if ev == 'done' or ev == 'error' or ev == 'cancelled' then finals = finals + 1 end
  end
  local f = redis.call('HMGET', 'rq:job:' .. ARGV[i], 'status', 'lane', 'origin')
  jobs[ARGV[i]] = {f[1] or '', f[2] or '', f[3] or '', finals}
end
return cjson.encode({gpus = gpus, lanes = lanes, jobs = jobs, depth = pairs_of(P .. 'depth')})
