/* Products of one width, in float32 and in int16. Before each inclusion: WIDTH, NAME(x), and AVX-512 allowed. INLINE, LANES,
 * TILE and SCORES stay for who includes this. */

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define TILE 14 /* rows of a product held in registers, with 32 columns */
#define SCORES (MOST_TOKENS + LANES)

#ifndef BERT_VECTORS
#define BERT_VECTORS

/* What a tile starts from and ends with. */
enum { AS_IT_IS = 0, ADDS = 1, GELU = 2 };

/* e to the power of x, for x of at most 0. */
INLINE __m512 exponential(__m512 x)
{
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
#pragma GCC unroll 7
    for (int i = 0; i < 7; i++)
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(factors[i]));
    return _mm512_scalef_ps(y, n);
}

/* x / 2 (1 + erf(x / sqrt 2)). With z = |x| / sqrt 2 and t = 1 / (1 + 3 z / 8), erfc(z) is exp(-z z) t P(t): P is a least
 * squares fit over z up to 10, 1.3e-8 off at most. */
INLINE __m512 gelu(__m512 x)
{
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f));
    const __m512 t = _mm512_div_ps(_mm512_set1_ps(1), _mm512_fmadd_ps(z, _mm512_set1_ps(0.375f), _mm512_set1_ps(1)));
    const float factors[] = {-2.875547412e-01f, 4.328167783e-01f, -2.298420806e-01f, 2.739889504e-01f,
                             1.214048363e-01f,  2.053362278e-01f, 2.106468180e-01f,  2.116136244e-01f};
    __m512 p = _mm512_set1_ps(6.158959733e-02f);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(factors[i]));
    const __m512 power = exponential(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f)));
    const __m512 tail = _mm512_mul_ps(x, _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(power, _mm512_set1_ps(0.5f))));
    const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_blend_ps(below, _mm512_sub_ps(x, tail), tail);
}

/* Writes 16 sums of a tile as it ends, with the bias from column `at` on where there is one. (A pointer that moves to there
 * only where there is one takes int16 half as long again.) */
INLINE void finish(float *to, __m512 sum, const float *bias, const int at, const int ends)
{
    if (bias)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(bias + at));
    if (ends & ADDS)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(to));
    if (ends & GELU)
        sum = gelu(sum);
    _mm512_storeu_ps(to, sum);
}

