-- Ends the waiting jobs of a lane whose adapters no host holds any more, with the bytes they are bound to.
-- ARGV[3] lane CLASS:COMBINATION, [4] most jobs, [5] sentence for their clients. -> jobs ended, -1 if a host holds them
local lane = ARGV[3]

local function holds(holder)
  for id, digest in string.gmatch(combination_of(lane), '([^+@]+)@(%x+)') do
    local text = call('HGET', held_key(holder), id)
    if not text or string.sub(digest_of(text), 1, #digest) ~= digest then return false end
  end
  return true
end

for _, holder in ipairs(call('HKEYS', P .. 'holders')) do
  if holds(holder) then return -1 end
end
local ended = 0
for _ = 1, tonumber(ARGV[4]) do
  local id = call('LPOP', lane_key(lane))
  if not id then break end
  local f = call('HMGET', job_key(id), 'status', 'lane')
  if f[1] == 'deferred' and f[2] == lane then
    finish_error(id, lane, 'no_adapter', ARGV[5])
    ended = ended + 1
  end
end
refresh_lane(lane)
return ended
