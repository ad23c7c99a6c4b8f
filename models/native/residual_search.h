/* The search, compiled once for each kind of processor.
 *
 * Before each inclusion: NAME(x), FOR_PROCESSOR (the attribute that allows its instructions), LANES, ROWS (of a tile),
 * SOME_ROWS (of a tile where there are fewer), WIDE (groups of lanes searched at once for a row alone), PART (numbers of
 * float64 in a vector; `doubles` and `singles` are vectors of as many numbers), and on vectors of LANES floats:
 *   vec, LOAD, STORE, SPREAD (a number to all lanes), MULTIPLY_ADD, SUBTRACT, MULTIPLY, LEAST (of all lanes),
 *   LESSER(a, b) and GREATER(a, b), which are b where either is NaN,
 *   AT_MOST(a, b) and NOT_ABOVE(a, b): bits of the lanes in which a <= b, and in which not a > b (so NaN counts),
 *   WHERE_AT_MOST(a, b, x, y): x in the lanes in which a <= b, else y,
 * and on `places`, vectors of as many int32: SPREAD_PLACE, LOAD_PLACES, WITH_PLACES(v, digits, places): v with these of its
 * bits replaced.
 * Where points and codewords are not float32: TERMS (how many are multiplied at once), number_of (what holds so many),
 * sum_of (a vector of sums), BEGIN_SUM, LOAD_TERMS, SPREAD_TERM, ADD_TERMS and END_SUM (to scores). VECTORS_STAY leaves the
 * vectors as they are for another inclusion.
 */

#define PARTS (SUMS / PART)

/* Scores are sums of float32, begun with the norms, if it does not say otherwise. */
#ifndef TERMS
#define TERMS 1
#define number_of float
#define sum_of vec
#define BEGIN_SUM(norms) LOAD(norms)
#define LOAD_TERMS(p) LOAD(p)
#define SPREAD_TERM(x) SPREAD(x)
#define ADD_TERMS(a, b, c) MULTIPLY_ADD(a, b, c)
#define END_SUM(sum, scale, norms) (sum)
#endif

/* float64 sums are eight, each of every eighth number, however many of them a vector holds, and then added up so. */
FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(total)(const doubles *sums)
{
    double s[SUMS] __attribute__((aligned(ALIGNMENT)));
    memcpy(s, sums, sizeof s);
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

FOR_PROCESSOR static inline __attribute__((always_inline)) comparison NAME(compare)(
    const level_table *table, int64_t padded, const double *residual, int64_t first, int64_t other)
{
    const double *one = table->codewords + first * padded, *two = table->codewords + other * padded;
    doubles gaps[PARTS] = {{0}}, spans[PARTS] = {{0}};
    for (int64_t i = 0; i < padded; i += SUMS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            const int64_t at = i + part * PART;
            const doubles a = *(const doubles *)(one + at), b = *(const doubles *)(two + at);
            const doubles x = *(const doubles *)(residual + at), apart = a - b;
            gaps[part] += apart * ((x - a) + (x - b));
            spans[part] += apart * apart;
        }
    return (comparison){NAME(total)(gaps), NAME(total)(spans)};
}

/* Takes a codeword from a residual. */
FOR_PROCESSOR static inline __attribute__((always_inline)) void NAME(take_away)(double *residual, const double *codeword,
                                                                                int64_t padded)
{
    for (int64_t i = 0; i < padded; i += PART)
        *(doubles *)(residual + i) -= *(const doubles *)(codeword + i);
}

/* The point that a residual is around a level's centre, and the square of its norm. */
FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(centred)(const double *residual,
                                                                                const double *centre, int64_t padded,
                                                                                float *point)
{
    doubles squares[PARTS] = {{0}};
    for (int64_t i = 0; i < padded; i += SUMS)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) {
            const int64_t at = i + part * PART;
            const doubles number = *(const doubles *)(residual + at) - *(const doubles *)(centre + at);
            squares[part] += number * number;
            *(singles *)(point + at) = __builtin_convertvector(number, singles);
        }
    return NAME(total)(squares);
}

#if TERMS == 2
/* Cuts a point to int16, in place: two numbers where one was. What its products with the codewords' numbers are to be
 * multiplied by to be -2 x.c. */
