-- Puts IDs back that were assigned elsewhere, with their times: what the record holds stands, and nothing is renamed.
--
-- KEYS, ARGV and the beginning of the REPLY: see atomic.lua.
-- ASKED  "C" assignment                          what the item holds, live or retired, as it stands in a forward bucket
--        "F" assigned_at 4 bytes | ID "," ID     what it held before, and by which it was replaced
-- ANSWER 1 where the ID was put back, 0 where it is the item's already, whatever became of it since; else why not:
--        "I" item id   another item holds the ID
--        "O" ID        the item holds that ID instead
--        "S" ID        the item has that ID under the same codes
--        "N"           the item has no assignment

local FORMER = 70 -- the letter F

-- The ID of an assignment, live or retired.
local function id_of(value)
    return sub(value, byte(value, 1) < RETIRED and 14 or 18)
end

-- The item that an ID names, nil where it was never issued.
local function holder_of(id)
    local _, holder = seek(id)
    return holder and (sub(holder, 1, 1) == DEAD and sub(holder, 2) or holder)
end

-- An ID enters the record; no suffix up to its own is a next one.
local function enter(id, holder, is_live)
    local codes, suffix = sub(id, 1, width), tonumber(sub(id, width + 1))
    local node = look_up(codes)
    place(node, codes, suffix, holder)
    if is_live then
        count_live(node, 1)
    end
    returned = true -- its times are older than this call
end

local function restore(forward, item_id, value)
    local id = id_of(value)
    local stored, holder = call('HGET', forward, item_id), holder_of(id)
    if holder then
        return holder == item_id and 0 or 'I' .. holder
    elseif stored then
        return 'O' .. id_of(stored)
    end
    call('HSET', forward, item_id, value)
    if byte(value, 1) < RETIRED then
        enter(id, item_id, true)
        note('A', id, '')
    else
        enter(id, DEAD .. item_id, false)
        note('D', id, '')
    end
    return 1
end

local function restore_former(forward, item_id, assigned_at, id, successor)
    local stored, holder = call('HGET', forward, item_id), holder_of(id)
    if holder then
        return holder == item_id and 0 or 'I' .. holder
    elseif not stored then
        return 'N'
    end
    local codes, current = sub(id, 1, width), id_of(stored)
    if holder_of(successor) ~= item_id then
        return 'O' .. current
    elseif sub(current, 1, width) == codes then
        return 'S' .. current
    end
    local former = call('HGET', forward, DEAD .. item_id) or ''
    local suffix = find_former(former, codes)
    if suffix then
        return 'S' .. codes .. suffix
    end
    call('HSET', forward, DEAD .. item_id, former .. assigned_at .. id .. ',')
    enter(id, DEAD .. item_id, false)
    note('R', id .. ',', successor)
    return 1
end

return run(function(forward, item_id, request)
    if byte(request, 1) ~= FORMER then
        return restore(forward, item_id, sub(request, 2))
    end
    local comma = string.find(request, ',', 6 + width, true)
    return restore_former(forward, item_id, sub(request, 2, 5), sub(request, 6, comma - 1), sub(request, comma + 1))
end)
