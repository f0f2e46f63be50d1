/* Products of rows of uint8 with matrices of int8, as ops/int8_linear/naive.py defines them. */
#include "../decoder_step/layers.h"
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
INLINE I dot(I sums, I q, I v) { return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)q, (__m512i)v); }
enum { HAS_SMALL = 1 };
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
#include <immintrin.h>
INLINE I dot(I sums, I q, I v) { return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)q, (__m256i)v); }
enum { HAS_SMALL = 1 };
#else
INLINE I dot(I sums, I q, I v) { return sums + q + v; } /* never asked for */
enum { HAS_SMALL = 0 };
#endif
int32_t has_small(void) { return HAS_SMALL; }

typedef struct {
  const int8_t *panels;             /* out / W panels of in / 4 x W x 4 */
  const float *scale, *sums, *bias; /* of each column; sums: of its integers, scaled. Out rounded up to W */
  int32_t in, out;                  /* multiples of LANES */
} Small;

typedef struct {
  uint8_t *q;         /* rows x in */
  float *step, *shift; /* of each row; shift: the least number by the step */
} Rounded;

typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* Rows as integers. What is not finite makes all that comes of its row NaN. */
static void round_rows(const float *x, int64_t rows, int64_t in, Rounded *to) {
  uint8_t *q = to->q;
  for (int64_t r = 0; r < rows; r++, x += in, q += in) {
    V low = load(x), high = low, wrong = {0};
    for (int64_t c = 0; c < in; c += LANES) {
      V v = load(x + c);
      low = pick((I)(v < low), v, low), high = larger(v, high);
      wrong += v - v;
    }
    const float least = -largest(-low);
    float range = largest(high) - least;
    if (sum(wrong) != 0 || !(range <= 3.4028235e38f)) range = NAN;
    const float step = (range < 1e-20f ? 1e-20f : range) / 255, by = 1 / step;
    to->step[r] = step, to->shift[r] = least / step;
    for (int64_t c = 0; c < in; c += LANES) {
      V v = (load(x + c) - least) * by;
      __asm__("" : "+x"(v)); /* multiplied, then added: both at once round otherwise */
      *(Bytes *)(q + c) = __builtin_convertvector(__builtin_convertvector(v + .5f, I), Bytes);
    }
  }
}

INLINE void small_tile(const int rows, const uint8_t *q, int64_t in, const int8_t *panel, int32_t *out) {
  I a[TILE][VECTORS] = {0};
  for (int64_t i = 0; i < in; i += 4, panel += 4 * W) {
    I c[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) c[v] = *(const I *)(panel + 4 * v * LANES);
    UNROLL for (int r = 0; r < rows; r++) {
      int32_t four;
      memcpy(&four, q + r * in + i, 4);
      const I b = four - (I){0};
      UNROLL for (int v = 0; v < VECTORS; v++) a[r][v] = dot(a[r][v], b, c[v]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) *(I *)(out + r * W + v * LANES) = a[r][v];
}

static void small_some(int rows, const uint8_t *q, int64_t in, const int8_t *panel, int32_t *out) {
  switch (rows) {
    case 6: small_tile(6, q, in, panel, out); break;
    case 5: small_tile(5, q, in, panel, out); break;
    case 4: small_tile(4, q, in, panel, out); break;
    case 3: small_tile(3, q, in, panel, out); break;
    case 2: small_tile(2, q, in, panel, out); break;
    default: small_tile(1, q, in, panel, out);
  }
}

/* as product() of products.h */
static void small_product(const Small *m, const Rounded *x, int64_t rows, float *y, int64_t ld, Then then, const float *omega) {
  int32_t out[TILE * W];
  for (int64_t p = 0; p < m->out; p += W) {
    const int64_t width = m->out - p < W ? m->out - p : W;
    for (int64_t r = 0, n; r < rows; r += n) {
      n = take(rows - r);
      small_some(n, x->q + r * m->in, m->in, m->panels + p * m->in, out);
      for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < width; c += LANES) {
          V a = __builtin_convertvector(*(const I *)(out + i * W + c), V) * load(m->scale + p + c);
          a = (a + load(m->sums + p + c) * x->shift[r + i]) * x->step[r + i] + load(m->bias + p + c);
          put(y + (r + i) * ld + p + c, a, then, omega ? omega + p + c : NULL);
        }
    }
  }
}
