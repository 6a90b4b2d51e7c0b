-- What the workers of a supervisor hold, and the hash of all adapters, which follows: for each id what most holders have,
-- of equally many what the first by name among them has.
-- ARGV[3] holder, [4] ms of silence after which another holder is forgotten, 0: never, [5..] changes in pairs: id, its
-- JSON or '' if it is gone. -> number of ids that changed
local name, silent = ARGV[3], tonumber(ARGV[4])
local holders, touched = P .. 'holders', {}
local said = call('HGET', holders, name) or ''
local version = tonumber(string.match(said, ':(%d+)$') or 0)
for i = 5, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    call('HDEL', held_key(name), ARGV[i])
  else
    call('HSET', held_key(name), ARGV[i], ARGV[i + 1])
  end
  touched[#touched + 1] = ARGV[i]
end
if #touched > 0 then version = math.max(version + 1, now) end
call('HSET', holders, name, string.format('%d:%d', now, version))

local names = call('HKEYS', holders)
table.sort(names)
for i = #names, 1, -1 do
  local beat = tonumber(string.match(call('HGET', holders, names[i]), '^%d+') or 0)
  if silent > 0 and now - beat >= silent then
    for _, id in ipairs(call('HKEYS', held_key(names[i]))) do touched[#touched + 1] = id end
    call('DEL', held_key(names[i]))
    call('HDEL', holders, names[i])
    table.remove(names, i)
  end
end

for _, id in ipairs(touched) do
  local votes, best, most = {}, nil, 0
  local found = {}
  for _, holder in ipairs(names) do
    local text = call('HGET', held_key(holder), id)
    if text then
      local digest = digest_of(text)
      found[#found + 1] = {digest, text}
      votes[digest] = (votes[digest] or 0) + 1
    end
  end
  for _, one in ipairs(found) do
    if votes[one[1]] > most then best, most = one[2], votes[one[1]] end
  end
  if best then call('HSET', P .. 'adapters', id, best) else call('HDEL', P .. 'adapters', id) end
end
return #touched
