-- What the scripts share that change a record in one call, atomically; sent between lib.lua and the script itself.
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
-- bucket that follow each other are written together, and counts once a call.

local REQUEST = '>Bc0Hc0Ic0'

local meta = KEYS[1]
local record = sub(meta, 1, -7) -- sid:{NAME
local forward_buckets = 'sid:' .. sub(meta, 6, -7) .. ':f:'
local root = record .. '}:root'
local buckets, width, code_bytes, max_suffix = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local changes_kept = tonumber(ARGV[6])
local inner_width = width - code_bytes -- of the codes of all levels but the last

local now = tonumber(call('TIME')[1])
local time = pack_time(now)

local count = 0
local changes, changed = {}, 0
local returned = false

local partitions, bucket_names, reverse_keys = {}, {}, {} -- each made once a call

-- The buckets of what begins like this prefix of the codes.
local function partition(prefix)
    if width == code_bytes then
        return record .. ':r:}:'
    end
    local first = sub(prefix, 1, code_bytes)
    local found = partitions[first]
    if not found then
        local code = byte(first, 1)
        if code_bytes == 2 then
            code = code * 256 + byte(first, 2)
        end
        found = record .. ':r:' .. code .. '}:'
        partitions[first] = found
    end
    return found
end

-- The bucket of what stands under a packed prefix, of the first code at least.
local function bucket_under(prefix)
    local key = reverse_keys[prefix]
    if not key then
        local bucket = extend(0, prefix, 1, #prefix) % buckets
        local name = bucket_names[bucket]
        if not name then
            name = tostring(bucket)
            bucket_names[bucket] = name
        end
        key = partition(prefix) .. name
        reverse_keys[prefix] = key
    end
    return key
end

-- Of codes, or of an ID, which begins with its codes.
local function reverse_key(codes)
    return bucket_under(sub(codes, 1, inner_width))
end

local live_counts = {} -- by the packed codes of all levels but the last: how much the count of live IDs changes

local function count_live_under(inner, change)
    count = count + change
    live_counts[inner] = (live_counts[inner] or 0) + change
end

-- Of codes, or of an ID, which begins with its codes.
local function count_live(codes, change)
    count_live_under(sub(codes, 1, inner_width), change)
end

local function change_count(key, prefix, change)
    if call('HINCRBY', key, prefix, change) == 0 then
        call('HDEL', key, prefix)
    end
end

local function change_counts(key, prefixes, counts)
    local known, fields, gone = call('HMGET', key, unpack(prefixes)), {}, {}
    for i, prefix in ipairs(prefixes) do
        local number = (tonumber(known[i]) or 0) + counts[prefix]
        if number == 0 then
            gone[#gone + 1] = prefix
        else
            fields[#fields + 1] = prefix
            fields[#fields + 1] = number
        end
    end
    if #fields > 0 then
        call('HSET', key, unpack(fields))
    end
    if #gone > 0 then
        call('HDEL', key, unpack(gone))
    end
end

-- From the longest prefixes to the first codes; those of one parent lie in one bucket.
local function write_live_counts()
    local counts = live_counts
    for length = inner_width, code_bytes, -code_bytes do
        local shorter, children = {}, {} -- by parent: one child, or a list of them
        for prefix, change in pairs(counts) do
            if change ~= 0 then
                local parent = sub(prefix, 1, length - code_bytes)
                local known = children[parent]
                if not known then
                    children[parent], shorter[parent] = prefix, change
                else
                    shorter[parent] = shorter[parent] + change
                    if type(known) == 'table' then
                        known[#known + 1] = prefix
                    else
                        children[parent] = { known, prefix }
                    end
                end
            end
        end
        for parent, found in pairs(children) do
            local key = parent == '' and root or bucket_under(parent)
            if type(found) == 'table' then
                change_counts(key, found, counts)
            else
                change_count(key, found, counts[found])
            end
        end
        counts = shorter
    end
end

local function note(kind, id)
    local place = 3 * changed
    changes[place + 1], changes[place + 2], changes[place + 3] = kind, id, ','
    changed = changed + 1
end

local open_bucket, open_fields, opened = nil, {}, 0 -- what is about to be written into one reverse bucket
local last_suffixes = {} -- by codes: the highest suffix as this call knows it, -1 where there is none
local counter, counted -- codes of which a counter is still to be written into the open bucket, and its field's place

local function write_open()
    if opened > 0 then
        call('HSET', open_bucket, unpack(open_fields, 1, opened))
        opened, counter = 0, nil
    end
end

-- The highest suffix issued under these codes; -1 where there is none.
local function last_suffix(codes)
    local last = last_suffixes[codes]
    if not last then
        local known = call('HMGET', reverse_key(codes), codes, codes .. '0')
        last = tonumber(known[1]) or known[2] and 0 or -1
        last_suffixes[codes] = last
    end
    return last
end

-- The next suffix of these codes and the ID with it, or nil; not known as issued before `issue`.
local function next_id(codes)
    local suffix = last_suffix(codes) + 1
    if suffix > max_suffix then
        return nil
    end
    return suffix, codes .. (suffix == 0 and '0' or suffix)
end

-- What stands for an ID enters its bucket. Suffix 0 is a field of its own, so the first item of a group costs no counter.
local function enter_id(key, codes, suffix, id, item_id)
    if key ~= open_bucket then
        write_open()
        open_bucket = key
    end
    open_fields[opened + 1], open_fields[opened + 2] = id, item_id
    opened = opened + 2
    if suffix > 0 then
        if counter ~= codes then
            counter, counted = codes, opened + 2
            open_fields[opened + 1] = codes
            opened = counted
        end
        open_fields[counted] = suffix
    end
    note('A', id)
end

-- The next ID of these codes goes live.
local function issue(codes, suffix, id, item_id)
    last_suffixes[codes] = suffix
    local inner = sub(codes, 1, inner_width)
    enter_id(bucket_under(inner), codes, suffix, id, item_id)
    count_live_under(inner, 1)
end

-- An ID enters the listings, or leaves them; what it names stays.
local function set_live(id, item_id)
    write_open()
    call('HSET', reverse_key(id), id, item_id)
    count_live(id, 1)
    note('B', id)
end

local function set_dead(id, item_id)
    write_open()
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

-- Runs a body that makes the replies to the requests, and logs what changed.
local function logged(body)
    local known, requests = {}, ARGV[9] or ''
    if requests ~= '' or (ARGV[7] or '') ~= '' then
        known = call('HMGET', meta, 'epoch', 'revision')
        if (known[1] or '') ~= ARGV[7] or tonumber(known[2] or 0) < tonumber(ARGV[8]) then
            return redis.error_reply('OLDER ' .. (known[1] or '') .. ' ' .. (known[2] or 0))
        end
    end
    local replies = { now, tonumber(known[2] or 0) }
    body(requests, replies)
    write_open()
    if changed > 0 then
        local revision = call('HINCRBY', meta, 'revision', changed)
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
