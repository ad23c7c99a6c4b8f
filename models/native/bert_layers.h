/* The forward pass for one width, in float32 or float64. Before each inclusion: WIDTH, NAME(x), EXACT, and AVX-512 allowed. */

#include "bert_products.h"

/* Where rows of a share are worked on. Query, key and value are the whole share's, as a row's attention takes in the keys
 * of others; all else is of these rows alone. */
typedef struct {
    const request *asked;
    int64_t first, last, start; /* the share's texts, and where the word pieces of the first one begin */
    int64_t all, from, rows;    /* rows of the share; the first of these, and how many they are */
    REAL *x, *query, *inner;    /* (rows, D), (3, all, D), (4, rows, D) */
    int16_t *cut;               /* (4, rows, D); or none */
    float *scale;               /* (4, rows) */
} NAME(place);

/* Layer norm of a row in place; norm is its weight and bias (2, WIDTH). */
INLINE void NAME(normalize)(REAL *row, const float *norm, REAL epsilon)
{
    VECTOR sums = OP(setzero)(), squares = OP(setzero)();
    for (int i = 0; i < WIDTH; i += LANES)
        sums = OP(add)(sums, OP(loadu)(row + i));
    const VECTOR mean = OP(set1)(OP(reduce_add)(sums) / WIDTH);
    for (int i = 0; i < WIDTH; i += LANES) {
        const VECTOR apart = OP(sub)(OP(loadu)(row + i), mean);
        squares = OP(fmadd)(apart, apart, squares);
    }
    const VECTOR scale = OP(set1)(1 / ROOT(OP(reduce_add)(squares) / WIDTH + epsilon));
    for (int i = 0; i < WIDTH; i += LANES) {
        const VECTOR apart = OP(mul)(OP(sub)(OP(loadu)(row + i), mean), scale);
        OP(storeu)(row + i, OP(fmadd)(apart, GIVEN(norm + i), GIVEN(norm + WIDTH + i)));
    }
}

/* A word piece's row before the first layer. */
INLINE void NAME(look_up)(const packed_bert *bert, int64_t piece, int64_t position, REAL *row)
{
    const float *word = bert->words + piece * WIDTH, *at = bert->places + position * WIDTH, *type = bert->type;
    for (int64_t i = 0; i < WIDTH; i++)
        row[i] = word[i] + ((REAL)at[i] + type[i]);
    NAME(normalize)(row, bert->norm, (REAL)bert->epsilon);
}

/* Weights of attention, in place, of a row of scores; those beyond `length` up to its vector become 0. */
INLINE void NAME(soften)(REAL *scores, int64_t length, REAL scale)
{
    const int64_t whole = length / LANES * LANES;
    const MASK rest = (MASK)((1u << (length - whole)) - 1);
    VECTOR largest = OP(set1)(-INFINITY), sums = OP(setzero)();
    for (int64_t j = 0; j < whole; j += LANES)
        largest = OP(max)(largest, OP(loadu)(scores + j));
    largest = OP(mask_max)(largest, rest, largest, OP(loadu)(scores + whole));
    const VECTOR most = OP(set1)(OP(reduce_max)(largest)), scales = OP(set1)(scale);
    for (int64_t j = 0; j < length; j += LANES) {
        VECTOR power = NAME(exponential)(OP(mul)(OP(sub)(OP(loadu)(scores + j), most), scales));
        if (j == whole)
            power = OP(maskz_mov)(rest, power);
        sums = OP(add)(sums, power);
        OP(storeu)(scores + j, power);
    }
    const VECTOR share = OP(set1)(1 / OP(reduce_add)(sums));
    for (int64_t j = 0; j < length; j += LANES)
        OP(storeu)(scores + j, OP(mul)(OP(loadu)(scores + j), share));
}

/* One head's attention within one text, of its queries from `from` to `to`; the contexts take their place. Arrays (length,
 * WIDTH) of this head. */
