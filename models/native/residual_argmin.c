/* Residual quantization on a processor: nearest codewords and margins of all levels in one pass over the rows.
 *
 * A block of rows stays in the cache from level to level. Scores |c|^2 - 2 x.c around the codebook's mean are computed
 * in float32, a tile of rows against two vectors of codewords in registers. What float32 may round off bounds which
 * codewords can be the nearest and which planes between codewords can be the nearest to the residual: one of each for
 * most rows. Those alone are measured in float64, by differences, and the residual goes on in float64. So codes and
 * margins are those of float64 throughout, and what a row comes to depends neither on the rows beside it nor on the
 * processor. A row that float64 leaves in doubt (a tie, or a number that float32 cannot hold) gets NaN for a margin.
 *
 * Compiled without contraction (-ffp-contract=off): float64 sums are the same whatever the processor.
 */

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ALIGNMENT 64
#define MOST_LANES 16
/* Rows whose residuals stay in the cache from level to level; a multiple of every tile's rows. */
#define BLOCK_ROWS 384
/* Of the residual's and the codewords' reach: beyond it scores may overflow. */
#define LARGEST_SQUARE 1e37
/* Of the same: nearer to a plane than this is a tie; twice TIE_TOLERANCE of models/quantizer.py. */
#define TIE 2e-12
#define MOST_THREADS 64

/* Of the functions below; INTERFACE of search.py has the same, and both change with them. */
const int32_t residual_search_version = 1;

typedef struct {
    int64_t size;         /* K */
    int64_t width;        /* K filled up to whole groups of lanes */
    double radius;        /* the largest norm of a centred codeword */
    double *centre;       /* (padded), the mean of the codewords */
    double *codewords;    /* (K, padded) */
    float *packed;        /* (width / lanes, d, lanes), -2 times the centred codewords */
    float *norms;         /* (width), squared, of the centred codewords; infinite where none is to be chosen */
    float *inverse_spans; /* (K, width), of each two codewords the inverse of twice their distance; NaN with itself */
    float *closest;       /* (K), the largest of each row of these */
} level_table;

typedef struct {
    int64_t levels, dimension, padded; /* L; d; d filled up to whole vectors of float64 */
    int kind;                          /* which processor's instructions */
    level_table *tables;
} residual_search;

typedef struct {
    const void *latents; /* (B, d) */
    int64_t *codes;      /* (B, L) */
    void *margins;       /* (B, L), or none wanted */
    void *residuals;     /* (B, L + 1, d), or none wanted */
    double *smallest;    /* (B), the smallest margin of each row */
    double *errors;      /* (B), squared norms of what no level took */
    bool is_double;      /* float64 numbers, else float32 */
} request;

typedef struct {
    void *memory;
    double *residuals; /* (block, padded) */
    double *squares;   /* (block), of the norms of the points */
    float *points;     /* (block, padded), the residuals around the level's centre */
    float *scores;     /* (rows of a tile, width) */
    bool *in_doubt;    /* (block) */
} workspace;

/* Vectors of the language itself: the compiler makes of them what the processor has. */
typedef double two_doubles __attribute__((vector_size(16)));
typedef float two_singles __attribute__((vector_size(8)));
typedef double four_doubles __attribute__((vector_size(32)));
typedef float four_singles __attribute__((vector_size(16)));
typedef double eight_doubles __attribute__((vector_size(64)));
typedef float eight_singles __attribute__((vector_size(32)));
#define SUMS 8

static int64_t whole(int64_t number, int64_t of)
{
    return (number + of - 1) / of * of;
}

static void *reserve(int64_t bytes)
{
    return aligned_alloc(ALIGNMENT, (size_t)whole(bytes > 0 ? bytes : 1, ALIGNMENT));
}

static bool take(workspace *space, const residual_search *search, int64_t block, int64_t tile)
{
    int64_t width = 0;
    for (int64_t level = 0; level < search->levels; level++)
        width = search->tables[level].width > width ? search->tables[level].width : width;
    tile = tile < block ? tile : block;
    const int64_t residuals = whole(block * search->padded * 8, ALIGNMENT), squares = whole(block * 8, ALIGNMENT);
    const int64_t points = whole(block * search->padded * 4, ALIGNMENT), scores = whole(tile * width * 4, ALIGNMENT);
    char *memory = reserve(residuals + squares + points + scores + block);
    if (!memory)
        return false;
    space->memory = memory;
    space->residuals = (double *)memory;
    space->squares = (double *)(memory + residuals);
    space->points = (float *)(memory + residuals + squares);
    space->scores = (float *)(memory + residuals + squares + points);
    space->in_doubt = (bool *)(memory + residuals + squares + points + scores);
    return true;
}

