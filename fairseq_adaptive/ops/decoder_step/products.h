/* Vectors as wide as the processor's, and products with a matrix that is laid out in panels of W columns. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { BYTES = 64, VECTORS = 4 }; /* 32 registers: 6 rows by 4 vectors of sums */
#elif defined(__AVX__)
enum { BYTES = 32, VECTORS = 2 }; /* 16 registers */
#elif defined(__aarch64__)
enum { BYTES = 16, VECTORS = 4 };
#else
enum { BYTES = 16, VECTORS = 2 };
#endif
enum { LANES = BYTES / 4, W = LANES * VECTORS, GROUP = 64, PANELS = GROUP / W, TILE = 6, IN_CACHE = 1 << 16 };
typedef float V __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(BYTES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

int32_t lanes(void) { return LANES; }
int32_t panel_width(void) { return W; }
int32_t group_width(void) { return GROUP; }

/* ---- vectors */

INLINE V load(const float *p) { return *(const V *)p; }
INLINE void store(float *p, V x) { *(V *)p = x; }
INLINE V all(float x) { return x - (V){0}; }
INLINE V pick(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }
INLINE V larger(V a, V b) { return pick((I)(a > b), a, b); }
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));
typedef union {
  V all;
  V8 eights[BYTES / 32 + (BYTES < 32)];
  V4 fours[BYTES / 16];
} Halves;
/* halves of a vector, of the half, and so on, by an operation */
#define FOLD(a, OF) \
  Halves h = {.all = a}; \
  if (BYTES == 64) h.eights[0] = OF(h.eights[0], h.eights[BYTES / 32 - 1]); \
  if (BYTES >= 32) h.fours[0] = OF(h.fours[0], h.fours[BYTES >= 32]); \
  const V4 f = h.fours[0];
#define PLUS(a, b) ((a) + (b))
#define MORE(a, b) ((a) > (b) ? (a) : (b))
#define MORE_VECTOR(a, b) (__typeof__(a))((((a) > (b)) & (__typeof__((a) > (b)))(a)) | (~((a) > (b)) & (__typeof__((a) > (b)))(b)))
INLINE float sum(V a) {
  FOLD(a, PLUS)
  return (f[0] + f[2]) + (f[1] + f[3]);
}
INLINE float largest(V a) {
  FOLD(a, MORE_VECTOR)
  const float x = MORE(f[0], f[2]), y = MORE(f[1], f[3]);
  return MORE(x, y);
}
/* exp by a polynomial of degree 6 after taking out a power of two, within 2 units of the last place, from -87 to 88 */
INLINE V exponential_within(V x) {
  V n = x * 1.44269504f + 12582912.f, f = n - 12582912.f;
  V r = x - f * 0.693359375f - f * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  return (V)((I)p + ((I)n << 23));
}
/* the same of what is not above 0; of NaN it is that of -87 */
INLINE V falling(V x) { return exponential_within(pick((I)(x > -87.f), x, all(-87.f))); }
/* the same of anything; NaN stays NaN */
INLINE V exponential(V given) {
  V x = pick((I)(given > 88.f), all(88.f), given);
  return pick((I)(given == given), exponential_within(pick((I)(x < -87.f), all(-87.f), x)), given);
}
/* x Phi(x), with the error function of Abramowitz and Stegun 7.1.26, within 2e-7 */
INLINE V gelu(V x) {
  V z = pick((I)(x < 0.f), -x, x) * 0.70710678f, t = 1.f / (z * 0.3275911f + 1.f);
  V p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  V tail = p * t * falling(-z * z) * 0.5f; /* 1 - Phi(|x|) */
  return x * pick((I)(x < 0.f), tail, 1.f - tail);
}

/* ---- products */

typedef struct {
  const float *panels, *bias; /* out / W panels of in x W, and out rounded up to W */
  const int8_t *small;        /* in their place, or NULL: out / W panels of in / DEPTH x W x DEPTH integers */
  const float *scale, *sums;  /* with these, of each output: of its integers, and what they sum up to, scaled */
  int32_t in, out;            /* of what is read and written, multiples of LANES */
} Map;

int64_t packed_size(int64_t out, int64_t in) { return (out + W - 1) / W * W * in; }

/* O x I to panels */
void pack(const float *weight, int64_t out, int64_t in, float *panels) {
  for (int64_t first = 0; first < out; first += W, panels += in * W)
    for (int64_t o = 0; o < W; o++)
      for (int64_t i = 0; i < in; i++) panels[i * W + o] = first + o < out ? weight[(first + o) * in + i] : 0.f;
}

INLINE void tile(const int rows, const float *x, int64_t in, const float *w, const float *bias, float *out) {
  V a[TILE][VECTORS];
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) a[r][v] = load(bias + v * LANES);
  for (int64_t i = 0; i < in; i++, w += W) {
    V c[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) c[v] = load(w + v * LANES);
    UNROLL for (int r = 0; r < rows; r++) {
      V y = all(x[r * in + i]);
      UNROLL for (int v = 0; v < VECTORS; v++) a[r][v] += y * c[v];
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) store(out + r * W + v * LANES, a[r][v]);
}

/* some rows by one panel, to rows of W */
static void some(int rows, const float *x, int64_t in, const float *w, const float *bias, float *out) {
  switch (rows) {
    case 6: tile(6, x, in, w, bias, out); break;
    case 5: tile(5, x, in, w, bias, out); break;
    case 4: tile(4, x, in, w, bias, out); break;
    case 3: tile(3, x, in, w, bias, out); break;
    case 2: tile(2, x, in, w, bias, out); break;
    default: tile(1, x, in, w, bias, out);
  }
}
INLINE int64_t take(int64_t left) { return left == 7 || left == 8 ? 4 : left < TILE ? left : TILE; }

typedef enum { STORE, RELU, GELU, ADD } Then;

/* a to y, or what comes of it; ADD: a + omega y, where NULL is 1 */
INLINE void put(float *y, V a, Then then, const float *omega) {
  if (then == RELU) a = pick((I)(a < 0.f), all(0.f), a);
  if (then == GELU) a = gelu(a);
  if (then == ADD && omega) a += load(omega) * load(y);
  else if (then == ADD) a += load(y);
  store(y, a);
}

/* `product` of small.h, in float32 */
static void real_product(const Map *map, const float *x, int64_t rows, float *y, int64_t ld, Then then, const float *omega) {
  const int64_t in = map->in, block = (IN_CACHE / in / TILE + 1) * TILE;
  float out[TILE * W];
  for (int64_t from = 0; from < rows; from += block) {
    const int64_t to = rows < from + block ? rows : from + block;
    for (int64_t p = 0; p < map->out; p += W) {
      const int64_t width = map->out - p < W ? map->out - p : W;
      for (int64_t r = from, n; r < to; r += n) {
        n = take(to - r);
        some(n, x + r * in, in, map->panels + p * in, map->bias + p, out);
        for (int64_t i = 0; i < n; i++)
          for (int64_t c = 0; c < width; c += LANES)
            put(y + (r + i) * ld + p + c, load(out + i * W + c), then, omega ? omega + p + c : NULL);
      }
    }
  }
}
