-- What the scripts share that change a record in one call, atomically; sent between lib.lua and the script itself.
--
-- KEYS   meta, then for each request its forward bucket. Reverse buckets follow from the codes, which for an item
--        that is known only the record knows.
-- ARGV   "1" to write even where nothing is new, so that a WAITAOF after this script covers what it read; else "0".
--        Where requests follow: reverse buckets of one first code, bytes of packed codes, bytes of one code, the highest
--        suffix, how many changes to keep; the epoch and a revision that the record is known to have reached. Then for
--        each request the item id, and what is asked.
-- REPLY  the server's time in seconds, the revision after this call (0 where no epoch was given), then for each request
--        its answer. The error OLDER where the record has another epoch or is not as far: then nothing was done.

local meta = KEYS[1]
local record = sub(meta, 1, -7) -- sid:{NAME
local buckets, width, code_bytes, max_suffix = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local changes_kept = tonumber(ARGV[6])
local REQUESTS = 9 -- where in ARGV they begin

local now = tonumber(call('TIME')[1])
local time = pack_time(now)

local count = 0
local changes = {}
local returned = false

-- The buckets of the IDs that begin like these codes.
local function partition(codes)
    if width == code_bytes then
        return record .. ':r:}:'
    end
    local code = byte(codes, 1)
    if code_bytes == 2 then
        code = code * 256 + byte(codes, 2)
    end
    return record .. ':r:' .. code .. '}:'
end

-- Of codes, or of an ID, which begins with its codes.
local function reverse_key(codes)
    return partition(codes) .. extend(0, codes, 1, width - code_bytes) % buckets
end

local live_counts, live_keys = {}, {} -- by packed prefix: how much its count changes, and where it lies

-- Counts are put together first: all items of a call share the same few codes of the first level.
local function count_live(codes, change)
    count = count + change
    local hash, key = 0, record .. '}:root'
    for last = code_bytes, width - code_bytes, code_bytes do
        local inner = sub(codes, 1, last)
        local counted = live_counts[inner]
        if not counted then
            counted = 0
            live_keys[inner] = key or partition(codes) .. hash % buckets
        end
        live_counts[inner] = counted + change
        hash = extend(hash, codes, last - code_bytes + 1, last)
        key = nil
    end
end

local function write_live_counts()
    for inner, change in pairs(live_counts) do
        if change ~= 0 and call('HINCRBY', live_keys[inner], inner, change) == 0 then
            call('HDEL', live_keys[inner], inner)
        end
    end
end

local function note(change, id)
    changes[#changes + 1] = change .. id .. ','
end

-- An ID enters the listings, or leaves them; what it names stays.
local function set_live(id, item_id)
    call('HSET', reverse_key(id), id, item_id)
    count_live(id, 1)
    note('B', id)
end

local function set_dead(id, item_id)
    call('HSET', reverse_key(id), id, DEAD .. item_id)
    count_live(id, -1)
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

-- Answers each request, and logs what changed.
local function run(answer)
    local known = {}
    if #KEYS > 1 or (ARGV[7] or '') ~= '' then
        known = call('HMGET', meta, 'epoch', 'revision')
        if (known[1] or '') ~= ARGV[7] or tonumber(known[2] or 0) < tonumber(ARGV[8]) then
            return redis.error_reply('OLDER ' .. (known[1] or '') .. ' ' .. (known[2] or 0))
        end
    end
    local replies = { now, tonumber(known[2] or 0) }
    for i = 2, #KEYS do
        local item_id, request = ARGV[REQUESTS + 2 * i - 4], ARGV[REQUESTS + 2 * i - 3]
        replies[i + 1] = answer(KEYS[i], item_id, request) or false
    end
    if #changes > 0 then
        local revision = call('HINCRBY', meta, 'revision', #changes)
        local oldest = string.format('%d', math.max(revision - changes_kept, 0))
        call('XADD', record .. '}:c', 'MINID', '~', oldest, string.format('%d-0', revision), 'c', table.concat(changes))
        call('HINCRBY', meta, 'count', count)
        write_live_counts()
        if returned then
            call('HSET', meta, 'returned', now)
        end
        replies[2] = revision
    elseif ARGV[1] == '1' then
        call('HSET', meta, 'synced', now)
    end
    return replies
end