FOR_PROCESSOR static inline __attribute__((always_inline)) float NAME(cut)(float *point, float norm, float step,
                                                                           int64_t padded)
{
    const __m256 numbers = _mm256_set1_ps(norm > SMALLEST_NORM ? POINT_NUMBERS / norm : 0);
    for (int64_t i = 0; i < padded; i += SUMS) {
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(point + i), numbers));
        _mm_storeu_si128((__m128i *)((char *)point + 2 * i), _mm256_cvtepi32_epi16(whole));
    }
    return norm * step;
}
#define CUT(point, norm, table, padded) NAME(cut)(point, norm, (table)->step, padded)
#else
#define CUT(point, norm, table, padded) 1
#endif

/* The square of a residual's norm. */
FOR_PROCESSOR static inline __attribute__((always_inline)) double NAME(square)(const double *residual, int64_t padded)
{
    doubles squares[PARTS] = {{0}};
    for (int64_t i = 0; i < padded; i += SUMS)
        for (int part = 0; part < PARTS; part++) {
            const doubles number = *(const doubles *)(residual + i + part * PART);
            squares[part] += number * number;
        }
    return NAME(total)(squares);
}

/* What a level searches with of a row's residual. */
FOR_PROCESSOR static inline __attribute__((always_inline)) void NAME(receive)(const workspace *space,
                                                                              const level_table *table, int64_t row,
                                                                              int64_t padded)
{
    float *point = space->points + row * padded;
    space->norms[row] = sqrt(NAME(centred)(space->residuals + row * padded, table->centre, padded, point));
    space->scales[row] = CUT(point, (float)space->norms[row], table, padded);
}

/* Scores of `rows` points against `groups` groups of codewords: |c|^2 - 2 x.c, the terms in the order of the dimensions
 * whatever the tile, so that a row's scores do not depend on the rows beside it. */
FOR_PROCESSOR static inline __attribute__((always_inline)) void NAME(tile)(
    const number_of *points, const float *scales, int64_t stride, int64_t steps, const number_of *codewords,
    const float *norms, float *scores, int64_t width, const int rows, const int groups)
{
    /* Every third row has a pointer of its own, the others are one and two strides further: that many registers do. */
    const number_of *thirds[(ROWS + 2) / 3];
#pragma GCC unroll 16
    for (int third = 0; third < (rows + 2) / 3; third++) {
        thirds[third] = points + 3 * third * stride;
        __asm__("" : "+r"(thirds[third]));
    }
    sum_of sums[ROWS][WIDE];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int group = 0; group < groups; group++)
            sums[row][group] = BEGIN_SUM(norms + group * LANES);
    for (int64_t at = 0; at < steps; at++) {
        sum_of words[WIDE];
#pragma GCC unroll 16
        for (int group = 0; group < groups; group++)
            words[group] = LOAD_TERMS(codewords + (group * steps + at) * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            const sum_of number = SPREAD_TERM(thirds[row / 3][row % 3 * stride + at]);
#pragma GCC unroll 16
            for (int group = 0; group < groups; group++)
                sums[row][group] = ADD_TERMS(number, words[group], sums[row][group]);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int group = 0; group < groups; group++)
            STORE(scores + row * width + group * LANES, END_SUM(sums[row][group], scales[row], norms + group * LANES));
}

/* Scores (rows, width) of points (rows, padded). Groups come in pairs. */
FOR_PROCESSOR static void NAME(score)(const level_table *table, int64_t dimension, int64_t padded, const float *points,
                                      const float *scales, int64_t rows, float *scores)
{
    const int64_t width = table->width, groups = width / LANES, steps = (dimension + TERMS - 1) / TERMS;
    const number_of *codewords = table->packed, *numbers = (const number_of *)points;
#define TILE(n, g) \
    NAME(tile)(numbers + row * padded, scales + row, padded, steps, codewords + group * steps * LANES, \
               table->norms + group * LANES, scores + row * width + group * LANES, width, n, g)
#define TILES(n) \
    for (; row + n <= rows; row += n) \
        for (int64_t group = 0; group < groups; group += 2) \
            TILE(n, 2)
    int64_t row = 0;
    TILES(ROWS);
    TILES(SOME_ROWS);
    TILES(4);
    for (; row < rows; row++) {
        int64_t group = 0;
        for (; group + WIDE <= groups; group += WIDE)
            TILE(1, WIDE);
        for (; group < groups; group += 2)
            TILE(1, 2);
    }
#undef TILE
#undef TILES
}

/* The smallest of the numbers (width) and the next one, in float32, of which the last bits give way to where each lies
 * (see `level_table.positions`); the place of the smallest. NaN is none of them. With spans a number is a score's distance to
 * the plane: its gap to the chosen one over the span. */
