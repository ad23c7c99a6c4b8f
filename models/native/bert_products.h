/* Products of one width, in REAL and in int16. Before each inclusion: WIDTH, NAME(x), EXACT, and AVX-512 allowed. What this
 * and bert_numbers.h define stays for who includes it. */

#include "bert_numbers.h"

#define TILE 14             /* rows of a product held in registers, */
#define COLUMNS (2 * LANES) /* with so many columns */
#define SCORES (MOST_TOKENS + PANEL)

/* For each block of `rows`, as many as a tile has or fewer by one, from `first` to `last`. */
#define EACH_BLOCK(rows)                                                                                              \
    for (int64_t blocks = ((rows) + TILE - 1) / TILE, block = 0, first, last;                                         \
         block < blocks && (first = (rows) * block / blocks, last = (rows) * (block + 1) / blocks, true); block++)

#ifndef BERT_ENDS
#define BERT_ENDS

/* What a tile starts from and ends with. */
enum { AS_IT_IS = 0, ADDS = 1, GELU = 2 };

#endif

/* Writes a vector of sums of a tile as it ends, with the bias from column `at` on where there is one. (A pointer that moves
 * to there only where there is one takes int16 half as long again.) */
INLINE void NAME(finish)(REAL *to, VECTOR sum, const float *bias, const int at, const int ends)
{
    if (bias)
        sum = OP(add)(sum, GIVEN(bias + at));
    if (ends & ADDS)
        sum = OP(add)(sum, OP(loadu)(to));
    if (ends & GELU)
        sum = NAME(gelu)(sum);
    OP(storeu)(to, sum);
}

/* c (rows, COLUMNS) = a (rows, depth) b (depth, COLUMNS), of rows that the compiler knows.
 *
 * weights: b is of the model's own numbers, else of REAL. bias: from column `at` on, or none. ahead: what is fetched
 * meanwhile if it `fetches`, a cache line for each number of the depth. */
INLINE void NAME(tile)(const int rows, int64_t depth, const REAL *restrict a, const int64_t a_stride,
                       const void *restrict b, const bool weights, const int64_t b_stride, REAL *restrict c,
                       const int64_t c_stride, const float *bias, const int at, const int ends, const char *ahead,
                       const bool fetches)
{
    VECTOR sums[TILE][2];
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = OP(setzero)();
    for (int64_t k = 0; k < depth; k++) {
        const VECTOR left = weights ? GIVEN((const float *)b) : OP(loadu)((const REAL *)b);
        const VECTOR right = weights ? GIVEN((const float *)b + LANES) : OP(loadu)((const REAL *)b + LANES);
        if (fetches) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            ahead += 64;
        }
#pragma GCC unroll 14
        for (int i = 0; i < rows; i++) {
            const VECTOR each = OP(set1)(a[i * a_stride]);
            sums[i][0] = OP(fmadd)(each, left, sums[i][0]);
            sums[i][1] = OP(fmadd)(each, right, sums[i][1]);
        }
        a++;
        b = (const char *)b + b_stride * (int64_t)(weights ? sizeof(float) : sizeof(REAL));
    }
#pragma GCC unroll 14
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            NAME(finish)(c + i * c_stride + half * LANES, sums[i][half], bias, at + half * LANES, ends);
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

/* The columns of a panel, tile by tile, of which the first may fetch the next panel. */
#define EACH_TILE(R, DEPTH, A, A_STRIDE, B, WEIGHTS, B_STRIDE, C, C_STRIDE, BIAS, ENDS, AHEAD, FETCHES)               \
    {                                                                                                                 \
        NAME(tile)(R, DEPTH, A, A_STRIDE, B, WEIGHTS, B_STRIDE, C, C_STRIDE, BIAS, 0, ENDS, AHEAD, FETCHES);          \
        for (int at = COLUMNS; at < PANEL; at += COLUMNS)                                                             \
            NAME(tile)(R, DEPTH, A, A_STRIDE, (B) + at, WEIGHTS, B_STRIDE, (C) + at, C_STRIDE, BIAS, at, ENDS, NULL,  \
                       false);                                                                                        \
    }
