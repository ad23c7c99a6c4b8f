-- Claims and retires a micro-batch of items: every item its one Semantic ID, the known ones their own.
--
-- KEYS, ARGV and the beginning of the REPLY: see atomic.lua.
-- ASKED  "K" digest codes alternatives   claim, and keep the ID that it holds
--        "R" digest codes alternatives   claim, and reassign where its ID has other codes and was not given to just
--                                        this content
--        "D"                             retire
--        Alternatives are codes of the last level, for an item whose own codes have no suffix left, best first.
-- ANSWER the suffix (an integer) where an ID was issued now, with the last code (bytes) in a list where it is an
--        alternative; else the assignment (a string) as it stands now, with a bit more in its state where a claim
--        found it as it is; nil where there is none: nothing to retire, no suffix left.

local REASSIGN = 82 -- the letter R
local UNCHANGED = 4 -- a bit of an assignment's state, in an answer alone
local CONTENT = 9 -- in a request: digest, codes, alternatives begin after the letter

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
        elseif next_suffix(codes) then
            return false
        end
    end
    return false
end

local function digest_of(request)
    return sub(request, 2, CONTENT)
end

-- Whether an ID was given to just a request's content: it stands then, whichever codes it has.
local function given_to(value, request)
    return sub(value, 6, 13) == digest_of(request) and byte(value, 1) % 2 == 0
end

local function reply_of(request, codes, suffix)
    if codes == sub(request, CONTENT + 1, CONTENT + width) then
        return suffix
    end
    return { suffix, sub(codes, -code_bytes) }
end

local function assign(forward, item_id, request)
    local codes = sub(request, CONTENT + 1, CONTENT + width)
    local suffix = next_suffix(codes)
    if not suffix and #request > CONTENT + width then
        for _, other in ipairs(candidates(request)) do
            codes, suffix = other, next_suffix(other)
            if suffix then
                break
            end
        end
    end
    if suffix then
        issue(codes, suffix, item_id)
        call('HSET', forward, item_id, '\0' .. time .. digest_of(request) .. codes .. suffix)
        return reply_of(request, codes, suffix)
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
            suffix, assigned_at = next_suffix(codes), time
            if suffix then
                issue(codes, suffix, item_id)
                reply = reply_of(request, codes, suffix)
            end
        end
        if suffix then
            note('R', sub(value, 14) .. ',' .. codes, suffix)
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
    if byte(request, 1) == REASSIGN and not given_to(value, request) and not fits(sub(value, 14), request) then
        return reassign(forward, item_id, value, was_live, request)
    end
    if not was_live then
        returned = true
        set_live(sub(value, 14), item_id)
    end
    if sub(value, 6, 13) ~= digest_of(request) then
        value = with_content(value, request)
    end
    if value == stored then
        return char(byte(value, 1) + UNCHANGED) .. sub(value, 2)
    end
    call('HSET', forward, item_id, value)
    return value
end

local function retire(forward, item_id)
    local value = call('HGET', forward, item_id)
    if value and byte(value, 1) < RETIRED then
        set_dead(sub(value, 14), item_id)
        note('D', sub(value, 14), '')
        value = char(byte(value, 1) + RETIRED) .. time .. sub(value, 2)
        call('HSET', forward, item_id, value)
    end
    return value
end

return run(function(forward, item_id, request)
    local answer = request == 'D' and retire or claim
    return answer(forward, item_id, request)
end)