/* Numbers of float64 in whole vectors, written as the request wants them. */
static void write_numbers(const request *asked, int64_t at, const double *numbers, int64_t count)
{
    if (asked->is_double)
        memcpy((double *)asked->residuals + at, numbers, (size_t)count * sizeof(double));
    else
        for (int64_t i = 0; i < count; i++)
            ((float *)asked->residuals)[at + i] = (float)numbers[i];
}

static void read_latents(const request *asked, const residual_search *search, int64_t start, int64_t rows,
                         workspace *space)
{
    const int64_t dimension = search->dimension;
    for (int64_t row = 0; row < rows; row++) {
        double *residual = space->residuals + row * search->padded;
        const int64_t at = (start + row) * dimension;
        if (asked->is_double)
            memcpy(residual, (const double *)asked->latents + at, (size_t)dimension * sizeof(double));
        else
            for (int64_t i = 0; i < dimension; i++)
                residual[i] = ((const float *)asked->latents)[at + i];
        for (int64_t i = dimension; i < search->padded; i++)
            residual[i] = 0;
        if (asked->residuals)
            write_numbers(asked, (start + row) * (search->levels + 1) * dimension, residual, dimension);
        space->in_doubt[row] = false;
    }
}

static void write_level(const request *asked, const residual_search *search, int64_t row, int64_t level, int64_t code,
                        double margin, const double *residual)
{
    const int64_t at = row * search->levels + level;
    asked->codes[at] = code;
    /* Once NaN, it stays so. */
    if (level == 0 || !(asked->smallest[row] <= margin))
        asked->smallest[row] = margin;
    if (asked->margins && asked->is_double)
        ((double *)asked->margins)[at] = margin;
    else if (asked->margins)
        ((float *)asked->margins)[at] = (float)margin;
    if (asked->residuals)
        write_numbers(asked, (row * (search->levels + 1) + level + 1) * search->dimension, residual, search->dimension);
}

static inline void fetch(const void *from, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += ALIGNMENT)
        __builtin_prefetch((const char *)from + at);
}

typedef struct {
    double gap;  /* by how much another codeword is farther than the first, in squared distances */
    double span; /* their own squared distance */
} comparison;

/* Any processor: vectors of four, as the compiler can. */
typedef float four __attribute__((vector_size(16)));
typedef int32_t four_masks __attribute__((vector_size(16)));

static inline four choose(four_masks masks, four one, four other)
{
    return (four)((masks & (four_masks)one) | (~masks & (four_masks)other));
}

static inline float least_of(four v)
{
    const float a = v[0] < v[1] ? v[0] : v[1], b = v[2] < v[3] ? v[2] : v[3];
    return a < b ? a : b;
}

static inline uint32_t bits_of(four_masks masks)
{
    return (uint32_t)((masks[0] & 1) | (masks[1] & 2) | (masks[2] & 4) | (masks[3] & 8));
}

#define NAME(x) x##_anywhere
#define doubles two_doubles
#define singles two_singles
#define PART 2
#define SOME_ROWS 4
#define FOR_PROCESSOR
#define LANES 4
#define ROWS 6
#define WIDE 8
#define vec four
#define LOAD(p) (*(const four *)(p))
#define STORE(p, v) (*(four *)(p) = (v))
#define SPREAD(x) ((four){(x), (x), (x), (x)})
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#define SUBTRACT(a, b) ((a) - (b))
#define MULTIPLY(a, b) ((a) * (b))
#define LESSER(a, b) choose((a) < (b), a, b)
#define GREATER(a, b) choose((a) > (b), a, b)
#define LEAST(v) least_of(v)
#define WHERE_AT_MOST(a, b, x, y) choose((a) <= (b), x, y)
#define places four_masks
#define SPREAD_PLACE(x) ((four_masks){(x), (x), (x), (x)})
#define ADD_PLACES(a, b) ((a) + (b))
#define STORE_PLACES(p, v) (*(four_masks *)(p) = (v))
#define WHERE_LESS(a, b, x, y) ((((a) < (b)) & (x)) | (~((a) < (b)) & (y)))
#define AT_MOST(a, b) bits_of((a) <= (b))
#define NOT_ABOVE(a, b) bits_of(~((a) > (b)))
#include "residual_search.h"

