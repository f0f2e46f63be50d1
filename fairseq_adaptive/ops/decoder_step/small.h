/* Products with a matrix of float32 or of int8. The latter are as ops/int8_linear/naive.py defines them, on rows that are
   rounded to integers of 8 bits, each by itself; their sums are exact. */
#include "products.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* So many integers of a row meet so many of a column at once: sums of their products, which fit into 32 bits, are added. */
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
enum { DEPTH = 4 };
INLINE I meet(I sums, I q, I v) { return (I)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)q, (__m512i)v); }
#elif !defined(__AVX512F__) && defined(__AVXVNNI__)
enum { DEPTH = 4 };
INLINE I meet(I sums, I q, I v) { return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)q, (__m256i)v); }
#else
#define WIDENED /* integers of 8 bits are multiplied as ones of 16 */
enum { DEPTH = 2 };
#if defined(__AVX512BW__)
INLINE I meet(I sums, I q, I v) { return sums + (I)_mm512_madd_epi16((__m512i)q, (__m512i)v); }
#elif !defined(__AVX512F__) && defined(__AVX2__)
INLINE I meet(I sums, I q, I v) { return sums + (I)_mm256_madd_epi16((__m256i)q, (__m256i)v); }
#elif !defined(__AVX__) && defined(__SSE2__)
INLINE I meet(I sums, I q, I v) { return sums + (I)_mm_madd_epi16((__m128i)q, (__m128i)v); }
#else
INLINE I low(I x) { return (x << 16) >> 16; }
INLINE I meet(I sums, I q, I v) { return sums + low(q) * low(v) + (q >> 16) * (v >> 16); }
#endif
#endif
int32_t small_depth(void) { return DEPTH; }

#ifdef WIDENED
typedef int16_t Q;
typedef int16_t Words __attribute__((vector_size(BYTES), may_alias));
typedef int8_t Half __attribute__((vector_size(BYTES / 2), aligned(1), may_alias));
INLINE I column(const int8_t *v) { return (I)__builtin_convertvector(*(const Half *)v, Words); }
#else
typedef uint8_t Q;
INLINE I column(const int8_t *v) { return *(const I *)v; }
#endif
typedef Q Qs __attribute__((vector_size(LANES * sizeof(Q)), aligned(1), may_alias));

enum { SMALL_ROWS = 16 * TILE, SMALL_ROOM = 1 << 16 }; /* that are rounded at a time, and integers of these */
int32_t small_widest(void) { return SMALL_ROOM / TILE; }

typedef struct {
  Q q[SMALL_ROOM];                           /* rows x in */
  float step[SMALL_ROWS], shift[SMALL_ROWS]; /* of each row; shift: the least number by the step */
} Rounded;

/* Rows as integers. What is not finite makes all that comes of its row NaN. */
static void round_rows(const float *x, int64_t rows, int64_t in, Rounded *to) {
  Q *q = to->q;
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
      *(Qs *)(q + c) = __builtin_convertvector(__builtin_convertvector(v + .5f, I), Qs);
    }
  }
}

INLINE void small_tile(const int rows, const Q *q, int64_t in, const int8_t *panel, int32_t *out) {
  I a[TILE][VECTORS] = {0};
  for (int64_t i = 0; i < in; i += DEPTH, panel += DEPTH * W) {
    I c[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v++) c[v] = column(panel + DEPTH * v * LANES);
    UNROLL for (int r = 0; r < rows; r++) {
      int32_t some;
      memcpy(&some, q + r * in + i, 4);
      const I b = some - (I){0};
      UNROLL for (int v = 0; v < VECTORS; v++) a[r][v] = meet(a[r][v], b, c[v]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < VECTORS; v++) *(I *)(out + r * W + v * LANES) = a[r][v];
}

static void small_some(int rows, const Q *q, int64_t in, const int8_t *panel, int32_t *out) {
  switch (rows) {
    case 6: small_tile(6, q, in, panel, out); break;
    case 5: small_tile(5, q, in, panel, out); break;
    case 4: small_tile(4, q, in, panel, out); break;
    case 3: small_tile(3, q, in, panel, out); break;
    case 2: small_tile(2, q, in, panel, out); break;
    default: small_tile(1, q, in, panel, out);
  }
}

/* some of the rows that are rounded by one panel, to rows of W; at one place, so that bits never differ */
static __attribute__((noinline)) void small_panel(const Map *map, const Rounded *x, int64_t from, int rows, int64_t p, float *y) {
  int32_t out[TILE * W];
  small_some(rows, x->q + from * map->in, map->in, map->small + p * map->in, out);
  for (int i = 0; i < rows; i++)
    for (int c = 0; c < W; c += LANES) {
      V a = __builtin_convertvector(*(const I *)(out + i * W + c), V) * load(map->scale + p + c);
      a = (a + load(map->sums + p + c) * x->shift[from + i]) * x->step[from + i] + load(map->bias + p + c);
      store(y + i * W + c, a);
    }
}

/* how many rows are rounded at a time */
static int64_t small_block(const Map *map) {
  const int64_t most = SMALL_ROOM / map->in / TILE * TILE;
  return most < SMALL_ROWS ? most : SMALL_ROWS;
}

static __attribute__((noinline)) void small_product(
    const Map *map, const float *x, int64_t rows, float *y, int64_t ld, Then then, const float *omega) {
  const int64_t in = map->in, block = small_block(map);
  Rounded rounded;
  float out[TILE * W];
  for (int64_t from = 0, count; from < rows; from += count, x += count * in, y += count * ld) {
    count = rows - from < block ? rows - from : block;
    round_rows(x, count, in, &rounded);
    for (int64_t p = 0; p < map->out; p += W) {
      const int64_t width = map->out - p < W ? map->out - p : W;
      for (int64_t r = 0, n; r < count; r += n) {
        n = take(count - r);
        small_panel(map, &rounded, r, n, p, out);
        for (int64_t i = 0; i < n; i++)
          for (int64_t c = 0; c < width; c += LANES)
            put(y + (r + i) * ld + p + c, load(out + i * W + c), then, omega ? omega + p + c : NULL);
      }
    }
  }
}

/* y = x W^T + b, or what comes of it; y has rows of `ld`. ADD: y = x W^T + b + omega y, where NULL is 1 */
INLINE void product(const Map *map, const float *x, int64_t rows, float *y, int64_t ld, Then then, const float *omega) {
  if (map->small) small_product(map, x, rows, y, ld, then, omega);
  else real_product(map, x, rows, y, ld, then, omega);
}
void linear(const Map *map, const float *x, int64_t rows, float *y) { product(map, x, rows, y, map->out, STORE, NULL); }

/* those outputs of a map that follow the first ones, which are whole panels */
INLINE Map behind_panels(const Map *map, int64_t first) {
  Map rest = *map;
  rest.bias += first, rest.out -= first;
  if (map->small) rest.small += first * map->in, rest.scale += first, rest.sums += first;
  else rest.panels += first * map->in;
  return rest;
}
