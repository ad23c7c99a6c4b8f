-- Claims and retires a micro-batch of items, atomically: every item its one Semantic ID, the known ones their own.
--
-- KEY SCHEMA (schema 2). All keys of one record start with  sid:{namespace}:{fingerprint}:  (written without the
-- braces, which on a cluster would be a hash tag and put a whole catalogue on one slot). All numbers big-endian.
-- An ID is: packed codes, of a fixed width, then the suffix in decimal (small decimal values are kept as integers).
--
--   ...:meta          hash    schema          "2"
--                             buckets         number of buckets, a fact of the record from its first use
--                             codebook_sizes  "256,256,256,256"
--                             count           number of live assignments
--                             revision        number of changes so far: each assignment, retirement, return and
--                                             replacement is one
--                             returned        when an ID last came back as it was, so that no time of its own tells
--                             synced          time of the last barrier (see ARGV[1])
--   ...:f:<bucket>    hash    forward; bucket = crc32(item id) mod buckets
--                             item id -> assignment: state 1 byte | assigned_at 4 bytes, seconds | digest 8 bytes | ID
--                                 state bit 0: content_changed, the latest content has other codes than the ID
--                                 state bit 1: retired; then 4 bytes retired_at stand between state and assigned_at
--                             FF item id -> the IDs it held before: each assigned_at 4 bytes | ID | ","
--                                 FF is no UTF-8, so no item id begins with it
--   ...:r:<bucket>    hash    reverse: what stands under a prefix of the codes; bucket = hash(prefix) mod buckets, where
--                             hash is 0 and, for each byte of the prefix, (hash * 48271 + byte + 1) mod (2^31 - 1).
--                             Under fewer codes than all levels but the last:
--                             the packed prefix and one code more -> how many live IDs begin with them; only if any do
--                             Under the codes of all levels but the last:
--                             ID -> item id, for good; FF item id once the ID is retired or replaced
--                             packed codes -> the highest suffix issued; only there once a second was wanted
--   ...:c             stream  the latest changes, an entry for each call that made any; its id is <revision of its last
--                             change>-0, its field "c" the changes in order, each one revision more than the one before:
--                             "A" ID ","         assigned            "B" ID ","           came back as its item did
--                             "D" ID ","         retired             "R" ID "," ID ","    replaced, and by which
--                             Old entries are dropped whole, once all their changes are too old.
--   A field of the width of the codes is a counter of suffixes, a longer one an ID, a shorter one an inner prefix: no
--   ambiguity.
--
-- KEYS   meta, then for each request its forward bucket. Reverse buckets follow from the codes, which for an item
--        that is retired or reassigned only the record knows.
-- ARGV   "1" to write even where nothing is new, so that a WAITAOF after this script covers what it read; else "0".
--        Where requests follow: buckets, bytes of packed codes, bytes of one code, the highest suffix, how many changes
--        to keep. Then for each request the item id, and
--        "K" digest codes   claim, and keep the ID that it holds
--        "R" digest codes   claim, and reassign where its ID has other codes
--        "D"                retire
-- REPLY  the server's time in seconds, the revision after this call or 0 where it changed nothing, then for each request: the suffix (an integer) where an ID was issued now, else
--        the assignment (a string) as it stands now, nil where there is none: nothing to retire, no suffix left

local call = redis.call
local sub, byte, char, floor = string.sub, string.byte, string.char, math.floor

local meta = KEYS[1]
local prefix = sub(meta, 1, -5)
local buckets, width, code_bytes, max_suffix = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local changes_kept = tonumber(ARGV[6])
local REQUESTS = 7 -- where in ARGV they begin

local now = tonumber(call('TIME')[1])
local time = char(floor(now / 16777216) % 256, floor(now / 65536) % 256, floor(now / 256) % 256, now % 256)

local RETIRED = 2
local REASSIGN = 82 -- the letter R
local DEAD = '\255'
local count = 0
local changes = {}
local returned = false

local function extend(hash, codes, first, last)
    for i = first, last do
        hash = (hash * 48271 + byte(codes, i) + 1) % 2147483647
    end
    return hash
