-- What the scripts share that change a record in one call, atomically; sent between nodes.lua and the script itself.
--
-- KEYS   meta. The buckets follow from the requests, and for an item that is known from what only the record knows.
-- ARGV   "1" to write even where nothing is new, so that a WAITAOF after this script covers what it read; else "0".
--        Where requests follow: reverse buckets of one first code, bytes of packed codes, bytes of one code, the highest
--        suffix, how many changes to keep; the epoch and a revision that the record is known to have reached. Then all
--        requests as one string, see `RecordKeys.requests`: for each the number of its forward bucket in decimal, the
--        item id and what is asked, behind their lengths of 1, 2 and 4 bytes.
-- REPLY  the server's time in seconds, the revision after this call (0 where no epoch was given), then for each request
--        its answer. The error OLDER where the record has another epoch or is not as far: then nothing was done.
--
-- A call of the server from here costs as much as all else that an item needs, and a write the most. So the fields of a
-- node that follow each other are written together, and counts once a call.

local REQUEST = '>Bc0Hc0Ic0'

local meta = KEYS[1]
local record = sub(meta, 1, -7) -- sid:{NAME
local forward_buckets = 'sid:' .. sub(meta, 6, -7) .. ':f:'
local root = record .. '}:root'
local max_suffix, changes_kept = tonumber(ARGV[5]), tonumber(ARGV[6])
local buckets, bytes_of_one = tonumber(ARGV[2]), tonumber(ARGV[4])
lay_out(tonumber(ARGV[3]), bytes_of_one, hashed_buckets(record, buckets, bytes_of_one, ARGV[3] ~= ARGV[4]))

local now = tonumber(call('TIME')[1])
local time = pack_time(now)

local count = 0
local changes, changed = {}, 0
local returned = false

local first_counts = {} -- by first code: how much the count of live IDs changes

local function count_live(node, change)
    count = count + change
    add_live(node, change)
    if tail_at > 1 then
        local first = sub(node.prefix, 1, code_bytes)
        first_counts[first] = (first_counts[first] or 0) + change
    end
end

local function write_first_counts()
    local prefixes = {}
    for prefix, change in pairs(first_counts) do
        if change ~= 0 then
            prefixes[#prefixes + 1] = prefix
        end
    end
    if #prefixes == 0 then
        return
    elseif #prefixes == 1 then
        local first = prefixes[1]
        if call('HINCRBY', root, first, first_counts[first]) == 0 then
            call('HDEL', root, first)
        end
        return
    end
    local known, fields, gone = call('HMGET', root, unpack(prefixes)), {}, {}
    for i, prefix in ipairs(prefixes) do
        local number = (tonumber(known[i]) or 0) + first_counts[prefix]
        if number == 0 then
            gone[#gone + 1] = prefix
        else
            fields[#fields + 1] = prefix
            fields[#fields + 1] = number
        end
    end
    if #fields > 0 then
        call('HSET', root, unpack(fields))
    end
    if #gone > 0 then
        call('HDEL', root, unpack(gone))
    end
end

local function note(kind, codes, suffix)
    local place = 4 * changed
    changes[place + 1], changes[place + 2], changes[place + 3], changes[place + 4] = kind, codes, suffix, ','
    changed = changed + 1
end

-- The next suffix of these codes, or nil; not known as issued before `issue`.
local function next_suffix(codes)
    local _, last = look_up(codes)
    if last < max_suffix then
        return last + 1
    end
    return nil
end

-- The next ID of these codes goes live.
local function issue(codes, suffix, item_id)
    local node = look_up(codes)
    place(node, codes, suffix, item_id)
    count_live(node, 1)
    note('A', codes, suffix)
end

-- An ID enters the listings, or leaves them; what it names stays.
local function set_live(id, item_id)
    local node = seek(id)
    set_holder(node, id, item_id)
    count_live(node, 1)
    note('B', id, '')
end

local function set_dead(id, item_id)
    local node = seek(id)
    set_holder(node, id, DEAD .. item_id)
    count_live(node, -1)
end

-- Among the IDs an item held before, the one with these codes, when it was assigned, and the list without it.
local function find_former(former, codes)
    local start = 1
    while start <= #former do
        local comma = string.find(former, ',', start + 4 + width, true)
        if sub(former, start + 4, start + 3 + width) == codes then
            local suffix = sub(former, start + 4 + width, comma - 1)
            return suffix, sub(former, start, start + 3), sub(former, 1, start - 1) .. sub(former, comma + 1)
        end
        start = comma + 1
    end
    return nil, nil, former
end

-- Runs a body that makes the replies to the requests, and logs what changed.
local function logged(body)
    local known, requests = {}, ARGV[9] or ''
    if requests ~= '' or (ARGV[7] or '') ~= '' then
        known = call('HMGET', meta, 'epoch', 'revision', 'count')
        if (known[1] or '') ~= ARGV[7] or tonumber(known[2] or 0) < tonumber(ARGV[8]) then
            return redis.error_reply('OLDER ' .. (known[1] or '') .. ' ' .. (known[2] or 0))
        end
    end
    local replies = { now, tonumber(known[2] or 0) }
    body(requests, replies)
    if changed > 0 then
        local revision = replies[2] + changed
        local oldest = string.format('%d', math.max(revision - changes_kept, 0))
        call('XADD', record .. '}:c', 'MINID', '~', oldest, string.format('%d-0', revision), 'c', table.concat(changes))
        call('HSET', meta, 'revision', revision, 'count', tonumber(known[3] or 0) + count)
        write_nodes()
        write_first_counts()
        if returned then
            call('HSET', meta, 'returned', now)
        end
        replies[2] = revision
    elseif ARGV[1] == '1' then
        call('HSET', meta, 'synced', now)
    end
    return replies
end

-- Answers each request.
local function run(answer)
    return logged(function(requests, replies)
        local place, length, unpacked = 1, #requests, struct.unpack
        local bucket, item_id, request
        while place <= length do
            bucket, item_id, request, place = unpacked(REQUEST, requests, place)
            replies[#replies + 1] = answer(forward_buckets .. bucket, item_id, request) or false
        end
    end)
end
