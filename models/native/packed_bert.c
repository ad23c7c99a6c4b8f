/* A BERT encoder's forward pass over packed texts, for processors with AVX-512.
 *
 * What a library's product of few rows waits for is memory: a text's forty rows meet forty megabytes of weights. Here
 * the weights of all layers lie in the order of their use, on large pages, in panels that fit the second cache; while
 * one panel is multiplied the next one is fetched. Activations stay in the cache, and bias, residual and GELU are done
 * as a product leaves the registers.
 *
 * All matrices are cut into squares of the model's width (384 or 768, see bert_layers.h): three of query, key and
 * value, one behind attention, four up and four down. A square is width / 32 panels of (width, 32).
 *
 * A pass is computed in float32; or, where that leaves a code in doubt, in float64, from the same weights, which become float64
 * as they are read: two and a half times as long, where torch takes four times for a text.
 *
 * Where the processor has VNNI, a pass can multiply in int16: each row of a product's left side and each column of its
 * right side is cut to whole numbers, whose products are summed exactly; two multiplications for one, and half the bytes. All
 * else stays float32. An embedding errs by 5e-4 then; bfloat16 makes it ten times as much.
 *
 * A batch is worked on in shares of whole texts, each at most `rows` word pieces (a longer text is a share alone). Several
 * shares are spread over the threads; how a single one is stands in bert_schedule.h.
 */

#define _GNU_SOURCE
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_LAYERS 24
#define MOST_TOKENS 512
#define MOST_HEAD 64
#define PANEL 32
#define SQUARES 12
/* Norm, in whole numbers, of what is cut to int16: no sum of products leaves int32, by Cauchy and Schwarz. */
#define CUT_NORM 46000

/* Of the functions below; INTERFACE of forward.py has the same, and both change with them. */
const int32_t packed_bert_version = 4;

#if defined(__x86_64__) && defined(__linux__)
#include <sys/mman.h>

#include "threads.h"
#include "bert_schedule.h"

typedef struct {
    int64_t width, layers, heads;
    double epsilon;
    bool pools_mean, normalizes;
    const float *words, *places, *type, *norm; /* (V, D), (P, D), (D), weight and bias (2, D): kept by the caller */
    float *weights;       /* (layers, SQUARES, D / PANEL, D, PANEL) */
    int16_t *cut_weights; /* the same cut to int16, (layers, SQUARES, D / PANEL, D / 2, PANEL, 2); or none */
    float *scales;        /* (layers, SQUARES, D), of their columns */
    size_t bytes;         /* of both */
    float *vectors; /* (layers, 13, D): biases of query, key, value, attention, up (4), down; two norms */
} packed_bert;

/* What a pass is computed in; PRECISIONS of forward.py has the same. */
enum { FLOAT32 = 0, INT16 = 1, FLOAT64 = 2 };

enum { BIAS_ATTENDED = 3, BIAS_UP = 4, BIAS_DOWN = 8, NORM_ATTENDED = 9, NORM = 11, VECTORS = 13 };

typedef struct {
    const packed_bert *bert;
    const int64_t *pieces, *lengths; /* word pieces one after another, and how many each text has */
    int64_t texts;
    void *embeddings; /* (texts, D) of REAL */
    void *room;       /* of each thread, or of all; numbers of REAL */
    int64_t room_each, rows;
    bool together; /* all threads at one share */
    int precision, threads;
    atomic_long next_share;
    stage *stages; /* where threads are together: these, */
    part *parts;   /* or these, one for each thread */
} request;