end

-- Of codes, or of an ID, which begins with its codes.
local function reverse_key(codes)
    return prefix .. 'r:' .. extend(0, codes, 1, width - code_bytes) % buckets
end

local live_counts, live_buckets = {}, {} -- by packed prefix: how much its count changes, and where it lies

-- Counts are put together first: all items of a call share the same few codes of the first level.
local function count_live(codes, change)
    count = count + change
    local hash = 0
    for last = code_bytes, width - code_bytes, code_bytes do
        local inner = sub(codes, 1, last)
        local counted = live_counts[inner]
        if not counted then
            counted = 0
            live_buckets[inner] = hash % buckets
        end
        live_counts[inner] = counted + change
        hash = extend(hash, codes, last - code_bytes + 1, last)
    end
end

local function write_live_counts()
    for inner, change in pairs(live_counts) do
        if change ~= 0 then
            local reverse = prefix .. 'r:' .. live_buckets[inner]
            if call('HINCRBY', reverse, inner, change) == 0 then
                call('HDEL', reverse, inner)
            end
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
    return suffix
end

local function assign(forward, item_id, content)
    local suffix = issue(sub(content, 9), item_id)
    if suffix then
        call('HSET', forward, item_id, '\0' .. time .. content .. suffix)
    end
    return suffix
end

-- The ID stands whatever the content says; the latest content's digest is kept, and whether its codes differ, so
-- that the same content arriving again is known by its digest alone.
local function with_content(value, content)
    local codes = sub(content, 9)
    local state = byte(value, 1)
    state = state - state % 2
    if sub(value, 14, 13 + width) ~= codes then
        state = state + 1
    end
    return char(state) .. sub(value, 2, 5) .. sub(content, 1, 8) .. sub(value, 14)
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
local function reassign(forward, item_id, value, was_live, content)
    local codes = sub(content, 9)
    local former = call('HGET', forward, DEAD .. item_id) or ''
    local suffix, assigned_at, others = find_former(former, codes)
    local reply
    if suffix then
        returned = true
        set_live(codes .. suffix, item_id)
        reply = '\0' .. assigned_at .. content .. suffix
        call('HSET', forward, item_id, reply)
    else
        reply = assign(forward, item_id, content)
        if not reply then
            return nil
        end
        suffix = reply
    end
    note('R', sub(value, 14) .. ',' .. codes .. suffix)
    if was_live then
        set_dead(sub(value, 14), item_id)
    end
    call('HSET', forward, DEAD .. item_id, others .. sub(value, 2, 5) .. sub(value, 14) .. ',')
    return reply
end

local function claim(forward, item_id, request)
    local content = sub(request, 2)
    local stored = call('HGET', forward, item_id)
    if not stored then
        local suffix = assign(forward, item_id, content)
        if suffix then
            note('A', sub(content, 9) .. suffix)
        end
        return suffix
    end
    local value, was_live = stored, byte(stored, 1) < RETIRED
    if not was_live then
        value = char(byte(stored, 1) - RETIRED) .. sub(stored, 6)
    end
    if byte(request, 1) == REASSIGN and sub(value, 14, 13 + width) ~= sub(content, 9) then
        return reassign(forward, item_id, value, was_live, content)
    end
    if not was_live then
        returned = true
        set_live(sub(value, 14), item_id)
        note('B', sub(value, 14))
    end
    if sub(value, 6, 13) ~= sub(content, 1, 8) then
        value = with_content(value, content)
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

local replies = { now, 0 }
for i = 2, #KEYS do
    local item_id, request = ARGV[REQUESTS + 2 * i - 4], ARGV[REQUESTS + 2 * i - 3]
    local answer = request == 'D' and retire or claim
    replies[i + 1] = answer(KEYS[i], item_id, request) or false
end

if #changes > 0 then
    local revision = call('HINCRBY', meta, 'revision', #changes)
    local oldest = string.format('%d', math.max(revision - changes_kept, 0))
    call('XADD', prefix .. 'c', 'MINID', '~', oldest, string.format('%d-0', revision), 'c', table.concat(changes))
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
