-- On a cluster: moves changes from the outboxes of the first codes into the log of the record, each once.
--
-- KEYS   meta, root, the log, the numbers up to which each outbox was moved
-- ARGV   "1" to write even where nothing is new, so that a wait behind this call covers what it found; else "0";
--        how many changes to keep, bytes of one code, the epoch and a revision that the record is known to have reached;
--        then for each first code: the packed code, the number of the first change told, how many are told, the changes
-- REPLY  the server's time, the revision, then for each first code how far its outbox was moved. Where that is less than
--        the changes told reach, those before them are wanted too.
--        The error OLDER where the record has another epoch or is not as far.

local meta, root, log, outboxes = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local now = tonumber(call('TIME')[1])

local known = call('HMGET', meta, 'epoch', 'revision')
if (known[1] or '') ~= ARGV[4] or tonumber(known[2] or 0) < tonumber(ARGV[5]) then
    return redis.error_reply('OLDER ' .. (known[1] or '-') .. ' ' .. (known[2] or 0))
end

local LIVE = { A = 1, a = 0, B = 1, D = -1, R = -1, d = 0, r = 0 }
local changes, count, returned = {}, 0, false
local replies = { now, 0 }
local place = 6
while place <= #ARGV do
    local code, first, told = ARGV[place], tonumber(ARGV[place + 1]), tonumber(ARGV[place + 2])
    local moved = tonumber(call('HGET', outboxes, code) or 0)
    if first <= moved + 1 and first + told > moved + 1 then
        local live = 0
        for i = moved - first + 2, told do
            local change = ARGV[place + 2 + i]
            local kind = sub(change, 1, 1)
            live = live + LIVE[kind]
            returned = returned or kind == 'B'
            changes[#changes + 1] = string.upper(kind) .. sub(change, 2)
        end
        moved = first + told - 1
        call('HSET', outboxes, code, moved)
        if live ~= 0 then
            count = count + live
            if code ~= '' and call('HINCRBY', root, code, live) == 0 then
                call('HDEL', root, code)
            end
        end
    end
    replies[#replies + 1] = moved
    place = place + 3 + told
end

local revision = tonumber(known[2] or 0)
if #changes > 0 then
    revision = call('HINCRBY', meta, 'revision', #changes)
    local oldest = string.format('%d', math.max(revision - tonumber(ARGV[2]), 0))
    call('XADD', log, 'MINID', '~', oldest, string.format('%d-0', revision), 'c', table.concat(changes))
    call('HINCRBY', meta, 'count', count)
    if returned then
        call('HSET', meta, 'returned', now)
    end
end
if ARGV[1] == '1' and #changes == 0 then
    call('HSET', meta, 'synced', now)
end
replies[2] = revision
return replies
