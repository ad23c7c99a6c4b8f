-- The titles of items: what callers gave with them to be shown beside their ids. No ID depends on them.
--
-- KEYS   for each item its forward bucket, and the bucket of its title, which lies in the same slot
-- ARGV   "1" to write even where nothing is new, so that a wait behind this call covers what it found; else "0";
--        then for each item its id, and
--        "+" title   its title from now on, as it is about to be claimed; an empty one is none
--        "=" title   the same, where it is live; where it is not, it has none
--        "-"         it has none, unless it is live
-- REPLY  the server's time in seconds
--
-- Whatever crosses, a live item has the title that came with its claim, and a retired one has none: what comes late goes
-- by what the item is by then.

local call = redis.call
local RETIRED = 2
local now = tonumber(call('TIME')[1])
local wrote = false

for i = 1, #KEYS, 2 do
    local forward, titles, item_id, asked = KEYS[i], KEYS[i + 1], ARGV[i + 1], ARGV[i + 2]
    local kind, title = string.sub(asked, 1, 1), string.sub(asked, 2)
    local live = kind == '+'
    if not live then
        local value = call('HGET', forward, item_id)
        live = value and string.byte(value) < RETIRED
    end
    if not live or (title == '' and kind ~= '-') then
        wrote = call('HDEL', titles, item_id) == 1 or wrote
    elseif kind ~= '-' then
        if call('HGET', titles, item_id) ~= title then
            call('HSET', titles, item_id, title)
            wrote = true
        end
    end
end
if ARGV[1] == '1' and not wrote then
    call('HSET', KEYS[2], '', now) -- no item id is empty
    call('HDEL', KEYS[2], '')
end
return { now }
