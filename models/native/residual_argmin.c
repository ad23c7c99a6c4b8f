/* Residual quantization on a processor: nearest codewords and margins of all levels in one pass over the rows.
 *
 * A block of rows stays in the cache from level to level. Scores |c|^2 - 2 x.c around the codebook's mean are computed
 * in float32 or, where the processor has it, from numbers cut to int16, a tile of rows against two vectors of codewords
 * in registers. What that may round off bounds which codewords can be the nearest and which planes between codewords can be the nearest to the residual: one of each for
 * most rows. Those alone are measured in float64, by differences, and the residual goes on in float64. So codes and
 * margins are those of float64 throughout, and what a row comes to depends neither on the rows beside it nor on the
 * processor. A row that float64 leaves in doubt (a tie, or a number that float32 cannot hold) gets NaN for a margin.
 *
 * Compiled without contraction (-ffp-contract=off): float64 sums are the same whatever the processor.
 */

#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

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
/* Rows that threads take at a time: so many units for each, of multiples of every tile's rows. */
#define UNITS 4
#define UNIT_ROWS 24
/* Norms, in whole numbers, of points and of codewords that are cut to int16: no sum of products leaves int32, by Cauchy
 * and Schwarz. */
#define POINT_NUMBERS 32000
#define CODEWORD_NUMBERS 64000
/* Of a point that is cut; below it, it is nothing beside what float32 rounds off. */
#define SMALLEST_NORM 1e-30f

/* Of the functions below; INTERFACE of search.py has the same, and both change with them. */
const int32_t residual_search_version = 4;

typedef struct {
    int64_t size;         /* K */
    int64_t width;        /* K filled up to whole groups of lanes */
    double radius;        /* the largest norm of a centred codeword */
    double *centre;       /* (padded), the mean of the codewords */
    double *codewords;    /* (K, padded) */
    void *packed;         /* (width / lanes, d, lanes), -2 times the centred codewords; or, cut to int16, in pairs of
                           * dimensions (width / lanes, (d + 1) / 2, lanes, 2) */
    float step, slack;    /* of those cut: what a product of whole numbers stands for, over the norm of the point; and the
                           * slack of scores, over the same */
    int32_t *positions;      /* (width), 0, 1, ... */
    int32_t place_digits; /* the last bits of a number, where a place is held */
    float place_share;    /* what these may stand for of a number */
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
    void *smallest;      /* (B), the smallest margin of each row */
    void *errors;        /* (B), squared norms of what no level took */
    bool is_double;      /* all numbers but the codes are float64, else float32 */
} request;

typedef struct {
    void *memory;
    double *residuals; /* (block, padded) */
    double *norms;     /* (block), of the points */
    double *smallest;  /* (block), the smallest margin so far; once NaN, it stays so */
    float *scales;     /* (block), of the products of points that are cut to int16 */
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
    const int64_t residuals = whole(block * search->padded * 8, ALIGNMENT), norms = whole(block * 8, ALIGNMENT);
    const int64_t points = whole(block * search->padded * 4, ALIGNMENT), scores = whole(tile * width * 4, ALIGNMENT);
    const int64_t scales = whole(block * 4, ALIGNMENT);
    char *memory = reserve(residuals + 2 * norms + points + scores + scales + block);
    if (!memory)
        return false;
    space->memory = memory;
    space->residuals = (double *)memory;
    space->norms = (double *)(memory + residuals);
    space->smallest = (double *)(memory + residuals + norms);
    space->points = (float *)(memory + residuals + 2 * norms);
    space->scores = (float *)(memory + residuals + 2 * norms + points);
    space->scales = (float *)(memory + residuals + 2 * norms + points + scores);
    space->in_doubt = (bool *)(memory + residuals + 2 * norms + points + scores + scales);
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
        space->smallest[row] = INFINITY;
    }
}

static inline void write_number(const request *asked, void *numbers, int64_t at, double number)
{
    if (asked->is_double)
        ((double *)numbers)[at] = number;
    else
        ((float *)numbers)[at] = (float)number;
}

static void write_level(const request *asked, const residual_search *search, int64_t row, int64_t level, int64_t code,
                        double margin, const double *residual)
{
    const int64_t at = row * search->levels + level;
    asked->codes[at] = code;
    if (asked->margins)
        write_number(asked, asked->margins, at, margin);
    if (asked->residuals)
        write_numbers(asked, (row * (search->levels + 1) + level + 1) * search->dimension, residual, search->dimension);
}

static inline void fetch(const void *from, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += ALIGNMENT)
        __builtin_prefetch((const char *)from + at);
}

/* Twice what two scores in float32 may be off by together. */
static inline float slack_of_floats(int64_t dimension, double square)
{
    return (float)(4 * (dimension + 8) * (FLT_EPSILON * square + FLT_MIN));
}

/* The same of scores from numbers that are cut to int16, of a point with this norm. A step that float32 holds with few
 * digits is below the last term. */
static inline float slack_of_cut(const level_table *table, double norm, double square)
{
    return (float)(table->slack * norm + 32 * (FLT_EPSILON * square + FLT_MIN * 0x1p32));
}

typedef int32_t __attribute__((may_alias)) pair; /* of int16 */

typedef struct {
    double gap;  /* by how much another codeword is farther than the first, in squared distances */
    double span; /* their own squared distance */
} comparison;

#include "residual_kinds.h"

typedef int64_t (*quantize_rows)(const residual_search *, const request *, int64_t, int64_t);