#if defined(__x86_64__)
#define NAME(x) x##_avx2
#define doubles four_doubles
#define singles four_singles
#define PART 4
#define SOME_ROWS 4
#define FOR_PROCESSOR __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define WIDE 8
#define vec __m256
#define LOAD(p) _mm256_load_ps(p)
#define STORE(p, v) _mm256_store_ps(p, v)
#define SPREAD(x) _mm256_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SUBTRACT(a, b) _mm256_sub_ps(a, b)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define LESSER(a, b) _mm256_min_ps(a, b)
#define GREATER(a, b) _mm256_max_ps(a, b)
#define LEAST(v) least_of(LESSER_HALF(v))
#define LESSER_HALF(v) (four)_mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))
#define WHERE_AT_MOST(a, b, x, y) _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ))
#define places __m256i
#define SPREAD_PLACE(x) _mm256_set1_epi32(x)
#define ADD_PLACES(a, b) _mm256_add_epi32(a, b)
#define STORE_PLACES(p, v) _mm256_store_si256((__m256i *)(p), v)
#define WHERE_LESS(a, b, x, y) \
    _mm256_castps_si256( \
        _mm256_blendv_ps(_mm256_castsi256_ps(y), _mm256_castsi256_ps(x), _mm256_cmp_ps(a, b, _CMP_LT_OQ)))
#define AT_MOST(a, b) (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ))
#define NOT_ABOVE(a, b) (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ))
#include "residual_search.h"

#define NAME(x) x##_avx512
#define doubles eight_doubles
#define singles eight_singles
#define PART 8
#define SOME_ROWS 8
#define FOR_PROCESSOR __attribute__((target("avx512f,avx512dq,avx512vl,avx2,fma")))
#define LANES 16
#define ROWS 12
#define WIDE 8
#define vec __m512
#define LOAD(p) _mm512_load_ps(p)
#define STORE(p, v) _mm512_store_ps(p, v)
#define SPREAD(x) _mm512_set1_ps(x)
#define MULTIPLY_ADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SUBTRACT(a, b) _mm512_sub_ps(a, b)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define LESSER(a, b) _mm512_min_ps(a, b)
#define GREATER(a, b) _mm512_max_ps(a, b)
#define LEAST(v) _mm512_reduce_min_ps(v)
#define WHERE_AT_MOST(a, b, x, y) _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), x)
#define places __m512i
#define SPREAD_PLACE(x) _mm512_set1_epi32(x)
#define ADD_PLACES(a, b) _mm512_add_epi32(a, b)
#define STORE_PLACES(p, v) _mm512_store_si512(p, v)
#define WHERE_LESS(a, b, x, y) _mm512_mask_mov_epi32(y, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), x)
#define AT_MOST(a, b) (uint32_t)_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ)
#define NOT_ABOVE(a, b) (uint32_t)_mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ)
#include "residual_search.h"
#endif

typedef int64_t (*quantize_rows)(const residual_search *, const request *, int64_t, int64_t);

static const struct {
    const char *name;
    int lanes;
    quantize_rows quantize;
} KINDS[] = {
    {"any processor", 4, quantize_anywhere},
#if defined(__x86_64__)
    {"AVX2", 8, quantize_avx2},
    {"AVX-512", 16, quantize_avx512},
#endif
};

/* The best kind that this processor has, no more than `most`. */
int residual_search_kind(int most)
{
    int best = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        best = 1;
    if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        best = 2;
#endif
    return best < most ? best : most;
}

const char *residual_search_kind_name(int kind)
{
    return KINDS[kind].name;
}

void residual_search_free(residual_search *search)
{
    if (!search)
        return;
    for (int64_t level = 0; search->tables && level < search->levels; level++) {
        level_table *table = search->tables + level;
        free(table->centre);
        free(table->codewords);
        free(table->packed);
        free(table->norms);
        free(table->inverse_spans);
        free(table->closest);
    }
    free(search->tables);
    free(search);
}

/* A search of so many levels; each is to be filled by residual_search_fill. None without memory. */
residual_search *residual_search_new(int64_t levels, int64_t dimension, int kind)
{
    residual_search *search = calloc(1, sizeof *search);
    if (!search)
        return NULL;
    *search = (residual_search){levels, dimension, whole(dimension, SUMS), kind, calloc((size_t)levels, sizeof(level_table))};
    if (search->tables)
        return search;
    free(search);
    return NULL;
}

