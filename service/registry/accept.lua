-- Begins a new epoch of a record that came back older: its former histories are cut where it stands now.
--
-- KEYS   meta
-- ARGV   "1" or "0", as every script; the epoch that was compared, empty where there was no record; the new epoch; then
--        epochs of which nothing is known to be there.
-- REPLY  the server's time in seconds, and 1; or 0 where the record has another epoch: then nothing was done.

local meta = KEYS[1]
local now = tonumber(redis.call('TIME')[1])
local known = redis.call('HMGET', meta, 'epoch', 'revision', 'former')
if (known[1] or '') ~= ARGV[2] then
    return { now, 0 }
end
local former = known[3] and { known[3] } or {}
if known[1] then
    former[#former + 1] = known[1] .. '@' .. (known[2] or '0')
end
for i = 4, #ARGV do
    former[#former + 1] = ARGV[i] .. '@0'
end
redis.call('HSET', meta, 'epoch', ARGV[3], 'former', table.concat(former, ' '))
return { now, 1 }
