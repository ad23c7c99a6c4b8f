-- Claims a micro-batch of items: each gets its one Semantic ID, atomically, the known ones the ID they hold.
--
-- KEY SCHEMA (schema 1). All keys of one record start with  sid:{namespace}:{fingerprint}:  (written without the
-- braces, which on a cluster would be a hash tag and put a whole catalogue on one slot). All numbers big-endian.
--
--   ...:meta          hash    schema          "1"
--                             buckets         number of buckets, a fact of the record from its first use
--                             codebook_sizes  "256,256,256,256"
--                             count           number of assignments
--                             synced          time of the last barrier (see ARGV[1])
--   ...:f:<bucket>    hash    forward: item id -> assignment; bucket = crc32(item id) mod buckets
--                             value: state 1 byte | assigned_at 4 bytes, seconds | digest 8 bytes
--                                    | codes, packed to a fixed width | suffix in decimal
--                             state bit 0: content_changed, the latest content has other codes than the ID
--   ...:r:<bucket>    hash    reverse, all of one group (equal codes) in one bucket:
--                             bucket = crc32(packed codes of all levels but the last) mod buckets
--                             packed codes + suffix in decimal -> item id
--                             packed codes alone               -> the highest suffix issued; only there
--                                                                 from the second member on
--   A field of the fixed width is a counter, a longer one a Semantic ID: no ambiguity. Suffixes are decimal
--   because the server keeps small decimal values as integers.
--
-- KEYS   meta, then for each claim its forward and its reverse bucket
-- ARGV   "1" to write even where nothing is new, so that a WAITAOF after this script covers what it read; else "0".
--        Then for each claim the item id, and digest .. packed codes
-- REPLY  the server's time in seconds, then for each claim: the suffix (an integer) where it was created now, else
--        the assignment's value (a string) as it stands now

local call = redis.call
local sub, byte, char, floor = string.sub, string.byte, string.char, math.floor

local now = tonumber(call('TIME')[1])
local assigned_at = char(floor(now / 16777216) % 256, floor(now / 65536) % 256, floor(now / 256) % 256, now % 256)

-- The ID stands whatever the content says; the latest content's digest is kept, and whether its codes differ, so
-- that the same content arriving again is known by its digest alone.
local function with_content(value, content)
    local codes = sub(content, 9)
    local state = byte(value, 1)
    state = state - state % 2
    if sub(value, 14, 13 + #codes) ~= codes then
        state = state + 1
    end
    return char(state) .. sub(value, 2, 5) .. sub(content, 1, 8) .. sub(value, 14)
end

-- Suffix 0 is a field of its own, so the first item of a group costs no counter.
local function next_suffix(reverse, codes, item_id)
    if call('HSETNX', reverse, codes .. '0', item_id) == 1 then
        return 0
    end
    local suffix = call('HINCRBY', reverse, codes, 1)
    call('HSET', reverse, codes .. suffix, item_id)
    return suffix
end

local replies = { now }
local created = 0
for i = 2, #KEYS, 2 do
    local forward, item_id, content = KEYS[i], ARGV[i], ARGV[i + 1]
    local reply = call('HGET', forward, item_id)
    if not reply then
        reply = next_suffix(KEYS[i + 1], sub(content, 9), item_id)
        call('HSET', forward, item_id, '\0' .. assigned_at .. content .. reply)
        created = created + 1
    elseif sub(reply, 6, 13) ~= sub(content, 1, 8) then
        reply = with_content(reply, content)
        call('HSET', forward, item_id, reply)
    end
    replies[#replies + 1] = reply
end

if created > 0 then
    call('HINCRBY', KEYS[1], 'count', created)
elseif ARGV[1] == '1' then
    call('HSET', KEYS[1], 'synced', now)
end
return replies
