-- Issues IDs to items that are new: the short way through record.lua, for bulks, of which most are.
--
-- KEYS, ARGV and the beginning of the REPLY: see atomic.lua; behind an item id stand its 8 bytes of digest and its codes,
-- whose lengths are known, with no length before them.
-- ANSWER the suffix; -1 where the item has an assignment already, or its codes no suffix left: nothing is done then.
--
-- Items of the same codes but for the last should follow each other, and those of the same codes among them: what lies in
-- their bucket is read together, and written together.

local ITEM = '>Bc0Hc0c8c' .. width
local PARTS = 5 -- of an item: forward bucket, item id, digest, its place among the replies, codes

-- The parts of the items that are new, one after the other; the others are answered.
local function new_items(requests, replies)
    local parts, number, reply, place, length, unpacked = {}, 0, 2, 1, #requests, struct.unpack
    local bucket, item_id, digest, codes, forward
    while place <= length do
        bucket, item_id, digest, codes, place = unpacked(ITEM, requests, place)
        forward, reply = forward_buckets .. bucket, reply + 1
        if call('HEXISTS', forward, item_id) == 1 then
            replies[reply] = -1
        else
            parts[number + 1], parts[number + 2], parts[number + 3] = forward, item_id, digest
            parts[number + 4], parts[number + 5] = reply, codes
            number = number + PARTS
        end
    end
    return parts, number
end

-- The highest suffixes, by codes, of the items from a place on that have the same codes but for the last; and the place of
-- the next after them.
local function look_ahead(parts, number, place, inner, key)
    local codes = parts[place]
    place = place + PARTS
    while parts[place] == codes do
        place = place + PARTS
    end
    local lasts = {}
    if place > number or sub(parts[place], 1, inner_width) ~= inner then
        local known = call('HMGET', key, codes, codes .. '0')
        lasts[codes] = tonumber(known[1]) or known[2] and 0 or -1
        return lasts, place
    end
    local fields = { codes, codes .. '0' }
    while place <= number and sub(parts[place], 1, inner_width) == inner do
        if parts[place] ~= codes then
            codes = parts[place]
            fields[#fields + 1] = codes
            fields[#fields + 1] = codes .. '0'
        end
        place = place + PARTS
    end
    local known = call('HMGET', key, unpack(fields))
    for i = 1, #fields, 2 do
        lasts[fields[i]] = tonumber(known[i]) or known[i + 1] and 0 or -1
    end
    return lasts, place
end

return logged(function(requests, replies)
    local parts, number = new_items(requests, replies)
    local head, place = '\0' .. time, PARTS
    while place <= number do
        write_open() -- what is read next may lie there
        local inner = sub(parts[place], 1, inner_width)
        local key, issued = bucket_under(inner), 0
        local lasts, after = look_ahead(parts, number, place, inner, key)
        for i = place, after - PARTS, PARTS do
            local item_id, codes = parts[i - 3], parts[i]
            local suffix = lasts[codes] + 1
            local id = codes .. (suffix == 0 and '0' or suffix)
            -- An item that stands twice was given its ID by now.
            if suffix <= max_suffix and call('HSETNX', parts[i - 4], item_id, head .. parts[i - 2] .. id) == 1 then
                lasts[codes] = suffix
                issued = issued + 1
                enter_id(key, codes, suffix, id, item_id)
            else
                suffix = -1
            end
            replies[parts[i - 1]] = suffix
        end
        if issued > 0 then
            count_live_under(inner, issued)
        end
        place = after
    end
end)
