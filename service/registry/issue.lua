-- Issues IDs to items that are new: the short way through record.lua, for bulks, of which most are.
--
-- KEYS, ARGV and the beginning of the REPLY: see atomic.lua; behind an item id stand its 8 bytes of digest and its codes,
-- whose lengths are known, with no length before them.
-- ANSWER the suffix; -1 where the item has an assignment already, or its codes no suffix left: nothing is done then.
--
-- Requests of the same codes but for the last should follow each other: what lies in their bucket is read together.

local ITEM = '>Bc0Hc0c8c' .. width
local PARTS = 4 -- of a request: bucket, item id, digest, codes

local function read(requests)
    local parts, number, place, length, unpacked = {}, 0, 1, #requests, struct.unpack
    while place <= length do
        parts[number + 1], parts[number + 2], parts[number + 3], parts[number + 4], place = unpacked(ITEM, requests, place)
        number = number + PARTS
    end
    return parts, number
end

-- Reads the suffixes under the codes of all requests from this one on that lie in the same bucket by the same prefix;
-- returns the place of the next after them.
local function look_ahead(parts, number, place, inner)
    local fields, codes = {}, nil
    while place <= number do
        local next_codes = parts[place]
        if next_codes ~= codes then
            if sub(next_codes, 1, inner_width) ~= inner then
                break
            end
            codes = next_codes
            if not last_suffixes[codes] then
                fields[#fields + 1] = codes
                fields[#fields + 1] = codes .. '0'
            end
        end
        place = place + PARTS
    end
    if #fields > 0 then
        local known = call('HMGET', bucket_under(inner), unpack(fields))
        for i = 1, #fields, 2 do
            last_suffixes[fields[i]] = tonumber(known[i]) or known[i + 1] and 0 or -1
        end
    end
    return place
end

return logged(function(requests, replies)
    local parts, number = read(requests)
    local head, looked = '\0' .. time, 0
    for place = PARTS, number, PARTS do
        local item_id, codes = parts[place - 2], parts[place]
        if place >= looked then
            looked = look_ahead(parts, number, place, sub(codes, 1, inner_width))
        end
        local suffix, id = next_id(codes)
        if suffix and call('HSETNX', forward_buckets .. parts[place - 3], item_id, head .. parts[place - 1] .. id) == 1 then
            issue(codes, suffix, id, item_id)
        else
            suffix = -1
        end
        replies[place / PARTS + 2] = suffix
    end
end)
