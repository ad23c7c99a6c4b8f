-- Claims and retires a micro-batch of items, atomically: every item its one Semantic ID, the known ones their own.
--
-- KEYS   meta, then for each request its forward bucket. Reverse buckets follow from the codes, which for an item
--        that is retired or reassigned only the record knows.
-- ARGV   "1" to write even where nothing is new, so that a WAITAOF after this script covers what it read; else "0".
--        Where requests follow: reverse buckets of one first code, bytes of packed codes, bytes of one code, the highest
--        suffix, how many changes to keep; the epoch and a revision that the record is known to have reached. Then for
--        each request the item id, and
--        "K" digest codes alternatives   claim, and keep the ID that it holds
--        "R" digest codes alternatives   claim, and reassign where its ID has other codes
--        "D"                             retire
--        Alternatives are codes of the last level, for an item whose own codes have no suffix left, best first.
-- REPLY  the server's time in seconds, the revision after this call or 0 where it changed nothing, then for each request:
--        the suffix (an integer) where an ID was issued now, with the last code (bytes) in a list where it is an
--        alternative; else the assignment (a string) as it stands now; nil where there is none: nothing to retire, no
--        suffix left.
--        The error OLDER where the record has another epoch or is not as far: then nothing was done.

local meta = KEYS[1]
local record = sub(meta, 1, -7) -- sid:{NAME
local buckets, width, code_bytes, max_suffix = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local changes_kept = tonumber(ARGV[6])
local REQUESTS = 9 -- where in ARGV they begin

local now = tonumber(call('TIME')[1])
local time = pack_time(now)

local REASSIGN = 82 -- the letter R
local CONTENT = 9 -- in a request: digest, codes, alternatives begin after the letter
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

-- A live ID with the next suffix of these codes, or nil. Suffix 0 is a field of its own, so the first item of a group
-- costs no counter.
local function issue(codes, item_id)
    local reverse, suffix = reverse_key(codes), 0
    if call('HSETNX', reverse, codes .. '0', item_id) == 0 then
        suffix = call('HINCRBY', reverse, codes, 1)
        if suffix > max_suffix then
            call('HINCRBY', reverse, codes, -1)
            return nil
        end
        call('HSET', reverse, codes .. suffix, item_id)
    end
    count_live(codes, 1)
    note('A', codes .. suffix)
    return suffix
end

local function full(codes)
    local highest = call('HGET', reverse_key(codes), codes)
    return (highest and tonumber(highest) or 0) >= max_suffix and call('HEXISTS', reverse_key(codes), codes .. '0') == 1
end

-- The codes that a request's item may be placed under, best first: its own, then those of other last codes.
local function candidates(request)
    local codes = sub(request, CONTENT + 1, CONTENT + width)
    local found = { codes }
    for first = CONTENT + width + 1, #request, code_bytes do
        found[#found + 1] = sub(codes, 1, -code_bytes - 1) .. sub(request, first, first + code_bytes - 1)
    end
    return found
end

-- Whether an ID has the codes of a request's content, or the best of its alternatives that could be had.
local function fits(id, request)
    for _, codes in ipairs(candidates(request)) do
        if sub(id, 1, width) == codes then
            return true
        elseif not full(codes) then
            return false
        end
    end
    return false
end

local function reply_of(request, codes, suffix)
    if codes == sub(request, CONTENT + 1, CONTENT + width) then
        return suffix
    end
    return { suffix, sub(codes, -code_bytes) }
end

local function digest_of(request)
    return sub(request, 2, CONTENT)
end

local function assign(forward, item_id, request)
    for _, codes in ipairs(candidates(request)) do
        local suffix = issue(codes, item_id)
        if suffix then
            call('HSET', forward, item_id, '\0' .. time .. digest_of(request) .. codes .. suffix)
            return reply_of(request, codes, suffix)
        end
    end
    return nil
end

-- The ID stands whatever the content says; the latest content's digest is kept, and whether its codes differ, so
-- that the same content arriving again is known by its digest alone.
local function with_content(value, request)
    local state = byte(value, 1)
    state = state - state % 2
    if not fits(sub(value, 14), request) then
        state = state + 1
    end
    return char(state) .. sub(value, 2, 5) .. digest_of(request) .. sub(value, 14)
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

-- Another ID for a known item: the one that it held before under these codes, or a new one.
local function reassign(forward, item_id, value, was_live, request)
    local former = call('HGET', forward, DEAD .. item_id) or ''
    for _, codes in ipairs(candidates(request)) do
        local reply
        local suffix, assigned_at, others = find_former(former, codes)
        if suffix then
            returned = true
            set_live(codes .. suffix, item_id)
            reply = '\0' .. assigned_at .. digest_of(request) .. codes .. suffix
        else
            suffix = issue(codes, item_id)
            assigned_at = time
            reply = suffix and reply_of(request, codes, suffix)
        end
        if suffix then
            note('R', sub(value, 14) .. ',' .. codes .. suffix)
            if was_live then
                set_dead(sub(value, 14), item_id)
            end
            call('HSET', forward, item_id, '\0' .. assigned_at .. digest_of(request) .. codes .. suffix)
            call('HSET', forward, DEAD .. item_id, others .. sub(value, 2, 5) .. sub(value, 14) .. ',')
            return reply
        end
    end
    return nil
end

local function claim(forward, item_id, request)
    local stored = call('HGET', forward, item_id)
    if not stored then
        return assign(forward, item_id, request)
    end
    local value, was_live = stored, byte(stored, 1) < RETIRED
    if not was_live then
        value = char(byte(stored, 1) - RETIRED) .. sub(stored, 6)
    end
    if byte(request, 1) == REASSIGN and not fits(sub(value, 14), request) then
        return reassign(forward, item_id, value, was_live, request)
    end
    if not was_live then
        returned = true
        set_live(sub(value, 14), item_id)
    end
    if sub(value, 6, 13) ~= digest_of(request) then
        value = with_content(value, request)
    end
    if value ~= stored then
        call('HSET', forward, item_id, value)
    end
    return value
end

local function retire(forward, item_id)
    local value = call('HGET', forward, item_id)
    if value and byte(value, 1) < RETIRED then
        set_dead(sub(value, 14), item_id)
        note('D', sub(value, 14))
        value = char(byte(value, 1) + RETIRED) .. time .. sub(value, 2)
        call('HSET', forward, item_id, value)
    end
    return value
end

if #KEYS > 1 then
    local known = call('HMGET', meta, 'epoch', 'revision')
    if (known[1] or '') ~= ARGV[7] or tonumber(known[2] or 0) < tonumber(ARGV[8]) then
        return redis.error_reply('OLDER ' .. (known[1] or '') .. ' ' .. (known[2] or 0))
    end
end

local replies = { now, 0 }
for i = 2, #KEYS do
    local item_id, request = ARGV[REQUESTS + 2 * i - 4], ARGV[REQUESTS + 2 * i - 3]
    local answer = request == 'D' and retire or claim
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
