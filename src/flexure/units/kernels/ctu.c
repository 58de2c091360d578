/* The curvature-tuning unit in float32: values, slopes in x, and the sums that make the derivatives
 * in its dials. Plain loops that a compiler turns into vector code; no library is called.
 *
 * What is computed, with a = |x|, e = exp(-eta*a), z = exp(-gamma*a), r = 1/(1+e), p = e*r:
 *
 *     value  relu(x) - c*a*p + (1-c)*(1-beta)*log(1+z)
 *     slope  c*(s + u*p*r) + (1-c)*w,  u = eta*x,  s, w = sigmoid(u), sigmoid(gamma*x)
 *     sums   of g*a^2*p*r, g*log(1+z), g*a*z/(1+z), g*a*p
 *
 * A table holds five rows of coefficients: eta/log 2, gamma/log 2, c, (1-c)*(1-beta), and the
 * least exponent of a non-zero x: EXPONENTS where beta = 1, else LEAST_EXPONENT. Where beta = 1, c and
 * (1-c)*(1-beta) must be 0, which makes the value exactly relu. A row of the
 * table is `width` long, one entry for every stretch of x that shares a dial ("rows") or for every
 * place in a period of x ("columns").
 *
 * Memory layouts, checks and threads live in calls.py, where the shared object comes from in
 * build.py.
 */
#include <float.h>
#include <stddef.h>
#include <stdint.h>

#define SUMS 4
/* Single precision adds up at most this many products before double precision takes over. */
#define RUN 4096
#define ROWS_PER_RUN 64
/* Columns whose coefficients and sums stay in the first-level cache while rows pass by. */
#define TILE 512
/* |x| counts as at most this in the sums, so that its square stays finite. */
#define LARGEST_SQUARED 1e18f
/* Exponents of 2: 2^-EXPONENTS counts as 0. calls.py knows both. */
#define EXPONENTS 127.0f
#define LEAST_EXPONENT -100.0f
#define LN2 0.693147180559945309f

#define INLINE static inline __attribute__((always_inline))

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

typedef struct {
    float eta, gamma, c, soft, least;
} dials;

typedef struct {
    float a, t, z, r, p, q, w; /* t = eta*a/log 2, q = 1/(1+z), w = z/(1+z) */
} terms;

typedef struct {
    float squeezed, soft, sharp, gated; /* in the order of the sums above */
} products;

INLINE dials read_dials(const float *k, int64_t width, int64_t i) {
    dials d = {k[i], k[width + i], k[2 * width + i], k[3 * width + i], k[4 * width + i]};
    return d;
}

/* 2^-t for -100 <= t <= 127, exactly 1 at 0, exactly 0 from 126.5 on (no subnormals); nan stays. */
INLINE float exp2_minus(float t) {
    const float round = 12582912.0f; /* 1.5*2^23: adding it rounds to an integer, in the low bits */
    union {
        float f;
        uint32_t i;
    } shifted, scale;
    shifted.f = round - t;
    float f = (round - shifted.f) - t;
    scale.i = (shifted.i + 127u) << 23;
    float p = 0.000153533605f;
    p = p * f + 0.0013398875f;
    p = p * f + 0.00961843692f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + LN2;
    return scale.f * (p * f + 1.0f);
}

/* log(1+z) for 0 <= z <= 1, relative error below 1.4e-7; nan stays. */
INLINE float log1p_unit(float z) {
    float p = 0.00536473887f;
    p = p * z - 0.0300654508f;
    p = p * z + 0.0792039782f;
    p = p * z - 0.137537554f;
    p = p * z + 0.191536337f;
    p = p * z - 0.248571575f;
    p = p * z + 0.33321321f;
    p = p * z - 0.499996483f;
    return z * (p * z) + z;
}

/* Comparisons are written so that a nan comes through them. */
INLINE float at_most(float v, float high) { return v > high ? high : v; }

INLINE float magnitude(float x, float high) { return at_most(__builtin_fabsf(x), high); }

INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }

/* k*a, at most EXPONENTS (and at least LEAST_EXPONENT, for a dial outside [0, 1]). */
INLINE float exponent(float k, float a) {
    float t = at_most(k * a, EXPONENTS);
    return t < LEAST_EXPONENT ? LEAST_EXPONENT : t;
}

INLINE float value(float x, dials d) {
    float a = magnitude(x, FLT_MAX);
    float e = exp2_minus(exponent(d.eta, a));
    float z = exp2_minus(exponent(d.gamma, a));
    float p = e / (1.0f + e);
    return (relu(x) + d.soft * log1p_unit(z)) - (d.c * a) * p;
}

/* k*a between `least` and EXPONENTS; 0 at 0. */
INLINE float far_exponent(float k, float a, float least) {
    float t = at_most(k * a, EXPONENTS), floor = a > 0.0f ? least : 0.0f;
    return t < floor ? floor : t;
}

INLINE terms terms_of(float x, dials d) {
    terms m;
    m.a = magnitude(x, FLT_MAX);
    m.t = far_exponent(d.eta, m.a, d.least);
    float e = exp2_minus(m.t);
    m.z = exp2_minus(far_exponent(d.gamma, m.a, d.least));
    float inverse = 1.0f / ((1.0f + e) * (1.0f + m.z));
    m.r = inverse * (1.0f + m.z);
    m.p = e * m.r;
    m.q = inverse * (1.0f + e);
    m.w = m.z * m.q;
    return m;
}

INLINE float slope(float x, float g, dials d, terms m) {
    float bend = __builtin_copysignf((m.t * LN2) * m.p * m.r, x);
    float gated = x > 0.0f ? m.r : m.p;
    float soft = x > 0.0f ? m.q : m.w;
    float mixed = g * (soft + d.c * ((gated + bend) - soft));
    float step = x > 0.0f ? g : 0.0f;
    return d.least > 0.0f ? step : mixed;
}