static void NAME(attend)(int64_t length, int64_t size, int64_t from, int64_t to, REAL *queries, const REAL *keys,
                         const REAL *values, REAL *turned)
{
    _Alignas(64) REAL scores[TILE * SCORES];
    const REAL scale = 1 / ROOT((REAL)size);
    const int64_t groups = (length + PANEL - 1) / PANEL;
    for (int64_t j = 0; j < groups * PANEL; j += LANES)
        for (int64_t i = 0; i < size; i += LANES)
            NAME(turn)(keys + j * WIDTH + i, WIDTH, length - j, turned + (j / PANEL * size + i) * PANEL + j % PANEL);
    EACH_BLOCK(to - from) {
        REAL *own = queries + (from + first) * WIDTH;
        const int rows = (int)(last - first);
        for (int64_t group = 0; group < groups; group++)
            NAME(score)(rows, size, own, turned + group * size * PANEL, scores + group * PANEL);
        for (int i = 0; i < rows; i++)
            NAME(soften)(scores + i * SCORES, length, scale);
        for (int64_t i = 0; i < size; i += PANEL)
            NAME(gather)(rows, length, scores, values + i, own + i);
    }
}

/* A stage: cuts rows, or does nothing where there is no place for them. */
INLINE void NAME(cut_rows)(stage *own, const NAME(place) *at, int64_t rows, const REAL *numbers)
{
#if !EXACT
    if (!at->cut)
        return;
    EACH_RANGE(own, rows, 16)
        for (int64_t row = from; row < to; row++)
            at->scale[row] = NAME(cut)(numbers + row * WIDTH, at->cut + row * WIDTH);
#else
    (void)own, (void)at, (void)rows, (void)numbers;
#endif
}

/* A row, which is cut where there is a place. */
INLINE void NAME(cut_row)(const NAME(place) *at, int64_t row)
{
#if !EXACT
    if (at->cut)
        at->scale[row] = NAME(cut)(at->x + row * WIDTH, at->cut + row * WIDTH);
#else
    (void)at, (void)row;
#endif
}

/* A stage: layer norm of rows, which are cut where there is a place. */
INLINE void NAME(normalize_rows)(stage *own, const NAME(place) *at, const float *norm)
{
    EACH_RANGE(own, at->rows, 16)
        for (int64_t row = from; row < to; row++) {
            NAME(normalize)(at->x + row * WIDTH, norm, (REAL)at->asked->bert->epsilon);
            NAME(cut_row)(at, row);
        }
}

/* Products with panels from `from` to `to` of a layer's squares from `square` on, which end as they are to: c, (apart, WIDTH)
 * of each square. The left sides are a (rows, WIDTH); where the pass cuts, those that were cut, from row `row` on. */
INLINE void NAME(multiply)(const NAME(place) *at, int64_t layer, int64_t square, const int ends, int64_t from, int64_t to,
                           const REAL *a, int64_t row, REAL *c, int64_t apart, const float *bias)
{
    const packed_bert *bert = at->asked->bert;
    const int64_t first = layer * SQUARES + square;
#if !EXACT
    if (at->cut) {
        NAME(cut_products)(ends == GELU   ? NAME(cut_gelu)
                           : ends == ADDS ? NAME(cut_adding)
                                          : NAME(cut_plain),
                           bert->cut_weights + first * WIDTH * WIDTH, bert->scales + first * WIDTH, from, to, at->rows,
                           at->cut + row * WIDTH, at->scale + row, c, apart, bias);
        return;
    }
#else
    (void)row;
#endif
    NAME(products)(ends == GELU ? NAME(gelu_tile) : ends == ADDS ? NAME(adding_tile) : NAME(plain_tile),
                   bert->weights + first * WIDTH * WIDTH, from, to, at->rows, a, c, apart, bias);
}

