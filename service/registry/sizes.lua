-- How many suffixes have been issued to each of many codes, in one call; it writes nothing.
--
-- KEYS   for each codes their reverse bucket
-- ARGV   for each the packed codes
-- REPLY  for each a number

local sizes = {}
for i = 1, #KEYS do
    local known = redis.call('HMGET', KEYS[i], ARGV[i], ARGV[i] .. '0')
    sizes[i] = known[1] and known[1] + 1 or known[2] and 1 or 0
end
return sizes