/* Numbers that a share of so many rows is worked on in, see `place`. */
static int64_t room_of(int64_t width, int64_t rows)
{
    return (10 * width + 16) * rows;
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#include <immintrin.h>

#define EXACT 0

#define WIDTH 384
#define NAME(x) x##_384
#include "bert_layers.h"
#undef WIDTH
#undef NAME

#define WIDTH 768
#define NAME(x) x##_768
#include "bert_layers.h"
#undef WIDTH
#undef NAME

#undef EXACT
#define EXACT 1

#define WIDTH 384
#define NAME(x) x##_384_exact
#include "bert_layers.h"
#undef WIDTH
#undef NAME

#define WIDTH 768
#define NAME(x) x##_768_exact
#include "bert_layers.h"
#undef WIDTH
#undef NAME

#pragma GCC pop_options

/* Whether this processor and this shape of a BERT are provided for. */
bool packed_bert_can(int64_t layers, int64_t width, int64_t inner, int64_t heads, int64_t positions)
{
    __builtin_cpu_init();
    return (width == 384 || width == 768) && layers > 0 && layers <= MOST_LAYERS &&
           inner == 4 * width && heads > 0 && width % (heads * PANEL) == 0 &&
           width / heads <= MOST_HEAD &&
           positions <= MOST_TOKENS && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
}

void packed_bert_free(packed_bert *bert)
{
    if (!bert)
        return;
    if (bert->weights)
        munmap(bert->weights, bert->bytes);
    free(bert->vectors);
    free(bert->scales);
    free(bert);
}

/* A forward pass whose layers are to be filled by packed_bert_fill; none without memory. The tables are kept as they are:
 * words (V, D), places (P, D), the token type (D), norm (2, D), its weight and bias. */
packed_bert *packed_bert_new(int64_t width, int64_t layers, int64_t heads, double epsilon, int pools_mean, int normalizes,
                             const float *words, const float *places, const float *type, const float *norm)
{
    packed_bert *bert = calloc(1, sizeof *bert);
    if (!bert)
        return NULL;
    const bool cuts = __builtin_cpu_supports("avx512vnni");
    const size_t page = (size_t)1 << 21, count = (size_t)(layers * SQUARES * width * width);
    const size_t bytes = count * (sizeof(float) + (cuts ? sizeof(int16_t) : 0));
    *bert = (packed_bert){.width = width, .layers = layers, .heads = heads, .epsilon = epsilon,
                          .pools_mean = pools_mean, .normalizes = normalizes, .words = words, .places = places,
                          .type = type, .norm = norm, .bytes = (bytes + page - 1) / page * page};
    bert->vectors = aligned_alloc(64, (size_t)(layers * VECTORS * width) * sizeof(float));
    bert->scales = aligned_alloc(64, (size_t)(layers * SQUARES * width) * sizeof(float));
    /* Large pages have to begin at multiples of their size: what lies around that is given back. */
    char *got = mmap(NULL, bert->bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got != MAP_FAILED) {
        const size_t before = (page - (uintptr_t)got % page) % page;
        if (before)
            munmap(got, before);
        if (page - before)
            munmap(got + before + bert->bytes, page - before);
        bert->weights = (float *)(got + before);
        bert->cut_weights = cuts ? (int16_t *)(bert->weights + count) : NULL;
        madvise(bert->weights, bert->bytes, MADV_HUGEPAGE); /* where there are none, small ones do */
    }
    if (bert->weights && bert->vectors && bert->scales)
        return bert;
    packed_bert_free(bert);
    return NULL;
}

/* Cuts one column of a panel, its weights (D), to int16 in pairs: every PANEL-th pair. What they are to be multiplied by. */
static float cut_column(const float *weights, int64_t width, int16_t *to)
{
    double squares = 0, largest = 0;
    for (int64_t in = 0; in < width; in++) {
        squares += (double)weights[in] * weights[in];
        largest = fmax(largest, fabs(weights[in]));
    }
    const double step = fmax(sqrt(squares) / CUT_NORM, largest / INT16_MAX);
    for (int64_t in = 0; in < width; in++)
        to[in / 2 * 2 * PANEL + in % 2] = step > 0 ? (int16_t)rint(weights[in] / step) : 0;
    return (float)step;
}

/* Whether it has its weights in int16 too. */
bool packed_bert_cuts(const packed_bert *bert)
{
    return bert->cut_weights != NULL;
}

/* Copies one layer: squares (12, D, D), each (out, in), and vectors (13, D), in the order of `packed_bert`. */
void packed_bert_fill(packed_bert *bert, int64_t layer, const float *squares, const float *vectors)
{
    const int64_t width = bert->width, square = width * width;
    float *to = bert->weights + layer * SQUARES * square;
    for (int64_t s = 0; s < SQUARES; s++)
        for (int64_t panel = 0; panel < width / PANEL; panel++)
            for (int64_t in = 0; in < width; in++)
                for (int64_t out = 0; out < PANEL; out++)
                    *to++ = squares[s * square + (panel * PANEL + out) * width + in];
    for (int64_t column = 0; bert->cut_weights && column < SQUARES * width; column++)
        bert->scales[layer * SQUARES * width + column] =
            cut_column(squares + column * width, width,
                       bert->cut_weights + (layer * SQUARES * width + column / PANEL * PANEL) * width + column % PANEL * 2);
    memcpy(bert->vectors + layer * VECTORS * width, vectors, (size_t)(VECTORS * width) * sizeof(float));
}

/* Bytes of room that packed_bert_embed needs for texts of at most `longest` word pieces with so many threads. */
int64_t packed_bert_room(const packed_bert *bert, int64_t longest, int64_t rows, int threads, int precision)
{
    const size_t number = precision == FLOAT64 ? sizeof(double) : sizeof(float);
    return room_of(bert->width, longest > rows ? longest : rows) * threads * (int64_t)number;
}

static void embed(void *given, int thread)
{
    request *asked = given;
    const bool narrow = asked->bert->width == 384;
    if (asked->precision == FLOAT64)
        (narrow ? embed_384_exact : embed_768_exact)(asked, thread);
    else
        (narrow ? embed_384 : embed_768)(asked, thread);
}

/* Embeddings (texts, D) of texts as word pieces, each of one at least, `longest` at most; false without memory. They are
 * float64 where that is the precision, else float32.
 *
 * room: aligned to 64 bytes, see packed_bert_room; no other call may use it meanwhile. rows: of a share. precision: INT16 only
 * where it packed_bert_cuts. nicer: see `work_together`. */
bool packed_bert_embed(const packed_bert *bert, const int64_t *pieces, const int64_t *lengths, int64_t texts,
                       int64_t longest, void *embeddings, void *room, int64_t rows, int threads,
                       int precision, int nicer)
{
    int64_t total = 0;
    for (int64_t text = 0; text < texts; text++)
        total += lengths[text];
    request asked = {.bert = bert, .pieces = pieces, .lengths = lengths, .texts = texts, .embeddings = embeddings,
                     .room = room, .room_each = room_of(bert->width, longest > rows ? longest : rows), .rows = rows,
                     .together = total <= rows || texts == 1, .precision = precision, .threads = threads};
    void *schedule = NULL;
    if (threads > 1 && asked.together) {
        const bool parts = threads <= MOST_PARTS && total >= (int64_t)threads * FEWEST_ROWS;
        const size_t bytes = parts ? (size_t)threads * sizeof(part) : (size_t)(STAGES * bert->layers + 1) * sizeof(stage);
        schedule = aligned_alloc(sizeof(stage), bytes);
        if (!schedule)
            return false;
        memset(schedule, 0, bytes);
        asked.parts = parts ? schedule : NULL;
        asked.stages = parts ? NULL : schedule;
    }
    work_together(embed, &asked, threads, nicer);
    free(schedule);
    return true;
}

#else
bool packed_bert_can(int64_t layers, int64_t width, int64_t inner, int64_t heads, int64_t positions)
{
    (void)layers, (void)width, (void)inner, (void)heads, (void)positions;
    return false;
}
#endif