/* Rows before the first layer. */
static stage *NAME(begin)(const NAME(place) *at, stage *own)
{
    const request *asked = at->asked;
    EACH_RANGE(own, at->rows, 16)
        for (int64_t text = at->first, row = -at->from; text < at->last; row += asked->lengths[text++])
            for (int64_t i = row < from ? from - row : 0; i < asked->lengths[text] && row + i < to; i++) {
                NAME(look_up)(asked->bert, asked->pieces[at->start + at->from + row + i], i, at->x + (row + i) * WIDTH);
                NAME(cut_row)(at, row + i);
            }
    return after(own);
}

/* A layer's first step: query, key and value of rows. */
static stage *NAME(project)(const NAME(place) *at, int64_t layer, stage *own)
{
    EACH_RANGE(own, 3 * WIDTH / PANEL, 3)
        NAME(multiply)(at, layer, 0, AS_IT_IS, from, to, at->x, 0, at->query + at->from * WIDTH, at->all,
                       at->asked->bert->vectors + layer * VECTORS * WIDTH);
    return after(own);
}

/* Attention of rows, in the place of their queries. */
static stage *NAME(attend_rows)(const NAME(place) *at, stage *own)
{
    const request *asked = at->asked;
    const int64_t head = WIDTH / asked->bert->heads, square = at->all * WIDTH, end = at->from + at->rows;
    _Alignas(64) REAL turned[MOST_TOKENS * MOST_HEAD];
    EACH_RANGE(own, asked->bert->heads, 1)
        for (int64_t h = from; h < to; h++)
            for (int64_t text = at->first, row = 0; text < at->last && row < end; row += asked->lengths[text++]) {
                const int64_t length = asked->lengths[text];
                const int64_t begin = row < at->from ? at->from - row : 0, stop = row + length > end ? end - row : length;
                REAL *query = at->query + row * WIDTH + h * head;
                if (begin < stop)
                    NAME(attend)(length, head, begin, stop, query, query + square, query + 2 * square, turned);
            }
    return after(own);
}

/* What a layer does with rows behind their attention. */
static stage *NAME(transform)(const NAME(place) *at, int64_t layer, stage *own)
{
    const int64_t panels = WIDTH / PANEL, rows = at->rows;
    const float *vectors = at->asked->bert->vectors + layer * VECTORS * WIDTH;
    const REAL *context = at->query + at->from * WIDTH;
    NAME(cut_rows)(own, at, rows, context);
    own = after(own);
    EACH_RANGE(own, panels, 2)
        NAME(multiply)(at, layer, 3, ADDS, from, to, context, 0, at->x, rows, vectors + BIAS_ATTENDED * WIDTH);
    own = after(own);
    NAME(normalize_rows)(own, at, vectors + NORM_ATTENDED * WIDTH);
    own = after(own);
    EACH_RANGE(own, 4 * panels, 4)
        NAME(multiply)(at, layer, 4, GELU, from, to, at->x, 0, at->inner, rows, vectors + BIAS_UP * WIDTH);
    own = after(own);
    NAME(cut_rows)(own, at, 4 * rows, at->inner);
    own = after(own);
    EACH_RANGE(own, panels, 2)
        for (int64_t s = 0; s < 4; s++)
            NAME(multiply)(at, layer, 8 + s, ADDS, from, to, at->inner + s * rows * WIDTH, s * rows, at->x, rows,
                           s == 0 ? vectors + BIAS_DOWN * WIDTH : NULL);
    own = after(own);
    NAME(normalize_rows)(own, at, vectors + NORM * WIDTH);
    return after(own);
}

/* The embeddings of a share's texts, whose last rows are at `x`. */
static void NAME(pool)(const NAME(place) *at, const REAL *x)
{
    const request *asked = at->asked;
    for (int64_t text = at->first; text < at->last; x += WIDTH * asked->lengths[text++]) {
        REAL *pooled = (REAL *)asked->embeddings + text * WIDTH;
        memcpy(pooled, x, WIDTH * sizeof *x);
        if (asked->bert->pools_mean) {
            for (int64_t row = 1; row < asked->lengths[text]; row++)
                for (int64_t i = 0; i < WIDTH; i++)
                    pooled[i] += x[row * WIDTH + i];
            for (int64_t i = 0; i < WIDTH; i++)
                pooled[i] /= (REAL)asked->lengths[text];
        }
        if (asked->bert->normalizes) {
            double squares = 0;
            for (int64_t i = 0; i < WIDTH; i++)
                squares += (double)pooled[i] * pooled[i];
            const REAL norm = (REAL)sqrt(squares), divisor = norm < (REAL)1e-12 ? (REAL)1e-12 : norm;
            for (int64_t i = 0; i < WIDTH; i++)
                pooled[i] /= divisor;
        }
    }
}