static const struct {
    const char *name;
    int lanes;
    bool cuts; /* to int16 */
    quantize_rows quantize;
} KINDS[] = {
    {"any processor", 4, false, quantize_anywhere},
#if defined(__x86_64__)
    {"AVX2", 8, false, quantize_avx2},
    {"AVX-512", 16, false, quantize_avx512},
    {"AVX-512 with VNNI", 16, true, quantize_vnni},
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
    if (best == 2 && __builtin_cpu_supports("avx512vnni"))
        best = 3;
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
        free(table->positions);
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

/* Cuts centred codewords (K, d) to int16, in pairs of dimensions. */
static void cut_codewords(level_table *table, int64_t dimension, int64_t lanes, const double *centred)
{
    double largest = 0, cut_off = 0;
    for (int64_t i = 0; i < table->size * dimension; i++)
        largest = fmax(largest, fabs(centred[i]));
    const double step = fmax(table->radius / CODEWORD_NUMBERS, largest / INT16_MAX);
    for (int64_t word = 0; word < table->size; word++) {
        int16_t *group = (int16_t *)table->packed + word / lanes * lanes * whole(dimension, 2);
        double squares = 0;
        for (int64_t i = 0; i < dimension; i++) {
            const double number = centred[word * dimension + i], cut = step > 0 ? rint(number / step) : 0;
            group[(i / 2 * lanes + word % lanes) * 2 + i % 2] = (int16_t)cut;
            squares += (number - cut * step) * (number - cut * step);
        }
        cut_off = fmax(cut_off, sqrt(squares));
    }
    /* Of a point half a step is cut off in each dimension, and a hair as its scale is rounded. */
    const double cut_off_of_point = 0.51 * sqrt((double)dimension) / POINT_NUMBERS;
    table->step = (float)(-2 / (double)POINT_NUMBERS * step);
    table->slack = (float)(4.04 * (cut_off_of_point * table->radius + 1.01 * cut_off));
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
    const int64_t packed = table->width * (KINDS[search->kind].cuts ? whole(dimension, 2) * 2 : dimension * 4);
    table->packed = reserve(packed);
    table->norms = reserve(table->width * 4);
    table->inverse_spans = reserve(size * table->width * 4);
    table->closest = reserve(size * 4);
    table->positions = reserve(table->width * 4);
    if (!table->centre || !table->codewords || !table->packed || !table->norms || !table->inverse_spans ||
        !table->closest || !table->positions)
        return false;
    memset(table->centre, 0, (size_t)padded * 8);
    memset(table->codewords, 0, (size_t)(size * padded) * 8);
    memset(table->packed, 0, (size_t)packed);
    memcpy(table->centre, centre_of_all, (size_t)dimension * 8);
    while (table->place_digits < table->width - 1)
        table->place_digits = 2 * table->place_digits + 1;
    table->place_share = 1.01f * FLT_EPSILON * (float)(table->place_digits + 1);
    for (int64_t word = 0; word < table->width; word++) {
        table->norms[word] = word < size ? (float)norms[word] : INFINITY;
        table->positions[word] = (int32_t)word;
    }
    for (int64_t word = 0; word < size; word++) {
        memcpy(table->codewords + word * padded, codewords + word * dimension, (size_t)dimension * 8);
        if (!KINDS[search->kind].cuts) {
            float *group = (float *)table->packed + word / lanes * lanes * dimension;
            for (int64_t i = 0; i < dimension; i++)
                group[i * lanes + word % lanes] = (float)(-2 * centred[word * dimension + i]);
        }
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
    if (KINDS[search->kind].cuts)
        cut_codewords(table, dimension, lanes, centred);
    return true;
}

typedef struct {
    const residual_search *search;
    const request *asked;
    int64_t rows, each; /* rows of a unit */
    atomic_llong next, doubtful;
    atomic_bool short_of_memory;
} shared_rows;

static void quantize_units(void *argument, int thread)
{
    shared_rows *all = argument;
    (void)thread;
    for (;;) {
        const int64_t from = atomic_fetch_add(&all->next, all->each);
        if (from >= all->rows)
            return;
        const int64_t to = from + all->each < all->rows ? from + all->each : all->rows;
        const int64_t doubtful = KINDS[all->search->kind].quantize(all->search, all->asked, from, to);
        if (doubtful < 0)
            atomic_store(&all->short_of_memory, true);
        else
            atomic_fetch_add(&all->doubtful, doubtful);
    }
}

/* Codes, the smallest margin and the error of latents (B, d), and where they are wanted margins and residuals; see
 * `request`.
 *
 * How many rows are left in doubt (their smallest margin is NaN, and their codes are none), or -1 without memory. The rows are
 * shared among at most so many threads; nicer: see `work_together`. */
int64_t residual_search_quantize(const residual_search *search, const void *latents, int is_double, int64_t rows,
                                 int64_t *codes, void *smallest, void *errors, void *margins, void *residuals,
                                 int threads, int nicer)
{
    const request asked = {latents, codes, margins, residuals, smallest, errors, is_double != 0};
    if (threads <= 1 && nicer <= 0)
        return KINDS[search->kind].quantize(search, &asked, 0, rows);
    threads = threads > 1 ? threads : 1;
    const int64_t each = whole(rows / (UNITS * threads) + 1, UNIT_ROWS);
    shared_rows all = {.search = search, .asked = &asked, .rows = rows, .each = each < BLOCK_ROWS ? each : BLOCK_ROWS};
    work_together(quantize_units, &all, threads, nicer);
    return all.short_of_memory ? -1 : (int64_t)all.doubtful;
}
