/* The forward pass for one width. Before each inclusion: WIDTH, NAME(x), and AVX-512 allowed. */

#include "bert_products.h"

/* Layer norm of a row in place; norm is its weight and bias (2, WIDTH). */
INLINE void NAME(normalize)(float *row, const float *norm, float epsilon)
{
    __m512 sums = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < WIDTH; i += LANES)
        sums = _mm512_add_ps(sums, _mm512_loadu_ps(row + i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sums) / WIDTH);
    for (int i = 0; i < WIDTH; i += LANES) {
        const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(row + i), mean);
        squares = _mm512_fmadd_ps(apart, apart, squares);
    }
    const __m512 scale = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / WIDTH + epsilon));
    for (int i = 0; i < WIDTH; i += LANES) {
        const __m512 apart = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row + i), mean), scale);
        _mm512_storeu_ps(row + i, _mm512_fmadd_ps(apart, _mm512_loadu_ps(norm + i), _mm512_loadu_ps(norm + WIDTH + i)));
    }
}

/* A word piece's row before the first layer. */
INLINE void NAME(look_up)(const packed_bert *bert, int64_t piece, int64_t position, float *row)
{
    const float *word = bert->words + piece * WIDTH, *at = bert->places + position * WIDTH;
    for (int64_t i = 0; i < WIDTH; i++)
        row[i] = word[i] + at[i];
    NAME(normalize)(row, bert->norm, bert->epsilon);
}

/* Weights of attention, in place, of a row of scores; those beyond `length` up to its vector become 0. */
INLINE void NAME(soften)(float *scores, int64_t length, float scale)
{
    const int64_t whole = length / LANES * LANES;
    const __mmask16 rest = (__mmask16)((1u << (length - whole)) - 1);
    __m512 largest = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < whole; j += LANES)
        largest = _mm512_max_ps(largest, _mm512_loadu_ps(scores + j));
    largest = _mm512_mask_max_ps(largest, rest, largest, _mm512_loadu_ps(scores + whole));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(largest)), scales = _mm512_set1_ps(scale);
    for (int64_t j = 0; j < length; j += LANES) {
        __m512 power = exponential(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), most), scales));
        if (j == whole)
            power = _mm512_maskz_mov_ps(rest, power);
        sums = _mm512_add_ps(sums, power);
        _mm512_storeu_ps(scores + j, power);
    }
    const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sums));
    for (int64_t j = 0; j < length; j += LANES)
        _mm512_storeu_ps(scores + j, _mm512_mul_ps(_mm512_loadu_ps(scores + j), share));
}

/* One head's attention within one text, of its queries from `from` to `to`; the contexts take their place. Arrays (length,
 * WIDTH) of this head. */
static void NAME(attend)(int64_t length, int64_t size, int64_t from, int64_t to, float *queries, const float *keys,
                         const float *values, float *turned)
{
    _Alignas(64) float scores[TILE * SCORES];
    const float scale = 1 / sqrtf((float)size);
    const int64_t groups = (length + PANEL - 1) / PANEL;
    for (int64_t j = 0; j < groups * PANEL; j += LANES)
        for (int64_t i = 0; i < size; i += LANES)
            turn(keys + j * WIDTH + i, WIDTH, length - j, turned + (j / PANEL * size + i) * PANEL + j % PANEL);
    const int64_t blocks = (to - from + TILE - 1) / TILE;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t begin = from + (to - from) * block / blocks;
        const int rows = (int)(from + (to - from) * (block + 1) / blocks - begin);
        float *own = queries + begin * WIDTH;
        for (int64_t group = 0; group < groups; group++)
            NAME(score)(rows, size, own, turned + group * size * PANEL, scores + group * PANEL);
        for (int i = 0; i < rows; i++)
            NAME(soften)(scores + i * SCORES, length, scale);
        for (int64_t i = 0; i < size; i += PANEL)
            NAME(gather)(rows, length, scores, values + i, own + i);
    }
}

/* A stage: cuts rows, or does nothing where there is no place for them. */
INLINE void NAME(cut_rows)(stage *own, int16_t *cut, int64_t rows, const float *numbers, float *scale)
{
    if (!cut)
        return;
    EACH_RANGE(own, rows, 16)
        for (int64_t row = from; row < to; row++)
            scale[row] = NAME(cut)(numbers + row * WIDTH, cut + row * WIDTH);
}

