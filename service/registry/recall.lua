-- What many items hold, in one call; it writes nothing.
--
-- KEYS   for each item its forward bucket
-- ARGV   for each item its id
-- REPLY  for each item its assignment and the IDs it held before, nil where there is none

local found = {}
for i = 1, #KEYS do
    local values = redis.call('HMGET', KEYS[i], ARGV[i], '\255' .. ARGV[i])
    found[2 * i - 1], found[2 * i] = values[1], values[2]
end
return found
