-- On a cluster: a write on a server, so that a wait behind it covers what was read there before.
--
-- KEYS   the server's own key for this
-- REPLY  the server's time

local now = tonumber(redis.call('TIME')[1])
redis.call('SET', KEYS[1], now)
return { now }
