-- On a cluster: the IDs of one first code. One call is one ID of one item, in one slot; sent behind nodes.lua.
--
-- KEYS   the outbox of the first code; the buckets of what stands under the prefixes of the ID: of one code, of two, and so
--        on, up to all but the last; of a tokenizer of one level, of none
-- ARGV   "1" to write even where nothing is new, so that a wait behind this call covers what it found; else "0";
--        item id, version, bytes of packed codes, bytes of one code, the highest suffix; a number that the outbox is known
--        to have reached, up to which all changes are in the log; and
--        "issue" bases codes former...  an ID under the first of these codes (a list of packed codes, one after another)
--                                       that has a suffix left, or the one that the item has there: the highest suffix
--                                       that was seen under each of them before the item was begun, as 4 bytes each, and
--                                       the IDs that the item held before
--        "right" id change live         lets it be as it is said to be, "1" live or "0" not; see mending.py
--        "put" id change                puts it back, where no other item holds it; "" is replied where one does
--        "live" id                      brings it
--        "dead" id change               takes it away; the change as it stands in the log
-- REPLY  the server's time, the ID or "" where no suffix is left, the number of the first change that this call made, its
--        changes in order. The error OLDER where the outbox is not as far as it is known to be.
--
-- A change of an ID that an item had before carries the version of the item's operation: one that comes late, from a
-- worker who was overtaken, has no effect. To issue is found done where the item has an ID there already.

local outbox = KEYS[1]
local item_id, version = ARGV[2], tonumber(ARGV[3])
local max_suffix, moved = tonumber(ARGV[6]), tonumber(ARGV[7])
lay_out(tonumber(ARGV[4]), tonumber(ARGV[5]), function(prefix)
    return KEYS[1 + math.max(#prefix / code_bytes, 1)]
end)
local TRIMMED_PER_CALL = 64
local FOUND_PER_CALL = 256
local SCANNED_WHOLE = 64 -- a group up to this size is searched from its first suffix

local state = call('HMGET', outbox, 'n', 't')
local reached, trimmed = tonumber(state[1] or 0), tonumber(state[2] or 0)
if reached < moved then
    return redis.error_reply('OLDER - ' .. reached)
end
local first = reached + 1
local changes = {}

local function note(change)
    reached = reached + 1
    changes[#changes + 1] = change
    call('HSET', outbox, 'n', reached, reached, change)
end

-- Whose an ID is, whether it is live, and the version of its last change.
local function read_holder(holder)
    if sub(holder, 1, 1) ~= CONTROL then
        return holder, true, 0
    end
    return sub(holder, 7), sub(holder, 2, 2) == '1', unpack_time(holder, 3)
end

local function set_state(id, live, change)
    local node, holder = seek(id)
    local whose, was_live, last = read_holder(holder or '')
    if whose ~= item_id then
        error({ err = 'OLDER - 0' }) -- it was issued, and this server does not know it
    end
    if version <= last then
        return
    end
    set_holder(node, id, CONTROL .. (live and '1' or '0') .. pack_time(version) .. item_id)
    if live ~= was_live then
        add_live(node, live and 1 or -1)
        note(change)
    elseif sub(change, 1, 1) == 'R' then
        note('r' .. sub(change, 2)) -- it had gone before
    end
end

-- The item's ID with these codes and a suffix from one on, which may stand in any node down to this one; and what no
-- suffix there is above. Few suffixes stand in nodes above, so that few are asked for there.
local function find(codes, from, node)
    local tail, id, highest = sub(codes, tail_at), nil, 0
    if node.above then
        id, highest = find(codes, from, node.above)
    end
    if id then
        return id, highest
    end
    highest = math.max(highest, tonumber(call('HGET', node.key, node.head .. tail)) or 0)
    for start = from, highest, FOUND_PER_CALL do
        local fields = {}
        for suffix = start, math.min(start + FOUND_PER_CALL - 1, highest) do
            fields[#fields + 1] = node.head .. tail .. suffix
        end
        for i, holder in ipairs(call('HMGET', node.key, unpack(fields))) do
            if holder and read_holder(holder) == item_id then
                return codes .. (start + i - 1), highest
            end
        end
    end
    return nil, highest
end

local function issue(bases, list, former)
    for choice = 0, #list / width - 1 do
        local codes = sub(list, choice * width + 1, (choice + 1) * width)
        local node, highest = look_up(codes)
        local from = highest < SCANNED_WHOLE and 0 or unpack_time(bases, choice * 4 + 1)
        local id = highest >= from and find(codes, from, node) or nil
        for i = 1, #former do
            id = id or (sub(former[i], 1, width) == codes and former[i]) or nil
        end
        if id then
            set_state(id, true, 'B' .. id .. ',')
            return id
        end
        if highest < max_suffix then
            id = codes .. (highest + 1)
            place(node, codes, highest + 1, item_id)
            add_live(node, 1)
            note('A' .. id .. ',')
            return id
        end
    end
    return ''
end

-- An ID that no node has enters one; no suffix up to its own is a next one.
local function enter(id, holder, live)
    local codes = sub(id, 1, width)
    local node = look_up(codes)
    place(node, codes, tonumber(sub(id, width + 1)), holder)
    if live then
        add_live(node, 1)
    end
end

local function put(id, change)
    local _, holder = seek(id)
    if holder then
        return read_holder(holder) == item_id and id or ''
    end
    local live = sub(change, 1, 1) == 'A'
    enter(id, live and item_id or CONTROL .. '0' .. pack_time(version) .. item_id, live)
    note(change)
    return id
end

local function put_right(id, live, change)
    local node, holder = seek(id)
    local was_live = false
    if holder then
        local whose
        whose, was_live = read_holder(holder)
        if whose ~= item_id then
            return ''
        end
    end
    local state = (live and version == 0) and '' or CONTROL .. (live and '1' or '0') .. pack_time(version)
    if not holder then
        enter(id, state .. item_id, live)
    else
        set_holder(node, id, state .. item_id)
        if live ~= was_live then
            add_live(node, live and 1 or -1)
        end
    end
    if live ~= was_live then
        note(change)
    end
    return id
end

local trim = math.min(moved, trimmed + TRIMMED_PER_CALL)
for number = trimmed + 1, trim do
    call('HDEL', outbox, number)
end
if trim > trimmed then
    call('HSET', outbox, 't', trim)
end

local id = ARGV[9]
if ARGV[8] == 'issue' then
    local former = {}
    for i = 11, #ARGV do
        former[#former + 1] = ARGV[i]
    end
    id = issue(ARGV[9], ARGV[10], former)
elseif ARGV[8] == 'right' then
    id = put_right(id, ARGV[11] == '1', ARGV[10])
elseif ARGV[8] == 'put' then
    id = put(id, ARGV[10])
else
    set_state(id, ARGV[8] == 'live', ARGV[10] or 'B' .. id .. ',')
end
write_nodes()
if ARGV[1] == '1' and #changes == 0 then
    call('HSET', outbox, 'n', reached)
end
return { tonumber(call('TIME')[1]), id, first, unpack(changes) }
