-- Issues IDs to items that are new: the short way through record.lua, for bulks, of which most are.
--
-- KEYS, ARGV and the beginning of the REPLY: see atomic.lua; behind an item id stand its 8 bytes of digest and its codes,
-- whose lengths are known, with no length before them.
-- ANSWER the suffix; -1 where the item has an assignment already, or its codes no suffix left: nothing is done then.
--
-- Items of equal prefixes should follow each other: what lies in their node is read together, and written together.

local ITEM = '>Bc0Hc0c8c' .. width
local PARTS = 4 -- of an item: forward bucket, item id, digest, codes

local parts, replies = {}, nil
local head = '\0' .. time

local function read_items(requests)
    local number, place, length, unpacked = 0, 1, #requests, struct.unpack
    local bucket, item_id, digest, codes
    while place <= length do
        bucket, item_id, digest, codes, place = unpacked(ITEM, requests, place)
        parts[number + 1], parts[number + 2], parts[number + 3] = forward_buckets .. bucket, item_id, digest
        parts[number + 4] = codes
        number = number + PARTS
    end
    return number
end

local function keep_last(codes, counter_there, first_there)
    local last = counter_there and tonumber(counter_there) or first_there and 0 or -1
    local known = last_suffixes[codes]
    if not known or last > known then
        last_suffixes[codes] = last
    end
end

-- The node at this prefix; the highest suffixes that the codes of these items have there are kept.
local function read_run(first, last, prefix, above)
    local codes = parts[first]
    local tail = sub(codes, tail_at)
    if first == last then
        local node, counter_there, first_there = read_node(prefix, above, tail)
        keep_last(codes, counter_there, first_there)
        return node
    end
    local node = nodes[prefix]
    if not node then
        local key, node_head = bucket_of(prefix), head_of(prefix)
        local value = call('HGET', key, node_head .. sub(prefix, tail_at))
        node = know_node(prefix, above, key, node_head, value)
        if not value and #prefix < inner_width then -- then nothing was placed here
            for i = first, last, PARTS do
                last_suffixes[parts[i]] = last_suffixes[parts[i]] or -1
            end
            return node
        end
    end
    local fields, distinct, before = {}, {}, nil
    for i = first, last, PARTS do
        codes = parts[i]
        if codes ~= before then
            local field = node.head .. sub(codes, tail_at)
            fields[#fields + 1], fields[#fields + 2] = field, field .. '0'
            distinct[#distinct + 1] = codes
            before = codes
        end
    end
    local known = call('HMGET', node.key, unpack(fields))
    for i = 1, #distinct do
        keep_last(distinct[i], known[2 * i - 1], known[2 * i])
    end
    return node
end

-- The last of the items from one on whose codes begin with this prefix.
local function last_with(prefix, first, last)
    local length = #prefix
    while first < last and sub(parts[first + PARTS], 1, length) == prefix do
        first = first + PARTS
    end
    return first
end

-- Issues to items by the places of their codes, all of one prefix; those that its node has no room for, to the nodes under it.
local function issue_run(first, last, prefix, above)
    local node = read_run(first, last, prefix, above)
    local issued, i = 0, first
    while i <= last and has_room(node) do
        local codes, item_id = parts[i], parts[i - 2]
        local suffix = last_suffixes[codes] + 1
        local written = suffix == 0 and '0' or tostring(suffix)
        -- An item that stands twice was given its ID by now.
        if
            suffix <= max_suffix
            and call('HSETNX', parts[i - 3], item_id, head .. parts[i - 1] .. codes .. written) == 1
        then
            place(node, codes, suffix, item_id)
            note('A', codes, written)
            issued = issued + 1
        else
            suffix = -1
        end
        replies[2 + i / PARTS] = suffix
        i = i + PARTS
    end
    if issued > 0 then
        count_live(node, issued)
    end
    while i <= last do
        local below = sub(parts[i], 1, #prefix + code_bytes)
        local until_there = last_with(below, i, last)
        issue_run(i, until_there, below, node)
        i = until_there + PARTS
    end
end

return logged(function(requests, answers)
    replies = answers
    local number, first = read_items(requests), PARTS
    while first <= number do
        local prefix = sub(parts[first], 1, top_width)
        local last = last_with(prefix, first, number)
        issue_run(first, last, prefix, nil)
        first = last + PARTS
    end
end)
