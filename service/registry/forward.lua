-- On a cluster: what an item holds, and what is being done with it. One call is one item, in one slot.
--
-- KEYS   the item's forward bucket
-- ARGV   "1" to write even where nothing is new, so that a wait behind this call covers what it found; else "0";
--        item id, bytes of packed codes, bytes of one code, and
--        "begin"  request base places   what record.lua is asked ("K", "R", "D"), the highest suffix seen under each of
--                                       its places before, as 4 bytes each, and how many of its places may be had: its
--                                       own codes and all alternatives up to the first that had a suffix left; or what
--                                       restore.lua is asked ("C", "F"), which names its place itself
--        "commit" control id            what begin answered, and the ID that came of it: "" where nothing was left
-- REPLY  of begin: the server's time, the control, whether it was written by this call (1 or 0), the
--        assignment as it stands, the IDs held before. The control is "" where nothing is left to do.
--        of commit: the server's time, the assignment as it stands now, 1 where this call wrote it
--
-- The control says what is being done: version 4 bytes | operation 1 byte | time 4 bytes | digest 8 bytes | bases | codes |
-- alternatives; only one thing at a time is done with an item, and whoever finds a control may finish it. Its version
-- grows with each operation but the first assignment, whose control is version 0 and leaves nothing behind. Of an ID that
-- is put back ("I" what the item holds, "F" what it held before) it has, after the time, what restore.lua is asked.

local forward, item_id = KEYS[1], ARGV[2]
local width, code_bytes = tonumber(ARGV[3]), tonumber(ARGV[4])
local now = tonumber(call('TIME')[1])
local time = pack_time(now)

local control_field = CONTROL .. item_id
local control = call('HGET', forward, control_field) or ''
local value = call('HGET', forward, item_id)

-- Where the server answers before it has synced or replicated, what was found is written again: then the wait behind
-- this call covers it too.
local function keep()
    if ARGV[1] == '1' then
        if value then
            call('HSET', forward, item_id, value)
        elseif control ~= '' then
            call('HSET', forward, control_field, control)
        end
    end
end

local function standing(current, mine)
    keep()
    return { now, current, mine, value or false, call('HGET', forward, DEAD .. item_id) or '' }
end

local function pending(text)
    return #text > 4
end

local function start(operation, rest)
    local version = sub(control, 1, 4)
    if version == '' then
        version = '\0\0\0\0'
    end
    if operation ~= 'A' and operation ~= 'I' then
        version = pack_time(unpack_time(version, 1) + 1)
    end
    control = version .. operation .. time .. rest
    call('HSET', forward, control_field, control)
    return standing(control, 1)
end

-- The IDs that the item holds or held before.
local function ids_of_item()
    local ids = { sub(value, byte(value, 1) < RETIRED and 14 or 18) }
    local former, start_at = call('HGET', forward, DEAD .. item_id) or '', 1
    while start_at <= #former do
        local comma = string.find(former, ',', start_at + 4 + width, true)
        ids[#ids + 1] = sub(former, start_at + 4, comma - 1)
        start_at = comma + 1
    end
    return ids
end

-- Where nothing is begun, restore.lua's answer follows from what stands.
local function begin_restoring(request)
    local kind, rest = sub(request, 1, 1), sub(request, 2)
    if kind == 'C' then
        return value and standing('', 0) or start('I', rest)
    end
    if not value then
        return standing('', 0)
    end
    local comma, known = string.find(rest, ',', 5 + width, true), false
    for _, id in ipairs(ids_of_item()) do
        if sub(id, 1, width) == sub(rest, 5, 4 + width) then
            return standing('', 0)
        end
        known = known or id == sub(rest, comma + 1)
    end
    return known and start('F', rest) or standing('', 0)
end

local function begin(request, bases, places)
    if pending(control) then
        return standing(control, 0)
    end
    local retired = value and byte(value, 1) >= RETIRED
    if sub(request, 1, 1) == 'C' or sub(request, 1, 1) == 'F' then
        return begin_restoring(request)
    end
    if request == 'D' then
        if not value or retired then
            return standing('', 0)
        end
        return start('D', '')
    end
    local content = sub(request, 2)
    local digest, codes = sub(content, 1, 8), sub(content, 9, 8 + width)
    local rest = digest .. bases .. codes .. sub(content, 9 + width, 8 + width + (places - 1) * code_bytes)
    if not value then
        return start('A', rest)
    end
    local live = value
    if retired then
        live = char(byte(value, 1) - RETIRED) .. sub(value, 6)
    end
    local held = sub(live, 14, 13 + width)
    local fits = held == codes
    for place = 2, places do
        local last = sub(content, 9 + width + (place - 2) * code_bytes, 8 + width + (place - 1) * code_bytes)
        fits = fits or held == sub(codes, 1, -code_bytes - 1) .. last
    end
    local given_to_this = sub(live, 6, 13) == digest and byte(live, 1) % 2 == 0
    if sub(request, 1, 1) == 'R' and not fits and not given_to_this then
        return start('R', rest)
    end
    if sub(live, 6, 13) ~= digest then
        local state = byte(live, 1)
        live = char(state - state % 2 + (fits and 0 or 1)) .. sub(live, 2, 5) .. digest .. sub(live, 14)
    end
    if retired then
        return start('B', live)
    end
    if live ~= value then
        value = live
        call('HSET', forward, item_id, value)
    end
    return standing('', 0)
end

local function without(former, id)
    local start_at = 1
    while start_at <= #former do
        local comma = string.find(former, ',', start_at + 4 + width, true)
        if sub(former, start_at + 4, comma - 1) == id then
            return sub(former, 1, start_at - 1) .. sub(former, comma + 1), sub(former, start_at, start_at + 3)
        end
        start_at = comma + 1
    end
    return former, nil
end

local function commit(expected, id)
    if control ~= expected then
        keep()
        return { now, value or false, 0 }
    end
    local operation, at, rest = sub(control, 5, 5), sub(control, 6, 9), sub(control, 10)
    if operation == 'D' then
        value = char(byte(value, 1) + RETIRED) .. at .. sub(value, 2)
    elseif operation == 'B' then
        value = rest
    elseif operation == 'I' then
        value = id ~= '' and rest or nil
    elseif operation == 'F' then
        if id ~= '' then
            local former = call('HGET', forward, DEAD .. item_id) or ''
            call('HSET', forward, DEAD .. item_id, former .. sub(rest, 1, 4) .. id .. ',')
        end
    elseif id ~= '' then
        local assigned_at = at
        if operation == 'R' then
            local live = value
            if byte(value, 1) >= RETIRED then
                live = sub(value, 5) -- its first byte is not read
            end
            local former, earlier = without(call('HGET', forward, DEAD .. item_id) or '', id)
            assigned_at = earlier or at
            call('HSET', forward, DEAD .. item_id, former .. sub(live, 2, 5) .. sub(live, 14) .. ',')
        end
        value = '\0' .. assigned_at .. sub(rest, 1, 8) .. id
    end
    if value then
        call('HSET', forward, item_id, value)
    end
    if operation == 'A' or operation == 'I' then
        call('HDEL', forward, control_field)
    else
        call('HSET', forward, control_field, sub(control, 1, 4))
    end
    return { now, value or false, 1 }
end

if ARGV[5] == 'begin' then
    return begin(ARGV[6], ARGV[7], tonumber(ARGV[8]))
end
return commit(ARGV[6], ARGV[7])