#define SQUARE_TILE(PURPOSE)                                                                                          \
    static __attribute__((noinline)) void NAME(PURPOSE##_tile)(int rows, const REAL *a, const float *b, REAL *c,      \
                                                               const float *bias, const char *ahead)                  \
    {                                                                                                                 \
        TILES(PURPOSE##_CALL)                                                                                         \
    }
#define plain_CALL(R) EACH_TILE(R, WIDTH, a, WIDTH, b, true, PANEL, c, WIDTH, bias, AS_IT_IS, ahead, true)
SQUARE_TILE(plain)
#define adding_CALL(R) EACH_TILE(R, WIDTH, a, WIDTH, b, true, PANEL, c, WIDTH, bias, ADDS, ahead, true)
SQUARE_TILE(adding)
#define gelu_CALL(R) EACH_TILE(R, WIDTH, a, WIDTH, b, true, PANEL, c, WIDTH, bias, GELU, ahead, true)
SQUARE_TILE(gelu)

/* Of attention: scores of some queries and 32 keys; contexts of some queries, 32 numbers of each. */
static __attribute__((noinline)) void NAME(score)(int rows, int64_t depth, const REAL *a, const REAL *b, REAL *c)
{
#define SCORE_CALL(R) EACH_TILE(R, depth, a, WIDTH, b, false, PANEL, c, SCORES, NULL, AS_IT_IS, NULL, false)
    TILES(SCORE_CALL)
#undef SCORE_CALL
}

static __attribute__((noinline)) void NAME(gather)(int rows, int64_t depth, const REAL *a, const REAL *b, REAL *c)
{
#define GATHER_CALL(R) EACH_TILE(R, depth, a, SCORES, b, false, WIDTH, c, WIDTH, NULL, AS_IT_IS, NULL, false)
    TILES(GATHER_CALL)
#undef GATHER_CALL
}

typedef void (*NAME(square_tile))(int, const REAL *, const float *, REAL *, const float *, const char *);

/* Products with panels from `from` to `to` of some squares: c, (apart, WIDTH) of each square, from a (rows, WIDTH). */
INLINE void NAME(products)(NAME(square_tile) tile, const float *weights, int64_t from, int64_t to, int64_t rows,
                           const REAL *a, REAL *c, int64_t apart, const float *bias)
{
    for (int64_t panel = from; panel < to; panel++) {
        const int64_t square = panel / (WIDTH / PANEL), column = panel % (WIDTH / PANEL) * PANEL;
        const float *of_panel = weights + panel * WIDTH * PANEL;
        const char *ahead = (const char *)(of_panel + WIDTH * PANEL);
        EACH_BLOCK(rows) {
            /* The first two tiles fetch all of the next panel; the others what is fetched already. */
            tile((int)(last - first), a + first * WIDTH, of_panel, c + (square * apart + first) * WIDTH + column,
                 bias ? bias + panel * PANEL : NULL, ahead + (block == 1 ? WIDTH * 64 : 0));
        }
    }
}

#if !EXACT

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
            NAME(finish)(c + i * WIDTH + half * LANES, sum, bias, half * LANES, ends);
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

/* The same of squares that are cut to int16, from rows that are cut too. */
INLINE void NAME(cut_products)(NAME(cut_square_tile) tile, const int16_t *weights, const float *scales, int64_t from,
                               int64_t to, int64_t rows, const int16_t *a, const float *of_rows, float *c,
                               int64_t apart, const float *bias)
{
    for (int64_t panel = from; panel < to; panel++) {
        const int64_t square = panel / (WIDTH / PANEL), column = panel % (WIDTH / PANEL) * PANEL;
        const int16_t *of_panel = weights + panel * WIDTH * PANEL;
        const char *ahead = (const char *)(of_panel + WIDTH * PANEL);
        EACH_BLOCK(rows) {
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

#undef CUT_TILE
#undef cut_plain_CALL
#undef cut_adding_CALL
#undef cut_gelu_CALL

#endif

#undef TILES
#undef EACH_TILE
#undef SQUARE_TILE
#undef plain_CALL
#undef adding_CALL
#undef gelu_CALL