INLINE products products_of(float g, terms m) {
    float a = at_most(m.a, LARGEST_SQUARED), ga = g * a;
    products s = {ga * (a * (m.p * m.r)), g * log1p_unit(m.z), ga * m.w, ga * m.p};
    return s;
}

/* One row: `n` elements that share their dials. */
INLINE void row_backward(
    const float *x, const float *g, float *y, int64_t n, dials d, double *sums, int64_t apart,
    const int slopes, const int adds
) {
    double total[SUMS] = {0.0, 0.0, 0.0, 0.0};
    for (int64_t start = 0; start < n; start += RUN) {
        int64_t end = n < start + RUN ? n : start + RUN;
        float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t i = start; i < end; i++) {
            terms m = terms_of(x[i], d);
            if (slopes) y[i] = slope(x[i], g[i], d, m);
            if (adds) {
                products s = products_of(g[i], m);
                s0 += s.squeezed, s1 += s.soft, s2 += s.sharp, s3 += s.gated;
            }
        }
        total[0] += s0, total[1] += s1, total[2] += s2, total[3] += s3;
    }
    for (int j = 0; adds && j < SUMS; j++) sums[j * apart] = total[j];
}

/* One stretch of at most TILE columns of one row; `k` and `s` begin at its first column. */
INLINE void stretch_backward(
    const float *x, const float *g, float *y, int64_t n, const float *k, int64_t width, float *s,
    const int slopes, const int adds
) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        dials d = read_dials(k, width, i);
        terms m = terms_of(x[i], d);
        if (slopes) y[i] = slope(x[i], g[i], d, m);
        if (adds) {
            products v = products_of(g[i], m);
            s[i] += v.squeezed;
            s[TILE + i] += v.soft;
            s[2 * TILE + i] += v.sharp;
            s[3 * TILE + i] += v.gated;
        }
    }
}

/* All rows of one tile of columns. `n` elements in all; `width` is the period. */
INLINE void tile_backward(
    const float *x, const float *g, float *y, int64_t n, int64_t width, int64_t first,
    const float *k, double *sums, const int slopes, const int adds
) {
    int64_t columns = width - first < TILE ? width - first : TILE;
    int64_t start = first;
    while (start < n) {
        float s[SUMS * TILE] = {0.0f};
        for (int row = 0; row < ROWS_PER_RUN && start < n; row++, start += width) {
            int64_t here = n - start < columns ? n - start : columns;
            stretch_backward(
                x + start, g + start, slopes ? y + start : NULL, here, k + first, width, s, slopes, adds
            );
        }
        for (int j = 0; adds && j < SUMS; j++)
            for (int64_t i = 0; i < columns; i++) sums[j * width + first + i] += s[j * TILE + i];
    }
}

/* The `rows` rows of `columns` elements each; row i uses entry i*step of the table. */
EXPORT void flexure_ctu_rows(
    const float *x, float *y, int64_t rows, int64_t columns, const float *k, int64_t width,
    int64_t step
) {
    for (int64_t row = 0; row < rows; row++) {
        dials d = read_dials(k, width, row * step);
        const float *xs = x + row * columns;
        float *ys = y + row * columns;
#pragma omp simd
        for (int64_t i = 0; i < columns; i++) ys[i] = value(xs[i], d);
    }
}

/* `n` elements; element i uses entry i % width of the table. */
EXPORT void flexure_ctu_columns(
    const float *x, float *y, int64_t n, const float *k, int64_t width
) {
    for (int64_t first = 0; first < width; first += TILE) {
        int64_t columns = width - first < TILE ? width - first : TILE;
        for (int64_t start = first; start < n; start += width) {
            int64_t here = n - start < columns ? n - start : columns;
            const float *xs = x + start, *ks = k + first;
            float *ys = y + start;
#pragma omp simd
            for (int64_t i = 0; i < here; i++) ys[i] = value(xs[i], read_dials(ks, width, i));
        }
    }
}

/* `y = g*slope` unless y is null; sum j of row i into sums[j*apart + i] unless sums is null. */
EXPORT void flexure_ctu_rows_backward(
    const float *x, const float *g, float *y, int64_t rows, int64_t columns, const float *k,
    int64_t width, int64_t step, double *sums, int64_t apart
) {
    for (int64_t row = 0; row < rows; row++) {
        dials d = read_dials(k, width, row * step);
        const float *xs = x + row * columns, *gs = g + row * columns;
        /* each call is compiled for itself, without the branches inside its loop */
        if (y && sums)
            row_backward(xs, gs, y + row * columns, columns, d, sums + row, apart, 1, 1);
        else if (y)
            row_backward(xs, gs, y + row * columns, columns, d, NULL, 0, 1, 0);
        else if (sums)
            row_backward(xs, gs, NULL, columns, d, sums + row, apart, 0, 1);
    }
}

/* Likewise for `n` elements with a period; sum j of place i is added to sums[j*width + i]. */
EXPORT void flexure_ctu_columns_backward(
    const float *x, const float *g, float *y, int64_t n, const float *k, int64_t width,
    double *sums
) {
    for (int64_t first = 0; first < width; first += TILE) {
        if (y && sums)
            tile_backward(x, g, y, n, width, first, k, sums, 1, 1);
        else if (y)
            tile_backward(x, g, y, n, width, first, k, NULL, 1, 0);
        else if (sums)
            tile_backward(x, g, NULL, n, width, first, k, sums, 0, 1);
    }
}