/* Copies one level's table; false without memory. All arrays are dense.
 *
 * codewords, centred (K, d), centre (d), norms (K), squared and infinite where a codeword is not to be chosen; radius,
 * the largest norm; inverse_spans (K, K), of which the diagonal does not count. */
bool residual_search_fill(residual_search *search, int64_t level, int64_t size, const double *codewords,
                          const double *centred, const double *centre_of_all, const double *norms, double radius,
                          const float *inverse_spans)
{
    const int64_t lanes = KINDS[search->kind].lanes, dimension = search->dimension, padded = search->padded;
    level_table *table = search->tables + level;
    table->size = size;
    table->width = whole(size, 2 * lanes);
    table->radius = radius;
    table->centre = reserve(padded * 8);
    table->codewords = reserve(size * padded * 8);
    table->packed = reserve(table->width * dimension * 4);
    table->norms = reserve(table->width * 4);
    table->inverse_spans = reserve(size * table->width * 4);
    table->closest = reserve(size * 4);
    if (!table->centre || !table->codewords || !table->packed || !table->norms || !table->inverse_spans ||
        !table->closest)
        return false;
    memset(table->centre, 0, (size_t)padded * 8);
    memset(table->codewords, 0, (size_t)(size * padded) * 8);
    memset(table->packed, 0, (size_t)(table->width * dimension) * 4);
    memcpy(table->centre, centre_of_all, (size_t)dimension * 8);
    for (int64_t word = 0; word < table->width; word++)
        table->norms[word] = word < size ? (float)norms[word] : INFINITY;
    for (int64_t word = 0; word < size; word++) {
        memcpy(table->codewords + word * padded, codewords + word * dimension, (size_t)dimension * 8);
        float *group = table->packed + word / lanes * lanes * dimension;
        for (int64_t i = 0; i < dimension; i++)
            group[i * lanes + word % lanes] = (float)(-2 * centred[word * dimension + i]);
        float *spans = table->inverse_spans + word * table->width;
        float closest = 0;
        for (int64_t other = 0; other < table->width; other++) {
            const float span = other < size ? inverse_spans[word * size + other] : 1;
            /* An infinite one times a gap of 0 would be no number. */
            spans[other] = other == word ? NAN : span < FLT_MAX ? span : FLT_MAX;
            if (other < size && other != word && table->norms[other] < INFINITY && spans[other] > closest)
                closest = spans[other];
        }
        table->closest[word] = closest;
    }
    return true;
}

typedef struct {
    const residual_search *search;
    const request *asked;
    int64_t from, to, doubtful;
} share;

static void *quantize_share(void *argument)
{
    share *own = argument;
    own->doubtful = KINDS[own->search->kind].quantize(own->search, own->asked, own->from, own->to);
    return NULL;
}

/* Codes, the smallest margin and the error of latents (B, d), and where they are wanted margins and residuals; see
 * `request`.
 *
 * How many rows are left in doubt (their smallest margin is NaN, and their codes are none), or -1 without memory. The rows are
 * shared evenly among at most so many threads, this one among them. */
int64_t residual_search_quantize(const residual_search *search, const void *latents, int is_double, int64_t rows,
                                 int64_t *codes, double *smallest, double *errors, void *margins, void *residuals,
                                 int threads)
{
    const request asked = {latents, codes, margins, residuals, smallest, errors, is_double != 0};
    if (threads <= 1 || rows <= 1)
        return KINDS[search->kind].quantize(search, &asked, 0, rows);
    if (threads > MOST_THREADS)
        threads = MOST_THREADS;
    share shares[MOST_THREADS];
    pthread_t workers[MOST_THREADS];
    bool started[MOST_THREADS];
    const int64_t each = whole((rows + threads - 1) / threads, 12);
    int64_t doubtful = 0;
    for (int i = threads - 1; i >= 0; i--) {
        const int64_t from = i * each < rows ? i * each : rows, to = from + each < rows ? from + each : rows;
        shares[i] = (share){search, &asked, from, to, 0};
        started[i] = i > 0 && to > from && pthread_create(workers + i, NULL, quantize_share, shares + i) == 0;
        if (!started[i] && to > from)
            quantize_share(shares + i);
    }
    bool short_of_memory = false;
    for (int i = 0; i < threads; i++) {
        if (started[i])
            pthread_join(workers[i], NULL);
        short_of_memory |= shares[i].doubtful < 0;
        doubtful += shares[i].doubtful;
    }
    return short_of_memory ? -1 : doubtful;
}
