/* Numbers of a forward pass, REAL, and vectors of them. Before each inclusion: EXACT, whether these are float64 or float32.
 *
 * The model's own numbers stay float32: where the pass is exact they are made float64, which each of them is, as they are
 * read. */

#if EXACT
#define REAL double
#define VECTOR __m512d
#define MASK __mmask8
#define LANES 8
#define OP(x) _mm512_##x##_pd
#define BELOW(a, b) _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ)
#define GIVEN(at) _mm512_cvtps_pd(_mm256_loadu_ps(at))
#define ROOT sqrt
#else
#define REAL float
#define VECTOR __m512
#define MASK __mmask16
#define LANES 16
#define OP(x) _mm512_##x##_ps
#define BELOW(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define GIVEN(at) _mm512_loadu_ps(at)
#define ROOT sqrtf
#endif

#define INLINE static inline __attribute__((always_inline))

/* e to the power of x, for x of at most 0. */
INLINE VECTOR NAME(exponential)(VECTOR x)
{
    const VECTOR n = OP(roundscale)(OP(mul)(x, OP(set1)((REAL)1.44269504088896341)), 8);
#if EXACT
    VECTOR r = OP(fnmadd)(n, OP(set1)(6.93147180369123816490e-01), x);
    r = OP(fnmadd)(n, OP(set1)(1.90821492927058770002e-10), r);
    VECTOR y = OP(set1)(1.0 / 39916800);
    const REAL factors[] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                            1.0 / 24,      1.0 / 6,      0.5,         1,          1};
#else
    VECTOR r = OP(fnmadd)(n, OP(set1)(0.693359375f), x);
    r = OP(fnmadd)(n, OP(set1)(-2.12194440e-4f), r);
    VECTOR y = OP(set1)(1.0f / 5040);
    const REAL factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
#endif
#pragma GCC unroll 11
    for (int i = 0; i < (int)(sizeof factors / sizeof *factors); i++)
        y = OP(fmadd)(y, r, OP(set1)(factors[i]));
    return OP(scalef)(y, n);
}

/* x / 2 (1 + erf(x / sqrt 2)). With z = |x| / sqrt 2 and t = 1 / (1 + 3 z / 8), erfc(z) is exp(-z z) t P(t): P fits it over
 * z up to 10, by least squares 1.3e-8 off at most in float32, through Chebyshev's points 1.1e-14 in float64. */
INLINE VECTOR NAME(gelu)(VECTOR x)
{
    const VECTOR z = OP(mul)(OP(abs)(x), OP(set1)((REAL)0.707106781186547524));
    const VECTOR t = OP(div)(OP(set1)(1), OP(fmadd)(z, OP(set1)((REAL)0.375), OP(set1)(1)));
#if EXACT
    const REAL factors[] = {8.78520050388187693e-04,  -5.19783292859792856e-02, 2.90557802129507881e-01,
                            -8.21957995944232467e-01, 1.42270871668196452e+00,  -1.61937676359466765e+00,
                            1.29955552849272649e+00,  -8.14952739111113877e-01, 3.69371895622336022e-01,
                            -9.48064070151928562e-02, 1.12878091032704367e-01,  1.18633225254873451e-01,
                            1.67919523502540746e-01,  1.96599622760868981e-01,  2.11576772020787063e-01,
                            2.11570938492564420e-01};
    VECTOR p = OP(set1)(8.21598909935031068e-04);
#else
    const REAL factors[] = {-2.875547412e-01f, 4.328167783e-01f, -2.298420806e-01f, 2.739889504e-01f,
                            1.214048363e-01f,  2.053362278e-01f, 2.106468180e-01f,  2.116136244e-01f};
    VECTOR p = OP(set1)(6.158959733e-02f);
#endif
#pragma GCC unroll 16
    for (int i = 0; i < (int)(sizeof factors / sizeof *factors); i++)
        p = OP(fmadd)(p, t, OP(set1)(factors[i]));
    const VECTOR power = NAME(exponential)(OP(mul)(OP(mul)(x, x), OP(set1)((REAL)-0.5)));
    const VECTOR tail = OP(mul)(x, OP(mul)(OP(mul)(p, t), OP(mul)(power, OP(set1)((REAL)0.5))));
    return OP(mask_blend)(BELOW(x, OP(setzero)()), OP(sub)(x, tail), tail);
}

/* Turns LANES rows, as far as they are there (else 0), of LANES numbers: to (LANES, of PANEL). */
INLINE void NAME(turn)(const REAL *rows, int64_t stride, int64_t there, REAL *to)
{
#if EXACT
    for (int i = 0; i < LANES; i++)
        for (int k = 0; k < LANES; k++)
            to[k * PANEL + i] = i < there ? rows[i * stride + k] : 0;
#else
    VECTOR a[LANES], b[LANES];
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
        const VECTOR even = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        const VECTOR even2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        const VECTOR odd2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        _mm512_storeu_ps(to + i * PANEL, _mm512_shuffle_f32x4(even, even2, 0x88));
        _mm512_storeu_ps(to + (i + 4) * PANEL, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        _mm512_storeu_ps(to + (i + 8) * PANEL, _mm512_shuffle_f32x4(even, even2, 0xdd));
        _mm512_storeu_ps(to + (i + 12) * PANEL, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
#endif
}
