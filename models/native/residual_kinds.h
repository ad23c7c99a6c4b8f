/* The search for each kind of processor: what its vectors are, and the search made of them, see residual_search.h. */

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
#define LOAD_PLACES(p) (*(const four_masks *)(p))
#define WITH_PLACES(v, digits, places) ((four)(((four_masks)(v) & ~(digits)) | (places)))
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
#define LOAD_PLACES(p) _mm256_load_si256((const __m256i *)(p))
#define WITH_PLACES(v, digits, places) \
    _mm256_castsi256_ps(_mm256_or_si256(_mm256_andnot_si256(digits, _mm256_castps_si256(v)), places))
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
#define LOAD_PLACES(p) _mm512_load_si512(p)
#define WITH_PLACES(v, digits, places) \
    _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(v), digits, places, 0xBA)) /* (a & ~b) | c */
#define AT_MOST(a, b) (uint32_t)_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ)
#define NOT_ABOVE(a, b) (uint32_t)_mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ)
#define VECTORS_STAY
#include "residual_search.h"
#undef VECTORS_STAY

/* The same with points and codewords cut to int16: two products for one. */
#define NAME(x) x##_vnni
#define FOR_PROCESSOR __attribute__((target("avx512f,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define TERMS 2
#define number_of pair
#define sum_of __m512i
#define BEGIN_SUM(norms) _mm512_setzero_si512()
#define LOAD_TERMS(p) _mm512_load_si512(p)
#define SPREAD_TERM(x) _mm512_set1_epi32(x)
#define ADD_TERMS(a, b, c) \
    ({ /* of the intrinsic GCC 12 keeps half of the sums in memory */ \
        __m512i sum_ = (c); \
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum_) : "v"(a), "v"(b)); \
        sum_; \
    })
#define END_SUM(sum, scale, norms) MULTIPLY_ADD(_mm512_cvtepi32_ps(sum), SPREAD(scale), LOAD(norms))
#include "residual_search.h"
#endif