FOR_PROCESSOR static inline __attribute__((always_inline)) int64_t NAME(two_least)(
    const level_table *table, const float *scores, const float *spans, float chosen, float *least, float *next)
{
    const vec origin = SPREAD(chosen);
    const places digits = SPREAD_PLACE(table->place_digits);
    vec first = SPREAD(INFINITY), second = first;
#pragma GCC unroll 4
    for (int64_t at = 0; at < table->width; at += LANES) {
        vec number = LOAD(scores + at);
        if (spans)
            number = MULTIPLY(SUBTRACT(number, origin), LOAD(spans + at));
        number = WITH_PLACES(number, digits, LOAD_PLACES(table->positions + at));
        second = LESSER(GREATER(first, number), second);
        first = LESSER(number, first);
    }
    *least = LEAST(first);
    *next = LEAST(WHERE_AT_MOST(first, SPREAD(*least), second, first));
    int32_t bits;
    memcpy(&bits, least, sizeof bits);
    return bits & table->place_digits;
}

/* The nearest codeword of a residual; where float32 leaves several, of these by differences. Negative for none. */
FOR_PROCESSOR static inline __attribute__((always_inline)) int64_t NAME(nearest)(
    const level_table *table, int64_t padded, const double *residual, const float *scores, float slack, bool *alone)
{
    float least, next;
    int64_t nearest = NAME(two_least)(table, scores, NULL, 0, &least, &next);
    const float limit = least + slack + table->place_share * fabsf(least);
    *alone = next - table->place_share * fabsf(next) > limit || (next == INFINITY && limit < INFINITY);
    if (*alone)
        return nearest;
    nearest = -1;
    const vec near = SPREAD(limit);
    for (int64_t at = 0; at < table->width; at += LANES)
        for (uint32_t bits = AT_MOST(LOAD(scores + at), near); bits; bits &= bits - 1) {
            const int64_t other = at + __builtin_ctz(bits);
            if (nearest < 0 || NAME(compare)(table, padded, residual, nearest, other).gap < 0)
                nearest = other;
        }
    return nearest;
}

/* The codeword whose plane is the nearest to a residual that has no other codeword within the slack: the nearest one
 * itself where there is no other, and -1 where float32 leaves several. */
FOR_PROCESSOR static inline __attribute__((always_inline)) int64_t NAME(behind_the_nearest_plane)(
    const level_table *table, int64_t nearest, const float *scores, float slack)
{
    float least, next;
    const int64_t other = NAME(two_least)(table, scores, table->inverse_spans + nearest * table->width, scores[nearest],
                                          &least, &next);
    if (least == INFINITY)
        return nearest;
    const float share = table->place_share, limit = least + share * fabsf(least) + 2 * slack * table->closest[nearest];
    return next - share * fabsf(next) > limit || (next == INFINITY && limit < INFINITY) ? other : -1;
}

/* The distance to the nearest plane where float32 leaves several: each that rounding may have put above the smallest
 * upper bound is measured. NaN where it is a tie. */