/* A stage: layer norm of rows, which are cut where there is a place. */
INLINE void NAME(normalize_rows)(stage *own, const place *at, const float *norm)
{
    EACH_RANGE(own, at->rows, 16)
        for (int64_t row = from; row < to; row++) {
            NAME(normalize)(at->x + row * WIDTH, norm, at->asked->bert->epsilon);
            if (at->cut)
                at->scale[row] = NAME(cut)(at->x + row * WIDTH, at->cut + row * WIDTH);
        }
}

/* Rows before the first layer. */
static stage *NAME(begin)(const place *at, stage *own)
{
    const request *asked = at->asked;
    EACH_RANGE(own, at->rows, 16)
        for (int64_t text = at->first, row = -at->from; text < at->last; row += asked->lengths[text++])
            for (int64_t i = row < from ? from - row : 0; i < asked->lengths[text] && row + i < to; i++) {
                float *x = at->x + (row + i) * WIDTH;
                NAME(look_up)(asked->bert, asked->pieces[at->start + at->from + row + i], i, x);
                if (at->cut)
                    at->scale[row + i] = NAME(cut)(x, at->cut + (row + i) * WIDTH);
            }
    return after(own);
}

/* A layer's first step: query, key and value of rows. */
static stage *NAME(project)(const place *at, int64_t layer, stage *own)
{
    const packed_bert *bert = at->asked->bert;
    const int64_t squares = layer * SQUARES;
    const float *vectors = bert->vectors + layer * VECTORS * WIDTH;
    float *query = at->query + at->from * WIDTH;
    EACH_RANGE(own, 3 * WIDTH / PANEL, 3)
        if (at->cut)
            NAME(cut_products)(NAME(cut_plain), bert->cut_weights + squares * WIDTH * WIDTH, bert->scales + squares * WIDTH,
                               from, to, at->rows, at->cut, at->scale, query, at->all, vectors);
        else
            NAME(products)(NAME(plain), bert->weights + squares * WIDTH * WIDTH, from, to, at->rows, at->x, query, at->all,
                           vectors);
    return after(own);
}

/* Attention of rows, in the place of their queries. */
static stage *NAME(attend_rows)(const place *at, stage *own)
{
    const request *asked = at->asked;
    const int64_t head = WIDTH / asked->bert->heads, square = at->all * WIDTH, end = at->from + at->rows;
    _Alignas(64) float turned[MOST_TOKENS * MOST_HEAD];
    EACH_RANGE(own, asked->bert->heads, 1)
        for (int64_t h = from; h < to; h++)
            for (int64_t text = at->first, row = 0; text < at->last && row < end; row += asked->lengths[text++]) {
                const int64_t length = asked->lengths[text];
                const int64_t begin = row < at->from ? at->from - row : 0, stop = row + length > end ? end - row : length;
                float *query = at->query + row * WIDTH + h * head;
                if (begin < stop)
                    NAME(attend)(length, head, begin, stop, query, query + square, query + 2 * square, turned);
            }
    return after(own);
}

/* What a layer does with rows behind their attention. */
static stage *NAME(transform)(const place *at, int64_t layer, stage *own)
{
    const packed_bert *bert = at->asked->bert;
    const int64_t panels = WIDTH / PANEL, square = WIDTH * WIDTH, rows = at->rows;
    const float *weights = bert->weights + layer * SQUARES * square, *vectors = bert->vectors + layer * VECTORS * WIDTH;
    const int16_t *cut_weights = bert->cut_weights + layer * SQUARES * square;
    const float *scales = bert->scales + layer * SQUARES * WIDTH, *context = at->query + at->from * WIDTH;
    NAME(cut_rows)(own, at->cut, rows, context, at->scale);
    own = after(own);
    EACH_RANGE(own, panels, 2)
        if (at->cut)
            NAME(cut_products)(NAME(cut_adding), cut_weights + 3 * square, scales + 3 * WIDTH, from, to, rows, at->cut,
                               at->scale, at->x, rows, vectors + BIAS_ATTENDED * WIDTH);
        else
            NAME(products)(NAME(adding), weights + 3 * square, from, to, rows, context, at->x, rows,
                           vectors + BIAS_ATTENDED * WIDTH);
    own = after(own);
    NAME(normalize_rows)(own, at, vectors + NORM_ATTENDED * WIDTH);
    own = after(own);
    EACH_RANGE(own, 4 * panels, 4)
        if (at->cut)
            NAME(cut_products)(NAME(cut_gelu), cut_weights + 4 * square, scales + 4 * WIDTH, from, to, rows, at->cut,
                               at->scale, at->inner, rows, vectors + BIAS_UP * WIDTH);
        else
            NAME(products)(NAME(gelu), weights + 4 * square, from, to, rows, at->x, at->inner, rows,
                           vectors + BIAS_UP * WIDTH);
    own = after(own);
    NAME(cut_rows)(own, at->cut, 4 * rows, at->inner, at->scale);
    own = after(own);
    EACH_RANGE(own, panels, 2)
        for (int64_t s = 0; s < 4; s++) {
            const float *bias = s == 0 ? vectors + BIAS_DOWN * WIDTH : NULL;
            if (at->cut)
                NAME(cut_products)(NAME(cut_adding), cut_weights + (8 + s) * square, scales + (8 + s) * WIDTH, from, to, rows,
                                   at->cut + s * rows * WIDTH, at->scale + s * rows, at->x, rows, bias);
            else
                NAME(products)(NAME(adding), weights + (8 + s) * square, from, to, rows, at->inner + s * rows * WIDTH, at->x,
                               rows, bias);
        }
    own = after(own);
    NAME(normalize_rows)(own, at, vectors + NORM * WIDTH);
    return after(own);
}

