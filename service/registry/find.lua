-- What stands for many Semantic IDs, or how many suffixes were issued to many codes; it writes nothing.
--
-- KEYS   meta
-- ARGV   reverse buckets of one first code, bytes of packed codes, bytes of one code; then packed codes and IDs
-- REPLY  for each of these: of codes the number of suffixes; of an ID what stands for it, nil where it was never issued

local call, sub, byte, char = redis.call, string.sub, string.byte, string.char
local FULL = 43 -- "+"
local record = sub(KEYS[1], 1, -7) .. ':r:'
local buckets, width, code_bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local inner_width = width - code_bytes
local top_width = math.min(2 * code_bytes, inner_width)
local lead = inner_width == 0 and 0 or code_bytes

-- The hash of lib.lua goes on from prefix to prefix.
local function extend(hash, codes, first, last)
    for i = first, last do
        hash = (hash * 48271 + byte(codes, i) + 1) % 2147483647
    end
    return hash
end

local found = {}
for i = 4, #ARGV do
    local asked = ARGV[i]
    local code, tail = '', sub(asked, lead + 1)
    if lead > 0 then
        code = byte(asked, 1)
        if lead == 2 then
            code = code * 256 + byte(asked, 2)
        end
    end
    local hash, known = extend(0, asked, 1, top_width), #asked == width and 0 or false
    for length = top_width, inner_width, code_bytes do
        local key, head = record .. code .. '}:' .. hash % buckets, char(length / code_bytes)
        local own, field = head .. sub(asked, lead + 1, length), head .. tail
        local values
        if #asked == width then
            values = call('HMGET', key, own, field, field .. '0')
            known = math.max(known, values[2] and values[2] + 1 or values[3] and 1 or 0)
        else
            values = call('HMGET', key, own, field)
            known = values[2]
        end
        if not values[1] or byte(values[1], -1) ~= FULL or (known and #asked ~= width) then
            break
        end
        hash = extend(hash, asked, length + 1, length + code_bytes)
    end
    found[i - 3] = known
end
return found
