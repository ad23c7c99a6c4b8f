-- What stands for many items, in one call; it writes nothing.
--
-- KEYS   for each field its forward bucket
-- ARGV   for each its name: an item id, or FF item id
-- REPLY  for each what stands there, nil where there is nothing

local found = {}
for i = 1, #KEYS do
    found[i] = redis.call('HGET', KEYS[i], ARGV[i])
end
return found