/* All layers of a share: alone, or together by stages. */
static void NAME(embed_share)(const NAME(place) *at, stage *own)
{
    own = NAME(begin)(at, own);
    for (int64_t layer = 0; layer < at->asked->bert->layers; layer++) {
        own = NAME(project)(at, layer, own);
        own = NAME(attend_rows)(at, own);
        own = NAME(transform)(at, layer, own);
    }
}

/* The same together by parts, of which this thread takes the one of its number if nobody was faster. */
static void NAME(embed_parts)(const NAME(place) *share, part *parts, int count, int thread)
{
    const request *asked = share->asked;
    for (int step, next = thread; (next = next_part(parts, count, next, 2 * (int)asked->bert->layers, &step)) >= 0;) {
        const int64_t from = share->rows * next / count, to = share->rows * (next + 1) / count;
        const NAME(place) at = {.asked = asked, .first = share->first, .last = share->last, .start = share->start,
                                .all = share->all, .from = from, .rows = to - from, .x = share->x + from * WIDTH,
                                .query = share->query, .inner = share->inner + 4 * from * WIDTH,
                                .cut = share->cut ? share->cut + 4 * from * WIDTH : NULL,
                                .scale = share->scale + 4 * from};
        const int64_t layer = step / 2;
        if (step == 0)
            NAME(begin)(&at, NULL);
        if (step % 2 == 0)
            NAME(project)(&at, layer, NULL);
        else {
            NAME(attend_rows)(&at, NULL);
            atomic_store_explicit(&parts[next].attended, (int)layer + 1, memory_order_release);
            NAME(transform)(&at, layer, NULL);
        }
        atomic_store_explicit(&parts[next].done, step + 1, memory_order_release);
    }
}

/* A thread's work: a part of the one share, or share after share. */
static void NAME(embed)(request *asked, int thread)
{
    REAL *room = (REAL *)asked->room + (asked->together ? 0 : thread * asked->room_each);
    int64_t mine = asked->together ? 0 : atomic_fetch_add(&asked->next_share, 1);
    for (int64_t share = 0, first = 0, start = 0; first < asked->texts; share++) {
        int64_t rows = asked->lengths[first], last = first + 1;
        while (last < asked->texts && rows + asked->lengths[last] <= asked->rows)
            rows += asked->lengths[last++];
        if (share == mine) {
            const NAME(place) at = {.asked = asked, .first = first, .last = last, .start = start, .all = rows,
                                    .rows = rows, .x = room, .query = room + rows * WIDTH,
                                    .inner = room + 4 * rows * WIDTH,
                                    .cut = asked->precision == INT16 ? (int16_t *)(room + 8 * rows * WIDTH) : NULL,
                                    .scale = (float *)(room + 10 * rows * WIDTH)};
            if (asked->parts)
                NAME(embed_parts)(&at, asked->parts, asked->threads, thread);
            else
                NAME(embed_share)(&at, asked->stages);
            if (thread == 0 || !asked->together)
                NAME(pool)(&at, at.x);
            mine = asked->together ? -1 : atomic_fetch_add(&asked->next_share, 1);
        }
        first = last;
        start += rows;
    }
}

#undef REAL
#undef VECTOR
#undef MASK
#undef LANES
#undef OP
#undef BELOW
#undef GIVEN
#undef ROOT
#undef INLINE
#undef TILE
#undef COLUMNS
#undef EACH_BLOCK
#undef SCORES
