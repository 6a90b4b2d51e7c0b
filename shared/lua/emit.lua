-- New text of a running job, if the worker still holds its lease.
-- ARGV[3] GPU, [4] id, [5] execution, [6] event fields in pairs, packed by msgpack. -> 1 | 0
if not call('ZSCORE', wip_key(ARGV[3]), ARGV[4] .. ':' .. ARGV[5]) then return 0 end
call('XADD', P .. 'out:' .. ARGV[4], '*', unpack(cmsgpack.unpack(ARGV[6])))
return 1
