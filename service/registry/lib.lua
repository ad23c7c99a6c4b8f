-- What the scripts of a record share; each is sent as this text and its own.
--
-- KEY SCHEMA (schema 3). Written here with NAME for {namespace}:{fingerprint}; the braces below are Redis Cluster's hash
-- tags, so that what has to change together lies in one slot, and nothing more. All numbers big-endian.
-- An ID is: packed codes, of a fixed width, then the suffix in decimal (small decimal values are kept as integers).
--
--   sid:{NAME}:meta            hash    schema          "3"
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
--                                      Under fewer codes than all levels but the last:
--                                      the packed prefix and one code more -> how many live IDs begin with them; only if
--                                          any do
--                                      Under the codes of all levels but the last:
--                                      ID -> item id, for good; FF item id once the ID is retired or replaced
--                                      packed codes -> the highest suffix issued; only there once a second was wanted
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
--   In a reverse bucket a field of the width of the codes is a counter of suffixes, a longer one an ID, a shorter one an
--   inner prefix: no ambiguity.

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

local function extend(hash, codes, first, last)
    for i = first, last do
        hash = (hash * 48271 + byte(codes, i) + 1) % 2147483647
    end
    return hash
end