/* The embeddings of a share's texts, whose last rows are at `x`. */
static void NAME(pool)(const place *at, const float *x)
{
    const request *asked = at->asked;
    for (int64_t text = at->first; text < at->last; x += WIDTH * asked->lengths[text++]) {
        float *pooled = asked->embeddings + text * WIDTH;
        memcpy(pooled, x, WIDTH * sizeof(float));
        if (asked->bert->pools_mean) {
            for (int64_t row = 1; row < asked->lengths[text]; row++)
                for (int64_t i = 0; i < WIDTH; i++)
                    pooled[i] += x[row * WIDTH + i];
            for (int64_t i = 0; i < WIDTH; i++)
                pooled[i] /= (float)asked->lengths[text];
        }
        if (asked->bert->normalizes) {
            double squares = 0;
            for (int64_t i = 0; i < WIDTH; i++)
                squares += (double)pooled[i] * pooled[i];
            const float norm = (float)sqrt(squares), divisor = norm < 1e-12f ? 1e-12f : norm;
            for (int64_t i = 0; i < WIDTH; i++)
                pooled[i] /= divisor;
        }
    }
}

/* All layers of a share: alone, or together by stages. */
static void NAME(embed_share)(const place *at, stage *own)
{
    own = NAME(begin)(at, own);
    for (int64_t layer = 0; layer < at->asked->bert->layers; layer++) {
        own = NAME(project)(at, layer, own);
        own = NAME(attend_rows)(at, own);
        own = NAME(transform)(at, layer, own);
    }
}

/* The same together by parts, of which this thread takes the one of its number if nobody was faster. */
static void NAME(embed_parts)(const place *share, part *parts, int count, int thread)
{
    const request *asked = share->asked;
    for (int step, next = thread; (next = next_part(parts, count, next, 2 * (int)asked->bert->layers, &step)) >= 0;) {
        const int64_t from = share->rows * next / count, to = share->rows * (next + 1) / count;
        const place at = {.asked = asked, .first = share->first, .last = share->last, .start = share->start,
                          .all = share->all, .from = from, .rows = to - from, .x = share->x + from * WIDTH,
                          .query = share->query, .inner = share->inner + 4 * from * WIDTH,
                          .scale = share->scale + 4 * from,
                          .cut = share->cut ? share->cut + 4 * from * WIDTH : NULL};
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
    float *room = asked->together ? asked->room : asked->room + thread * asked->room_each;
    int64_t mine = asked->together ? 0 : atomic_fetch_add(&asked->next_share, 1);
    for (int64_t share = 0, first = 0, start = 0; first < asked->texts; share++) {
        int64_t rows = asked->lengths[first], last = first + 1;
        while (last < asked->texts && rows + asked->lengths[last] <= asked->rows)
            rows += asked->lengths[last++];
        if (share == mine) {
            const place at = {.asked = asked, .first = first, .last = last, .start = start, .all = rows, .rows = rows,
                              .x = room, .query = room + rows * WIDTH, .inner = room + 4 * rows * WIDTH,
                              .scale = room + 10 * rows * WIDTH,
                              .cut = asked->cuts ? (int16_t *)(room + 8 * rows * WIDTH) : NULL};
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

#undef INLINE
#undef LANES
#undef TILE
#undef SCORES
