-- What the scripts of a record share; each is sent as this text and its own.
--
-- KEY SCHEMA (schema 4). Written here with NAME for {namespace}:{fingerprint}; the braces below are Redis Cluster's hash
-- tags, so that what has to change together lies in one slot, and nothing more. All numbers big-endian.
-- An ID is: packed codes, of a fixed width, then the suffix in decimal (small decimal values are kept as integers).
--
--   sid:{NAME}:meta            hash    schema          "4"
--                                      buckets         number of forward buckets, and about that of reverse ones: facts of
--                                                      the record from its first use
--                                      codebook_sizes  "256,256,256,256"
--                                      epoch           which history this is; another after one was cut short
--                                      former          histories that were cut, EPOCH@REVISION each, by spaces: of which
--                                                      all up to that revision is still there
--                                      count           number of live assignments
--                                      revision        number of changes so far: each ID that came or went is one
--                                      returned        when an ID last came back as it was, so that no time of its own
--                                                      tells
--                                      synced          time of the last barrier (see record.lua)
--   sid:{NAME}:root            hash    first code -> how many live IDs begin with it; only if any do. Two levels or more.
--   sid:{NAME}:c               stream  the latest changes, an entry for each call that made any; its id is <revision of
--                                      its last change>-0, its field "c" the changes in order, each one revision more
--                                      than the one before, each of one ID:
--                                          "A" ID ","         assigned           "D" ID ","           retired
--                                          "B" ID ","         came back          "R" ID "," ID ","    replaced, and by which
--                                      The one that came instead has its own change. Old entries are dropped
--                                      whole, once all their changes are too old.
--   sid:NAME:f:<bucket>        hash    forward; bucket = crc32(item id) mod buckets
--                                      item id -> assignment: state 1 byte | assigned_at 4 bytes, seconds | digest
--                                          8 bytes | ID
--                                          state bit 0: content_changed, the latest content has other codes than the ID
--                                          state bit 1: retired; then 4 bytes retired_at stand between state and
--                                              assigned_at
--                                      FF item id -> the IDs it held before: each assigned_at 4 bytes | ID | ","
--                                          FF is no UTF-8, so no item id begins with it
--   sid:{sid:NAME:f:<bucket>}:d
--                              hash    item id -> title, see display.lua; of live items alone, where titles are kept. It
--                                      lies in the slot of the forward bucket, whose name is its hash tag
--   sid:{NAME:r:<c>}:<bucket>  hash    reverse, of the IDs that begin with code c; of a tokenizer of one level the c is
--                                      empty. What stands under a prefix of the codes; bucket = hash(prefix) mod
--                                      ceil(buckets / codebook size of the first level), where hash is 0 and, for each
--                                      byte of the prefix, (hash * 48271 + byte + 1) mod (2^31 - 1).
--                                      IDs stand in nodes. A node has a prefix, of 2 codes at least (of fewer levels, all
--                                      but the last), and of all levels but the last at most. An ID is placed, for good, in
--                                      the first node on its path that is not full; one of all levels but the last never
--                                      is. So a node has nodes under it once it is full, and deep ones are rare.
--                                      Fields begin with a byte that says how many codes the node's prefix has; the first
--                                      code, which is in the key, is left out:
--                                      prefix -> how many live IDs were placed here or in nodes under it; behind it "+"
--                                          where the node is full, or else "," and how many were placed here, where that
--                                          is another number and may become too many
--                                      prefix and one code more -> empty: there is such a node, with live IDs
--                                      ID -> item id, for good; FF item id once the ID is retired or replaced
--                                      packed codes -> the highest suffix placed here; only there once it was not 0
--                                      Of three levels and more, there is no node under one code, but nodes under two; so
--                                      only the second of these stands there.
--   On a cluster there is more, as no call reaches two slots; see forward.lua, reverse.lua and feed.lua:
--   sid:NAME:f:<bucket>                FE item id -> the control: what is being done with the item, and the version of the
--                                          last thing done
--   sid:{NAME:r:<c>}:<bucket>          ID -> FE, "1" live or "0" not, version 4 bytes, item id: once it came back, was
--                                          retired or replaced
--   sid:{NAME:r:<c>}:o         hash    the outbox: changes of these IDs on their way into the log
--                                      n               number of the last change
--                                      t               number up to which changes were removed
--                                      number -> change, as in the log; in small letters where the number of live
--                                          IDs is told elsewhere, or stays
--   sid:{NAME}:m               hash    first code -> number up to which its outbox was moved into the log
--   sid:{<number>}:synced      string  one on each server, for barriers
--   In a reverse bucket the first byte and the length of a field say what it is: no ambiguity.

local call = redis.call
local sub, byte, char, floor = string.sub, string.byte, string.char, math.floor

local RETIRED = 2
local DEAD = '\255'
local CONTROL = '\254'

-- Seconds as 4 bytes.
local function pack_time(seconds)
    return char(floor(seconds / 16777216) % 256, floor(seconds / 65536) % 256, floor(seconds / 256) % 256, seconds % 256)
end

local function unpack_time(bytes, first)
    local a, b, c, d = byte(bytes, first, first + 3)
    return ((a * 256 + b) * 256 + c) * 256 + d
end

-- The keys of what stands under a packed prefix, by the hash; of a tokenizer of one level or of several.
local function hashed_buckets(record, buckets, code_bytes, several_levels)
    local partitions, names, keys = {}, {}, {} -- each made once a call
    local function partition(prefix)
        if not several_levels then
            return record .. ':r:}:'
        end
        local code = byte(prefix, 1)
        if code_bytes == 2 then
            code = code * 256 + byte(prefix, 2)
        end
        local found = partitions[code]
        if not found then
            found = record .. ':r:' .. code .. '}:'
            partitions[code] = found
        end
        return found
    end
    return function(prefix)
        local key = keys[prefix]
        if not key then
            local hash = 0
            for i = 1, #prefix do
                hash = (hash * 48271 + byte(prefix, i) + 1) % 2147483647
            end
            local bucket = hash % buckets
            local name = names[bucket]
            if not name then
                name = tostring(bucket)
                names[bucket] = name
            end
            key = partition(prefix) .. name
            keys[prefix] = key
        end
        return key
    end
end
