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
INLINE void NAME(look_up)(const packed_bert *bert, int64_t piece, int64_t place, float *row)
{
    const float *word = bert->words + piece * WIDTH, *at = bert->places + place * WIDTH;
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

/* One head's attention within one text; the contexts take the queries' place. Arrays (length, WIDTH) of this head. */
static void NAME(attend)(int64_t length, int64_t size, float *queries, const float *keys, const float *values,
                         float *turned)
{
    _Alignas(64) float scores[TILE * SCORES];
    const float scale = 1 / sqrtf((float)size);
    const int64_t groups = (length + PANEL - 1) / PANEL;
    for (int64_t group = 0; group < groups; group++)
        for (int64_t j = 0; j < PANEL; j++) {
            float *to = turned + group * size * PANEL + j;
            const float *key = keys + (group * PANEL + j) * WIDTH;
            const bool there = group * PANEL + j < length;
            for (int64_t i = 0; i < size; i++)
                to[i * PANEL] = there ? key[i] : 0;
        }
    const int64_t blocks = (length + TILE - 1) / TILE;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = length * block / blocks;
        const int rows = (int)(length * (block + 1) / blocks - from);
        float *own = queries + from * WIDTH;
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

/* One share, texts from `first` to `last` that begin at `start`; stages are none for a thread that is alone. */
static void NAME(embed_share)(const request *asked, int64_t first, int64_t last, int64_t start, int64_t rows, float *room,
                              stage *own, bool leads)
{
    const packed_bert *bert = asked->bert;
    const int64_t panels = WIDTH / PANEL, square = WIDTH * WIDTH, head = WIDTH / bert->heads;
    float *x = room, *query = x + rows * WIDTH, *key = query + rows * WIDTH, *value = key + rows * WIDTH;
    float *inner = value + rows * WIDTH;
    /* Cut rows, and of each row its scale: of one square's width, or of the four between up and down. */
    int16_t *cut = asked->cuts ? (int16_t *)(inner + 4 * rows * WIDTH) : NULL;
    float *scale = inner + 6 * rows * WIDTH;
    _Alignas(64) float turned[MOST_TOKENS * MOST_HEAD];
    EACH_RANGE(own, rows, 16)
        for (int64_t text = first, row = 0; text < last; row += asked->lengths[text++])
            for (int64_t place = 0; place < asked->lengths[text]; place++)
                if (row + place >= from && row + place < to) {
                    NAME(look_up)(bert, asked->pieces[start + row + place], place, x + (row + place) * WIDTH);
                    if (cut)
                        scale[row + place] = NAME(cut)(x + (row + place) * WIDTH, cut + (row + place) * WIDTH);
                }
    for (int64_t layer = 0; layer < bert->layers; layer++) {
        const float *weights = bert->weights + layer * SQUARES * square, *vectors = bert->vectors + layer * VECTORS * WIDTH;
        const int16_t *cut_weights = bert->cut_weights + layer * SQUARES * square;
        const float *scales = bert->scales + layer * SQUARES * WIDTH;
        own = after(own);
        EACH_RANGE(own, 3 * panels, 3)
            if (cut)
                NAME(cut_products)(NAME(cut_plain), cut_weights, scales, from, to, rows, cut, scale, query, vectors);
            else
                NAME(products)(NAME(plain), weights, from, to, rows, x, query, vectors);
        own = after(own);
        EACH_RANGE(own, bert->heads, 1)
            for (int64_t h = from; h < to; h++)
                for (int64_t text = first, at = 0; text < last; at += asked->lengths[text++]) {
                    const int64_t begin = at * WIDTH + h * head;
                    NAME(attend)(asked->lengths[text], head, query + begin, key + begin, value + begin, turned);
                }
        NAME(cut_rows)(own = after(own), cut, rows, query, scale);
        own = after(own);
        EACH_RANGE(own, panels, 2)
            if (cut)
                NAME(cut_products)(NAME(cut_adding), cut_weights + 3 * square, scales + 3 * WIDTH, from, to, rows, cut,
                                   scale, x, vectors + BIAS_ATTENDED * WIDTH);
            else
                NAME(products)(NAME(adding), weights + 3 * square, from, to, rows, query, x,
                               vectors + BIAS_ATTENDED * WIDTH);
        own = after(own);
        EACH_RANGE(own, rows, 16)
            for (int64_t row = from; row < to; row++) {
                NAME(normalize)(x + row * WIDTH, vectors + NORM_ATTENDED * WIDTH, bert->epsilon);
                if (cut)
                    scale[row] = NAME(cut)(x + row * WIDTH, cut + row * WIDTH);
            }
        own = after(own);
        EACH_RANGE(own, 4 * panels, 4)
            if (cut)
                NAME(cut_products)(NAME(cut_gelu), cut_weights + 4 * square, scales + 4 * WIDTH, from, to, rows, cut, scale,
                                   inner, vectors + BIAS_UP * WIDTH);
            else
                NAME(products)(NAME(gelu), weights + 4 * square, from, to, rows, x, inner, vectors + BIAS_UP * WIDTH);
        NAME(cut_rows)(own = after(own), cut, 4 * rows, inner, scale);
        own = after(own);
        EACH_RANGE(own, panels, 2)
            for (int64_t s = 0; s < 4; s++) {
                const float *down = weights + (8 + s) * square, *bias = s == 0 ? vectors + BIAS_DOWN * WIDTH : NULL;
                if (cut) {
                    NAME(cut_products)(NAME(cut_adding), cut_weights + (8 + s) * square, scales + (8 + s) * WIDTH, from, to,
                                       rows, cut + s * rows * WIDTH, scale + s * rows, x, bias);
                    continue;
                }
                for (int64_t panel = from; panel < to; panel++)
                    NAME(multiply)(NAME(adding), rows, inner + s * rows * WIDTH, down + panel * WIDTH * PANEL,
                                   x + panel * PANEL, bias ? bias + panel * PANEL : NULL,
                                   down + (panel + 1) * WIDTH * PANEL);
            }
        own = after(own);
        EACH_RANGE(own, rows, 16)
            for (int64_t row = from; row < to; row++) {
                NAME(normalize)(x + row * WIDTH, vectors + NORM * WIDTH, bert->epsilon);
                if (cut)
                    scale[row] = NAME(cut)(x + row * WIDTH, cut + row * WIDTH);
            }
    }
    if (!leads)
        return;
    for (int64_t text = first, at = 0; text < last; at += asked->lengths[text++]) {
        float *pooled = asked->embeddings + text * WIDTH, *own = x + at * WIDTH;
        memcpy(pooled, own, WIDTH * sizeof(float));
        if (bert->pools_mean) {
            for (int64_t row = 1; row < asked->lengths[text]; row++)
                for (int64_t i = 0; i < WIDTH; i++)
                    pooled[i] += own[row * WIDTH + i];
            for (int64_t i = 0; i < WIDTH; i++)
                pooled[i] /= (float)asked->lengths[text];
        }
        if (bert->normalizes) {
            double squares = 0;
            for (int64_t i = 0; i < WIDTH; i++)
                squares += (double)pooled[i] * pooled[i];
            const float norm = (float)sqrt(squares), divisor = norm < 1e-12f ? 1e-12f : norm;
            for (int64_t i = 0; i < WIDTH; i++)
                pooled[i] /= divisor;
        }
    }
}

/* A thread's work: its part of the one share, or share after share. */
static void NAME(embed)(request *asked, int thread)
{
    float *room = asked->together ? asked->room : asked->room + thread * asked->room_each;
    int64_t mine = asked->together ? 0 : atomic_fetch_add(&asked->next_share, 1);
    for (int64_t share = 0, first = 0, start = 0; first < asked->texts; share++) {
        int64_t rows = asked->lengths[first], last = first + 1;
        while (last < asked->texts && rows + asked->lengths[last] <= asked->rows)
            rows += asked->lengths[last++];
        if (share == mine) {
            NAME(embed_share)(asked, first, last, start, rows, room, asked->stages, thread == 0 || !asked->together);
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
