-- The nodes in which Semantic IDs stand, see lib.lua, as the scripts change them; sent between lib.lua and these.
--
-- What is read of a node is kept for the call. What is placed in one node after another is written node by node, and the
-- nodes above at the end, by `write_nodes`.

local NODE_IDS = 128 -- in a node that is full: its IDs are read together, and other nodes may lie in the bucket
local NEVER_FULL = -math.huge -- placed in a node of all levels but the last: as many as come
local FULL, COMMA = 43, ',' -- 43 is "+"

-- Said by `lay_out`.
local width, code_bytes -- bytes of packed codes, of one code
local inner_width -- of the codes of all levels but the last
local top_width -- of the shortest prefix of a node
local tail_at -- where codes, IDs and prefixes go on behind the code that the keys have
local bucket_of -- the key of what stands under a prefix

local function lay_out(bytes_of_codes, bytes_of_one, bucket_under)
    width, code_bytes, bucket_of = bytes_of_codes, bytes_of_one, bucket_under
    inner_width = width - code_bytes
    top_width = math.min(2 * code_bytes, inner_width)
    tail_at = inner_width == 0 and 1 or code_bytes + 1
end

local nodes = {} -- by prefix, as this call knows them
local last_suffixes, places = {}, {} -- by codes: the highest suffix, -1 where there is none, and the node of the next
local open_node, open_fields, opened = nil, {}, 0 -- what is about to be written into one node
local counter, counted -- codes of which a counter is among these fields, and where

local function head_of(prefix)
    return char(#prefix / code_bytes)
end

local function has_room(node)
    return node.placed < NODE_IDS
end

-- Keeps a node by what its field says, nil or false where there is none yet.
local function know_node(prefix, above, key, head, value)
    local live = value and tonumber(value) or 0
    local placed = live
    if value and byte(value, -1) == FULL then
        live, placed = tonumber(sub(value, 1, -2)), NODE_IDS
    elseif value and not tonumber(value) then
        local comma = string.find(value, COMMA, 1, true)
        live, placed = tonumber(sub(value, 1, comma - 1)), tonumber(sub(value, comma + 1))
    end
    if #prefix == inner_width then
        placed = NEVER_FULL
    end
    local was_live = live > 0
    local node = { prefix = prefix, above = above, key = key, head = head, live = live, placed = placed, was_live = was_live }
    nodes[prefix] = node
    return node
end

local function field_of(node)
    return node.head .. sub(node.prefix, tail_at)
end

local function value_of(node)
    if not has_room(node) then
        return node.live .. '+'
    elseif node.placed == node.live or node.placed == NEVER_FULL then
        return node.live
    end
    return node.live .. COMMA .. node.placed
end

-- Whether anything has to be known of a node: of one that is never full, only that it has live IDs.
local function is_kept(node)
    return node.live > 0 or node.placed ~= NEVER_FULL
end

local function write_open()
    if opened > 0 then
        if open_node.changed and is_kept(open_node) then
            open_fields[opened + 1], open_fields[opened + 2] = field_of(open_node), value_of(open_node)
            opened = opened + 2
            open_node.changed = false
        end
        call('HSET', open_node.key, unpack(open_fields, 1, opened))
        opened, counter = 0, nil
    end
    open_node = nil
end

-- The node at this prefix, what stands there for this tail of codes or of an ID, and for it with suffix 0.
local function read_node(prefix, above, tail)
    local node = nodes[prefix]
    if node then
        local field = node.head .. tail
        local found = call('HMGET', node.key, field, field .. '0')
        return node, found[1], found[2]
    end
    local key, head = bucket_of(prefix), head_of(prefix)
    local field = head .. tail
    local found = call('HMGET', key, head .. sub(prefix, tail_at), field, field .. '0')
    return know_node(prefix, above, key, head, found[1]), found[2], found[3]
end

-- The node in which the next ID of these codes is placed, and the highest suffix that was issued to them, -1 where none was.
local function look_up(codes)
    local node, highest = places[codes], last_suffixes[codes] or -1
    if node and has_room(node) then
        return node, highest
    end
    local tail, counter_there, first_there = sub(codes, tail_at), nil, nil
    node = nil
    for length = top_width, inner_width, code_bytes do
        node, counter_there, first_there = read_node(sub(codes, 1, length), node, tail)
        highest = math.max(highest, tonumber(counter_there) or first_there and 0 or -1)
        if has_room(node) then
            break
        end
    end
    places[codes], last_suffixes[codes] = node, highest
    return node, highest
end

-- The node in which an ID was placed and what stands for it there; nil where it was not.
local function seek(id)
    write_open()
    local tail, node, holder = sub(id, tail_at), nil, nil
    for length = top_width, inner_width, code_bytes do
        node, holder = read_node(sub(id, 1, length), node, tail)
        if holder or has_room(node) then
            break
        end
    end
    if holder then
        return node, holder
    end
    return nil
end

local function set_holder(node, id, holder)
    call('HSET', node.key, node.head .. sub(id, tail_at), holder)
end

-- A new ID enters a node. Suffix 0 is known by its ID alone, so that the first item of a group costs no counter.
local function place(node, codes, suffix, holder)
    if node ~= open_node then
        write_open()
        open_node = node
    end
    local field = node.head .. sub(codes, tail_at)
    open_fields[opened + 1], open_fields[opened + 2] = field .. (suffix == 0 and '0' or suffix), holder
    opened = opened + 2
    if suffix > last_suffixes[codes] then
        last_suffixes[codes] = suffix
        if suffix > 0 then
            if counter ~= codes then
                counter, counted = codes, opened + 2
                open_fields[opened + 1] = field
                opened = counted
            end
            open_fields[counted] = suffix
        end
    end
    node.placed = node.placed + 1
    node.changed = true
end

-- Some IDs of a node come into the listings, or leave them.
local function add_live(node, change)
    repeat
        node.live = node.live + change
        node.changed = true
        node = node.above
    until not node
end

-- Adds to the fields of each key: one, or a list of several.
local function gather(fields_by_key, key, field)
    local known = fields_by_key[key]
    if not known then
        fields_by_key[key] = field
    elseif type(known) == 'table' then
        known[#known + 1] = field
    else
        fields_by_key[key] = { known, field }
    end
end

local function write_present(came, gone)
    for key, fields in pairs(came) do
        if type(fields) == 'table' then
            local pairs_of = {}
            for i, field in ipairs(fields) do
                pairs_of[2 * i - 1], pairs_of[2 * i] = field, ''
            end
            call('HSET', key, unpack(pairs_of))
        else
            call('HSET', key, fields, '')
        end
    end
    for key, fields in pairs(gone) do
        call('HDEL', key, unpack(type(fields) == 'table' and fields or { fields }))
    end
end

-- Writes what changed and is not written yet, and whether nodes have live IDs to where those above tell of them.
local function write_nodes()
    write_open()
    local came, gone = {}, {}
    for prefix, node in pairs(nodes) do
        if node.changed then
            if is_kept(node) then
                call('HSET', node.key, field_of(node), value_of(node))
            else
                call('HDEL', node.key, field_of(node))
            end
        end
        local is_live = node.live > 0
        if is_live ~= node.was_live and #prefix > code_bytes then
            local above = sub(prefix, 1, -code_bytes - 1)
            local key = node.above and node.above.key or bucket_of(above)
            gather(is_live and came or gone, key, head_of(above) .. sub(prefix, tail_at))
        end
    end
    write_present(came, gone)
end
