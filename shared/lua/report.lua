-- What a worker has to tell at each step, and what it must know. Each event is written only if the job's lease is still
-- held: the others run elsewhere or have ended.
-- ARGV[3] GPU, [4] worker, [5] rows {id, execution, status, event fields in pairs} packed by msgpack, where the status is
-- '' for new text, and finished | failed | canceled for the final event, [6..] stops that it has obeyed.
-- -> {jobs waiting, {1 or 0 (lease lost) for each row}, {'cancel:ID' | 'expire:ID' ...}}, 0 if the GPU has been given to
-- another worker
local gpu, worker = ARGV[3], ARGV[4]
local wip = wip_key(gpu)
-- What all rows together change is counted, and changed once: a call costs more than most commands do.
local counters, lanes, composites, records = {}, {}, {}, {}
local function count(counts, key) counts[key] = (counts[key] or 0) + 1 end

local function emit(id, execution, event)
  if not call('ZSCORE', wip, id .. ':' .. execution) then return 0 end
  tell('XADD', P .. 'out:' .. id, '*', unpack(event))
  return 1
end

local function settle(id, execution, status, event)
  local composite = id .. ':' .. execution
  if call('ZREM', wip, composite) == 0 then return 0 end
  call('ZREM', 'rq:executions:' .. id, execution)
  composites[#composites + 1], records[#records + 1] = composite, 'rq:execution:' .. composite
  local f = call('HMGET', job_key(id), 'lane', 'req')
  if not f[2] then return 0 end
  count(lanes, f[1])
  answer(id, status, event)
  if event[2] == 'error' and event[4] ~= 'internal' and event[4] ~= 'expired' then -- bad input, found late
    call('XADD', P .. 'dead', 'MAXLEN', '~', 100000, '*', 'entry', '', 'code', event[4], 'error', event[6], 'id', id)
  end
  count(counters, status == 'finished' and 'successful_job_count' or 'failed_job_count')
  return 1
end

local taken = {}
for i, row in ipairs(cmsgpack.unpack(ARGV[5])) do
  local id, execution, status, event = unpack(row)
  if status == '' then taken[i] = emit(id, execution, event) else taken[i] = settle(id, execution, status, event) end
end
for from = 1, #composites, 1000 do -- Lua passes no more than some thousand values
  local to = math.min(from + 999, #composites)
  call('DEL', unpack(records, from, to))
  call('SREM', 'rq:worker:' .. worker .. ':executions', unpack(composites, from, to))
end
for lane, jobs in pairs(lanes) do
  call('HINCRBY', P .. 'depth', class_of(lane), -jobs)
  unload(gpu, lane, jobs)
end
for counter, jobs in pairs(counters) do call('HINCRBY', 'rq:worker:' .. worker, counter, jobs) end
if call('HGET', gpu_key(gpu), 'worker') ~= worker then return 0 end
for i = 6, #ARGV do call('LREM', stops_key(gpu), 0, ARGV[i]) end
local suspended = call('EXISTS', 'rq:suspended') == 1 -- `rq suspend` stops all workers from taking jobs
return {suspended and 0 or call('LLEN', queue_key(gpu)), taken, call('LRANGE', stops_key(gpu), 0, 255)}