/* Turns 16 rows, as far as they are there (else 0), of 16 numbers: to (16, of PANEL). */
INLINE void turn(const float *rows, int64_t stride, int64_t there, float *to)
{
    __m512 a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        a[i] = i < there ? _mm512_loadu_ps(rows + i * stride) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    /* a[4 g + i]: of rows 4 g to 4 g + 3, in each quarter q number 4 q + i. */
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        const __m512 even2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        const __m512 odd2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_ps(to + i * PANEL, _mm512_shuffle_f32x4(even, even2, 0x88));
        _mm512_storeu_ps(to + (i + 4) * PANEL, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        _mm512_storeu_ps(to + (i + 8) * PANEL, _mm512_shuffle_f32x4(even, even2, 0xdd));
        _mm512_storeu_ps(to + (i + 12) * PANEL, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
}

#endif

/* c (rows, 32) = a (rows, depth) b (depth, 32), of rows that the compiler knows.
 *
 * bias: (32), or none. ahead: what is fetched meanwhile, `lines` cache lines for each number of the depth. */
INLINE void NAME(tile)(const int rows, int64_t depth, const float *restrict a, const int64_t a_stride,
                       const float *restrict b, const int64_t b_stride, float *restrict c, const int64_t c_stride,
                       const float *bias, const int ends, const char *ahead, const int lines)
{
    __m512 sums[TILE][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++) {
        const __m512 left = _mm512_loadu_ps(b), right = _mm512_loadu_ps(b + LANES);
        if (lines > 0)
            _mm_prefetch(ahead, _MM_HINT_T1);
        if (lines > 1)
            _mm_prefetch(ahead + 64, _MM_HINT_T1);
        ahead += 64 * lines;
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            const __m512 each = _mm512_set1_ps(a[i * a_stride]);
            sums[i][0] = _mm512_fmadd_ps(each, left, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(each, right, sums[i][1]);
        }
        a++;
        b += b_stride;
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            finish(c + i * c_stride + half * LANES, sums[i][half], bias, half * LANES, ends);
}

#define TILES(CALL)                                                                                                   \
    switch (rows) {                                                                                                   \
    case 1: CALL(1); break;                                                                                           \
    case 2: CALL(2); break;                                                                                           \
    case 3: CALL(3); break;                                                                                           \
    case 4: CALL(4); break;                                                                                           \
    case 5: CALL(5); break;                                                                                           \
    case 6: CALL(6); break;                                                                                           \
    case 7: CALL(7); break;                                                                                           \
    case 8: CALL(8); break;                                                                                           \
    case 9: CALL(9); break;                                                                                           \
    case 10: CALL(10); break;                                                                                         \
    case 11: CALL(11); break;                                                                                         \
    case 12: CALL(12); break;                                                                                         \
    case 13: CALL(13); break;                                                                                         \
    case 14: CALL(14); break;                                                                                         \
    }

/* A tile of a square, with the next panel fetched at `lines` lines a step. */
#define SQUARE_TILE(PURPOSE, ENDS, LINES)                                                                             \
    static __attribute__((noinline)) void NAME(PURPOSE)(int rows, const float *a, const float *b, float *c,            \
                                                        const float *bias, const char *ahead)                         \
    {                                                                                                                 \
        TILES(PURPOSE##_CALL)                                                                                         \
    }
#define plain_CALL(R) NAME(tile)(R, WIDTH, a, WIDTH, b, PANEL, c, WIDTH, bias, AS_IT_IS, ahead, 1)
SQUARE_TILE(plain, AS_IT_IS, 1)
#define adding_CALL(R) NAME(tile)(R, WIDTH, a, WIDTH, b, PANEL, c, WIDTH, bias, ADDS, ahead, 1)
SQUARE_TILE(adding, ADDS, 1)
#define gelu_CALL(R) NAME(tile)(R, WIDTH, a, WIDTH, b, PANEL, c, WIDTH, bias, GELU, ahead, 1)
SQUARE_TILE(gelu, GELU, 1)

/* Of attention: scores of some queries and 32 keys; contexts of some queries, 32 numbers of each. */
static __attribute__((noinline)) void NAME(score)(int rows, int64_t depth, const float *a, const float *b, float *c)
{
#define SCORE_CALL(R) NAME(tile)(R, depth, a, WIDTH, b, PANEL, c, SCORES, NULL, AS_IT_IS, NULL, 0)
    TILES(SCORE_CALL)
#undef SCORE_CALL
}

static __attribute__((noinline)) void NAME(gather)(int rows, int64_t depth, const float *a, const float *b, float *c)
{
#define GATHER_CALL(R) NAME(tile)(R, depth, a, SCORES, b, WIDTH, c, WIDTH, NULL, AS_IT_IS, NULL, 0)
    TILES(GATHER_CALL)
#undef GATHER_CALL
}

/* The same from int16: c (rows, 32) of rows and columns cut to int16, two numbers of the depth at a time. The sums are exact;
 * times the scale of the row and that of the column they are what they stand for. */
INLINE void NAME(cut_tile)(const int rows, const int32_t *a, const int16_t *b, float *c, const float *of_rows,
                           const float *of_columns, const float *bias, const int ends, const char *ahead)
{
    __m512i sums[TILE][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < WIDTH / 2; k++) {
        const __m512i left = _mm512_loadu_si512(b), right = _mm512_loadu_si512(b + 2 * LANES);
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += 64;
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            const __m512i each = _mm512_set1_epi32(a[i * (WIDTH / 2)]);
            /* Of the intrinsic GCC 12 keeps half of the sums in memory. */
            __asm__("vpdpwssd %2, %1, %0" : "+v"(sums[i][0]) : "v"(each), "v"(left));
            __asm__("vpdpwssd %2, %1, %0" : "+v"(sums[i][1]) : "v"(each), "v"(right));
        }
        a++;
        b += 2 * PANEL;
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(of_rows[i]), _mm512_loadu_ps(of_columns + half * LANES));
            const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][half]), scale);
            finish(c + i * WIDTH + half * LANES, sum, bias, half * LANES, ends);
        }
}