FOR_PROCESSOR static double NAME(margin)(const level_table *table, int64_t padded, const double *residual,
                                         int64_t nearest, const float *scores, float slack, double exact_slack,
                                         double tie)
{
    const float *spans = table->inverse_spans + nearest * table->width;
    const vec above = SPREAD(scores[nearest] - slack), below = SPREAD(scores[nearest] + slack);
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

/* One level of a tile of rows, from `first` of the block on. A step for all rows before the next one: the processor
 * has several rows' under way at once, and what a step needs was fetched during the one before. */
FOR_PROCESSOR static void NAME(search_tile)(const residual_search *search, const request *asked, workspace *space,
                                            int64_t level, int64_t start, int64_t first, int64_t rows)
{
    const int64_t dimension = search->dimension, padded = search->padded;
    const level_table *table = search->tables + level, *following = level + 1 < search->levels ? table + 1 : NULL;
    const int64_t width = table->width;
    double *residuals = space->residuals + first * padded;
    int64_t nearest[ROWS], other[ROWS];
    float slack[ROWS];
    double exact_slack[ROWS], tie[ROWS], gaps[ROWS], spans[ROWS], margins[ROWS];
    for (int64_t row = 0; row < rows; row++) {
        const double norm = space->norms[first + row], reach = norm + table->radius, square = reach * reach;
        slack[row] = TERMS == 1 ? slack_of_floats(dimension, square) : slack_of_cut(table, norm, square);
        exact_slack[row] = 2 * (dimension + 8) * DBL_EPSILON * square;
        tie[row] = TIE * reach;
        space->in_doubt[first + row] |= !(square < LARGEST_SQUARE);
    }
    NAME(score)(table, dimension, padded, space->points + first * padded, space->scales + first, rows, space->scores);
    for (int64_t row = 0; row < rows; row++) {
        bool alone = false;
        nearest[row] = -1;
        if (!space->in_doubt[first + row])
            nearest[row] = NAME(nearest)(table, padded, residuals + row * padded, space->scores + row * width,
                                         slack[row], &alone);
        other[row] = alone ? 0 : -1;
        if (nearest[row] < 0)
            continue;
        fetch(table->inverse_spans + nearest[row] * width, width * 4);
        fetch(table->codewords + nearest[row] * padded, padded * 8);
    }
    for (int64_t row = 0; row < rows; row++)
        if (other[row] == 0) {
            other[row] = NAME(behind_the_nearest_plane)(table, nearest[row], space->scores + row * width, slack[row]);
            if (other[row] >= 0)
                fetch(table->codewords + other[row] * padded, padded * 8);
        }
    for (int64_t row = 0; row < rows; row++) {
        comparison with = {INFINITY, 1};
        if (other[row] >= 0 && other[row] != nearest[row])
            with = NAME(compare)(table, padded, residuals + row * padded, nearest[row], other[row]);
        gaps[row] = with.gap;
        spans[row] = with.span;
    }
    for (int64_t row = 0; row < rows; row++) {
        margins[row] = (gaps[row] - exact_slack[row]) / (2 * sqrt(spans[row]));
        margins[row] = margins[row] > tie[row] ? margins[row] : NAN;
    }
    for (int64_t row = 0; row < rows; row++) {
        double *residual = residuals + row * padded, margin = nearest[row] < 0 ? NAN : margins[row];
        if (nearest[row] >= 0 && other[row] < 0)
            margin = NAME(margin)(table, padded, residual, nearest[row], space->scores + row * width, slack[row],
                                  exact_slack[row], tie[row]);
        space->in_doubt[first + row] = margin != margin;
        const int64_t code = margin != margin ? 0 : nearest[row];
        NAME(take_away)(residual, table->codewords + code * padded, padded);
        if (following)
            NAME(receive)(space, following, first + row, padded);
        double *smallest = space->smallest + first + row;
        *smallest = *smallest <= margin ? *smallest : *smallest != *smallest ? NAN : margin;
        write_level(asked, search, start + first + row, level, code, margin, residual);
    }
}

/* All levels of rows [from, to), a block of rows at a time; how many rows are left in doubt, or -1 without memory. */
FOR_PROCESSOR static int64_t NAME(quantize)(const residual_search *search, const request *asked, int64_t from,
                                            int64_t to)
{
    const int64_t padded = search->padded;
    const int64_t block = to - from < BLOCK_ROWS ? to - from : BLOCK_ROWS;
    workspace space;
    if (!take(&space, search, block, ROWS))
        return -1;
    int64_t doubtful = 0;
    for (int64_t start = from; start < to; start += block) {
        const int64_t rows = to - start < block ? to - start : block;
        read_latents(asked, search, start, rows, &space);
        for (int64_t row = 0; row < rows; row++)
            NAME(receive)(&space, search->tables, row, padded);
        for (int64_t level = 0; level < search->levels; level++)
            for (int64_t first = 0; first < rows; first += ROWS)
                NAME(search_tile)(search, asked, &space, level, start, first, rows - first < ROWS ? rows - first : ROWS);
        for (int64_t row = 0; row < rows; row++) {
            doubtful += space.in_doubt[row];
            write_number(asked, asked->smallest, start + row, space.smallest[row]);
            write_number(asked, asked->errors, start + row, NAME(square)(space.residuals + row * padded, padded));
        }
    }
    free(space.memory);
    return doubtful;
}

#undef NAME
#undef FOR_PROCESSOR
#undef PARTS
#undef TERMS
#undef CUT
#undef number_of
#undef sum_of
#undef BEGIN_SUM
#undef LOAD_TERMS
#undef SPREAD_TERM
#undef ADD_TERMS
#undef END_SUM
#ifndef VECTORS_STAY
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
#undef LOAD_PLACES
#undef WITH_PLACES
#undef WHERE_AT_MOST
#undef LEAST
#undef GREATER
#undef PART
#undef SOME_ROWS
#undef doubles
#undef singles
#endif
