/* The search, compiled once for each kind of processor.
 *
 * Before each inclusion: NAME(x), FOR_PROCESSOR (the attribute that allows its instructions), LANES, ROWS (of a tile),
 * WIDE (groups of lanes searched at once for a row alone), and on vectors of LANES floats:
 *   vec, LOAD, STORE, SPREAD (a number to all lanes), MULTIPLY_ADD, SUBTRACT, MULTIPLY, LEAST (of all lanes),
 *   LESSER(a, b) and GREATER(a, b), which are b where either is NaN,
 *   AT_MOST(a, b) and NOT_ABOVE(a, b): bits of the lanes in which a <= b, and in which not a > b (so NaN counts),
 *   WHERE_AT_MOST(a, b, x, y): x in the lanes in which a <= b, else y,
 * and on `places`, vectors of as many int32: SPREAD_PLACE, ADD_PLACES, STORE_PLACES, WHERE_LESS(a, b, x, y).
 */

FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(total)(const doubles *sums)
{
    const double *s = (const double *)sums;
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

FOR_PROCESSOR static inline __attribute__((always_inline)) comparison NAME(compare)(const level_table *table, int64_t padded,
                                                                const double *residual, int64_t first, int64_t other)
{
    const double *one = table->codewords + first * padded, *two = table->codewords + other * padded;
    doubles gaps = {0}, spans = {0};
    for (int64_t i = 0; i < padded; i += DOUBLES) {
        const doubles a = *(const doubles *)(one + i), b = *(const doubles *)(two + i);
        const doubles x = *(const doubles *)(residual + i), apart = a - b;
        gaps += apart * ((x - a) + (x - b));
        spans += apart * apart;
    }
    return (comparison){NAME(total)(&gaps), NAME(total)(&spans)};
}

/* Takes a codeword (or none) from a residual, and centres what is left for the next level (or not); the next reach. */
FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(advance)(
    double *residual, const double *codeword, const level_table *next, int64_t dimension, int64_t padded, float *point)
{
    doubles squares = {0};
    for (int64_t i = 0; i < padded; i += DOUBLES) {
        doubles numbers = *(const doubles *)(residual + i);
        if (codeword) {
            numbers -= *(const doubles *)(codeword + i);
            *(doubles *)(residual + i) = numbers;
        }
        if (!next)
            continue;
        const doubles centred = numbers - *(const doubles *)(next->centre + i);
        squares += centred * centred;
        if (i + DOUBLES <= dimension) {
            const floats single = __builtin_convertvector(centred, floats);
            memcpy(point + i, &single, sizeof single);
        } else
            for (int64_t at = i; at < dimension; at++)
                point[at] = (float)centred[at - i];
    }
    return next ? sqrt(NAME(total)(&squares)) + next->radius : 0;
}

FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(square)(const double *numbers, int64_t padded)
{
    doubles squares = {0};
    for (int64_t i = 0; i < padded; i += DOUBLES)
        squares += *(const doubles *)(numbers + i) * *(const doubles *)(numbers + i);
    return NAME(total)(&squares);
}

/* Scores of `rows` points against `groups` groups of codewords: |c|^2 - 2 x.c, the terms in the order of the dimensions
 * whatever the tile, so that a row's scores do not depend on the rows beside it. */
FOR_PROCESSOR static inline __attribute__((always_inline)) void NAME(tile)(
    const float *points, int64_t dimension, const float *codewords, const float *norms, float *scores, int64_t width,
    const int rows, const int groups)
{
    vec sums[ROWS][WIDE];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int group = 0; group < groups; group++)
            sums[row][group] = LOAD(norms + group * LANES);
    for (int64_t at = 0; at < dimension; at++) {
        vec words[WIDE];
#pragma GCC unroll 16
        for (int group = 0; group < groups; group++)
            words[group] = LOAD(codewords + (group * dimension + at) * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            const vec number = SPREAD(points[row * dimension + at]);
#pragma GCC unroll 16
            for (int group = 0; group < groups; group++)
                sums[row][group] = MULTIPLY_ADD(number, words[group], sums[row][group]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int group = 0; group < groups; group++)
            STORE(scores + row * width + group * LANES, sums[row][group]);
}

/* Scores (rows, width) of points (rows, d). Groups come in pairs. */
FOR_PROCESSOR static void NAME(score)(const level_table *table, int64_t dimension, const float *points, int64_t rows,
                                      float *scores)
{
    const int64_t width = table->width, groups = width / LANES;
#define TILE(at, n, g) \
    NAME(tile)(points + (at) * dimension, dimension, table->packed + group * dimension * LANES, \
               table->norms + group * LANES, scores + (at) * width + group * LANES, width, n, g)
    if (rows == ROWS) {
        for (int64_t group = 0; group < groups; group += 2)
            TILE(0, ROWS, 2);
        return;
    }
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4)
        for (int64_t group = 0; group < groups; group += 2)
            TILE(row, 4, 2);
    for (; row < rows; row++) {
        int64_t group = 0;
        for (; group + WIDE <= groups; group += WIDE)
            TILE(row, 1, WIDE);
        for (; group < groups; group += 2)
            TILE(row, 1, 2);
    }
#undef TILE
}

/* The smallest of the numbers (width) and the next one, in float32; where it lies, or -1 where equal ones do. NaN is
 * none of them. With spans a number is a score's distance to the plane: its gap to the chosen one over the span. */
FOR_PROCESSOR static inline __attribute__((always_inline)) int64_t NAME(two_least)(
    const float *scores, const float *spans, float chosen, int64_t width, float *least, float *next)
{
    const vec origin = SPREAD(chosen);
    vec first = SPREAD(INFINITY), second = first;
    places at_first = SPREAD_PLACE(0), place = at_first;
    for (int64_t at = 0; at < width; at += LANES) {
        vec number = LOAD(scores + at);
        if (spans)
            number = MULTIPLY(SUBTRACT(number, origin), LOAD(spans + at));
        second = LESSER(GREATER(first, number), second);
        at_first = WHERE_LESS(number, first, place, at_first);
        first = LESSER(number, first);
        place = ADD_PLACES(place, SPREAD_PLACE(LANES));
    }
    *least = LEAST(first);
    const vec smallest = SPREAD(*least);
    const uint32_t lanes = AT_MOST(first, smallest);
    *next = LEAST(WHERE_AT_MOST(first, smallest, second, first));
    int32_t found[LANES] __attribute__((aligned(64)));
    STORE_PLACES(found, at_first);
    return lanes && !(lanes & (lanes - 1)) ? found[__builtin_ctz(lanes)] + __builtin_ctz(lanes) : -1;
}

/* The nearest codeword of a residual; where float32 leaves several, of these by differences. Negative for none. */
FOR_PROCESSOR static inline __attribute__((always_inline)) int64_t NAME(nearest)(
    const level_table *table, int64_t padded, const double *residual, const float *scores, float slack, bool *alone)
{
    float least, next;
    int64_t nearest = NAME(two_least)(scores, NULL, 0, table->width, &least, &next);
    *alone = nearest >= 0 && next > least + slack;
    if (*alone)
        return nearest;
    nearest = -1;
    const vec near = SPREAD(least + slack);
    for (int64_t at = 0; at < table->width; at += LANES)
        for (uint32_t bits = AT_MOST(LOAD(scores + at), near); bits; bits &= bits - 1) {
            const int64_t other = at + __builtin_ctz(bits);
            if (nearest < 0 || NAME(compare)(table, padded, residual, nearest, other).gap < 0)
                nearest = other;
        }
    return nearest;
}

/* The residual's distance to the nearest plane, NaN where it is a tie. `alone`: no other codeword is within the slack. */
FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(margin)(
    const level_table *table, int64_t padded, const double *residual, int64_t nearest, bool alone, const float *scores,
    float slack, double exact_slack, double tie)
{
    const float *spans = table->inverse_spans + nearest * table->width;
    const float chosen = scores[nearest];
    if (alone) {
        float least, next;
        const int64_t other = NAME(two_least)(scores, spans, chosen, table->width, &least, &next);
        if (least == INFINITY)
            return INFINITY;
        if (other >= 0 && next > least + 2 * slack * table->closest[nearest]) {
            const comparison with = NAME(compare)(table, padded, residual, nearest, other);
            const double distance = (with.gap - exact_slack) / (2 * sqrt(with.span));
            return distance > tie ? distance : NAN;
        }
    }
    /* Several planes may be the nearest: each that rounding may have put above the smallest upper bound is measured. */
    const vec above = SPREAD(chosen - slack), below = SPREAD(chosen + slack);
    vec planes = SPREAD(INFINITY);
    for (int64_t at = 0; at < table->width; at += LANES)
        planes = LESSER(MULTIPLY(SUBTRACT(LOAD(scores + at), above), LOAD(spans + at)), planes);
    const vec limit = SPREAD(LEAST(planes));
    double margin = INFINITY;
    for (int64_t at = 0; at < table->width; at += LANES) {
        const vec lower = MULTIPLY(SUBTRACT(LOAD(scores + at), below), LOAD(spans + at));
        for (uint32_t bits = NOT_ABOVE(lower, limit); bits; bits &= bits - 1) {
            const int64_t other = at + __builtin_ctz(bits);
            if (other == nearest || table->norms[other] == INFINITY)
                continue;
            const comparison with = NAME(compare)(table, padded, residual, nearest, other);
            const double distance = (with.gap - exact_slack) / (2 * sqrt(with.span));
            if (!(distance > tie))
                return NAN;
            margin = distance < margin ? distance : margin;
        }
    }
    return margin;
}

/* One level of a tile of rows, from `first` of the block on. */
FOR_PROCESSOR static void NAME(search_tile)(const residual_search *search, const request *asked, workspace *space,
                                            int64_t level, int64_t start, int64_t first, int64_t rows)
{
    const int64_t dimension = search->dimension, padded = search->padded;
    const level_table *table = search->tables + level, *next = level + 1 < search->levels ? table + 1 : NULL;
    int64_t nearest[ROWS];
    float slack[ROWS];
    bool alone[ROWS];
    NAME(score)(table, dimension, space->points + first * dimension, rows, space->scores);
    for (int64_t row = 0; row < rows; row++) {
        const double square = space->reach[first + row] * space->reach[first + row];
        slack[row] = (float)(4 * (dimension + 8) * (FLT_EPSILON * square + FLT_MIN));
        nearest[row] = space->in_doubt[first + row] || !(square < LARGEST_SQUARE)
                           ? -1
                           : NAME(nearest)(table, padded, space->residuals + (first + row) * padded,
                                           space->scores + row * table->width, slack[row], alone + row);
        if (nearest[row] < 0)
            continue;
        const char *spans = (const char *)(table->inverse_spans + nearest[row] * table->width);
        for (int64_t at = 0; at < table->width * 4; at += ALIGNMENT)
            __builtin_prefetch(spans + at);
    }
    for (int64_t row = 0; row < rows; row++) {
        double *residual = space->residuals + (first + row) * padded;
        const double reach = space->reach[first + row];
        double margin = NAN;
        if (nearest[row] >= 0)
            margin = NAME(margin)(table, padded, residual, nearest[row], alone[row], space->scores + row * table->width,
                                  slack[row], 2 * (dimension + 8) * DBL_EPSILON * reach * reach, TIE * reach);
        const bool in_doubt = margin != margin;
        space->in_doubt[first + row] = in_doubt;
        const int64_t code = in_doubt ? 0 : nearest[row];
        space->reach[first + row] = NAME(advance)(residual, table->codewords + code * padded, next, dimension, padded,
                                                  space->points + (first + row) * dimension);
        write_level(asked, search, start + first + row, level, code, margin, residual);
    }
}

/* All levels of rows [from, to), a block of rows at a time; how many rows are left in doubt, or -1 without memory. */
FOR_PROCESSOR static int64_t NAME(quantize)(const residual_search *search, const request *asked, int64_t from,
                                            int64_t to)
{
    const int64_t dimension = search->dimension, padded = search->padded;
    const int64_t block = to - from < BLOCK_ROWS ? to - from : BLOCK_ROWS;
    workspace space;
    if (!take(&space, search, block, ROWS))
        return -1;
    int64_t doubtful = 0;
    for (int64_t start = from; start < to; start += block) {
        const int64_t rows = to - start < block ? to - start : block;
        read_latents(asked, search, start, rows, &space);
        for (int64_t row = 0; row < rows; row++)
            space.reach[row] = NAME(advance)(space.residuals + row * padded, NULL, search->tables, dimension, padded,
                                             space.points + row * dimension);
        for (int64_t level = 0; level < search->levels; level++)
            for (int64_t first = 0; first < rows; first += ROWS)
                NAME(search_tile)(search, asked, &space, level, start, first, rows - first < ROWS ? rows - first : ROWS);
        for (int64_t row = 0; row < rows; row++) {
            doubtful += space.in_doubt[row];
            if (asked->errors)
                asked->errors[start + row] = NAME(square)(space.residuals + row * padded, padded);
        }
    }
    free(space.memory);
    return doubtful;
}

#undef NAME
#undef FOR_PROCESSOR
#undef LANES
#undef ROWS
#undef WIDE
#undef vec
#undef LOAD
#undef STORE
#undef SPREAD
#undef MULTIPLY_ADD
#undef SUBTRACT
#undef MULTIPLY
#undef LESSER
#undef AT_MOST
#undef NOT_ABOVE
#undef places
#undef SPREAD_PLACE
#undef ADD_PLACES
#undef STORE_PLACES
#undef WHERE_LESS
#undef WHERE_AT_MOST
#undef LEAST
#undef GREATER