#define CUT_TILE(PURPOSE, ENDS)                                                                                       \
    static __attribute__((noinline)) void NAME(cut_##PURPOSE)(int rows, const int32_t *a, const int16_t *b, float *c,  \
                                                              const float *of_rows, const float *of_columns,          \
                                                              const float *bias, const char *ahead)                   \
    {                                                                                                                 \
        TILES(cut_##PURPOSE##_CALL)                                                                                   \
    }
#define cut_plain_CALL(R) NAME(cut_tile)(R, a, b, c, of_rows, of_columns, bias, AS_IT_IS, ahead)
CUT_TILE(plain, AS_IT_IS)
#define cut_adding_CALL(R) NAME(cut_tile)(R, a, b, c, of_rows, of_columns, bias, ADDS, ahead)
CUT_TILE(adding, ADDS)
#define cut_gelu_CALL(R) NAME(cut_tile)(R, a, b, c, of_rows, of_columns, bias, GELU, ahead)
CUT_TILE(gelu, GELU)

typedef void (*NAME(cut_square_tile))(int, const int32_t *, const int16_t *, float *, const float *, const float *,
                                      const float *, const char *);

typedef void (*NAME(square_tile))(int, const float *, const float *, float *, const float *, const char *);

/* One panel's columns of c (rows, WIDTH) from a (rows, WIDTH). */
INLINE void NAME(multiply)(NAME(square_tile) tile, int64_t rows, const float *a, const float *panel, float *c,
                           const float *bias, const float *next)
{
    const int64_t blocks = (rows + TILE - 1) / TILE;
    const char *ahead = (const char *)next;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t from = rows * block / blocks, to = rows * (block + 1) / blocks;
        /* The first two tiles fetch all of the next panel; the others what is fetched already. */
        tile((int)(to - from), a + from * WIDTH, panel, c + from * WIDTH, bias,
             ahead + (block == 1 ? WIDTH * 64 : 0));
    }
}

/* Products with panels from `from` to `to` of some squares: c, (apart, WIDTH) of each square, from a (rows, WIDTH). */
INLINE void NAME(products)(NAME(square_tile) tile, const float *weights, int64_t from, int64_t to, int64_t rows,
                           const float *a, float *c, int64_t apart, const float *bias)
{
    for (int64_t panel = from; panel < to; panel++) {
        const int64_t square = panel / (WIDTH / PANEL), column = panel % (WIDTH / PANEL) * PANEL;
        const float *of_panel = weights + panel * WIDTH * PANEL;
        NAME(multiply)(tile, rows, a, of_panel, c + square * apart * WIDTH + column, bias ? bias + panel * PANEL : NULL,
                       of_panel + WIDTH * PANEL);
    }
}

/* The same of squares that are cut to int16, from rows that are cut too. */
INLINE void NAME(cut_products)(NAME(cut_square_tile) tile, const int16_t *weights, const float *scales, int64_t from,
                               int64_t to, int64_t rows, const int16_t *a, const float *of_rows, float *c,
                               int64_t apart, const float *bias)
{
    const int64_t blocks = (rows + TILE - 1) / TILE;
    for (int64_t panel = from; panel < to; panel++) {
        const int64_t square = panel / (WIDTH / PANEL), column = panel % (WIDTH / PANEL) * PANEL;
        const int16_t *of_panel = weights + panel * WIDTH * PANEL;
        const char *ahead = (const char *)(of_panel + WIDTH * PANEL);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = rows * block / blocks, last = rows * (block + 1) / blocks;
            tile((int)(last - first), (const int32_t *)(a + first * WIDTH), of_panel,
                 c + (square * apart + first) * WIDTH + column, of_rows + first, scales + panel * PANEL,
                 bias ? bias + panel * PANEL : NULL, ahead + (block == 1 ? WIDTH * 32 : 0));
        }
    }
}

/* Cuts a row to int16; what its numbers are to be multiplied by, no number where one of the row's is none. */
INLINE float NAME(cut)(const float *row, int16_t *to)
{
    __m512 squares = _mm512_setzero_ps(), largest = squares;
    for (int i = 0; i < WIDTH; i += LANES) {
        const __m512 number = _mm512_loadu_ps(row + i);
        squares = _mm512_fmadd_ps(number, number, squares);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(number));
    }
    const float norm = sqrtf(_mm512_reduce_add_ps(squares));
    const float step = fmaxf(norm / CUT_NORM, _mm512_reduce_max_ps(largest) / INT16_MAX);
    const __m512 inverse = _mm512_set1_ps(step > FLT_MIN ? 1 / step : 0);
    for (int i = 0; i < WIDTH; i += LANES) {
        const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), inverse));
        _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtsepi32_epi16(number));
    }
    return step + 0 * norm;
}

#undef TILES
#undef SQUARE_TILE
#undef plain_CALL
#undef adding_CALL
#undef gelu_CALL
#undef CUT_TILE
#undef cut_plain_CALL
#undef cut_adding_CALL
#undef cut_gelu_CALL
