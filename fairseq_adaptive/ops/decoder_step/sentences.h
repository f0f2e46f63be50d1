/* Self-attention within a sentence: some queries at a time over all of its keys. */
#include "small.h"

/* rows of x by some vectors of the columns of w, without a bias */
INLINE void piece(
    const int rows, const int vectors, const float *x, int64_t ldx, int64_t in, const float *w, int64_t ldw, float *y, int64_t ldy) {
  V a[TILE][4] = {0};
  for (int64_t i = 0; i < in; i++, w += ldw) {
    V c[4];
    UNROLL for (int v = 0; v < vectors; v++) c[v] = load(w + v * LANES);
    UNROLL for (int r = 0; r < rows; r++) {
      V b = all(x[r * ldx + i]);
      UNROLL for (int v = 0; v < vectors; v++) a[r][v] += b * c[v];
    }
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) store(y + r * ldy + v * LANES, a[r][v]);
}

#define PIECES(v) \
  switch (rows) { \
    case 6: piece(6, v, x, ldx, in, w, ldw, y, ldy); break; \
    case 5: piece(5, v, x, ldx, in, w, ldw, y, ldy); break; \
    case 4: piece(4, v, x, ldx, in, w, ldw, y, ldy); break; \
    case 3: piece(3, v, x, ldx, in, w, ldw, y, ldy); break; \
    case 2: piece(2, v, x, ldx, in, w, ldw, y, ldy); break; \
    default: piece(1, v, x, ldx, in, w, ldw, y, ldy); \
  }

/* the same for all of `out` columns, a multiple of LANES */
static void by_columns(
    int rows, int64_t out, const float *x, int64_t ldx, int64_t in, const float *w, int64_t ldw, float *y, int64_t ldy) {
  for (int64_t left = out, n; left; left -= n, w += n, y += n) {
    n = left < W ? left : W;
    switch (n / LANES) {
#if defined(__AVX512F__) || defined(__aarch64__)
      case 4: PIECES(4) break;
      case 3: PIECES(3) break;
#endif
      case 2: PIECES(2) break;
      default: PIECES(1)
    }
  }
}

static int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }
/* how many numbers attend_within needs for so many keys */
static int64_t attention_room(int64_t head, int64_t keys) { return (head + TILE) * whole(keys); }

/* n rows of queries, keys and values, 3 x H x D each, to n x (H D) */
static void attend_within(const float *qkv, int64_t n, int64_t heads, int64_t head, float scale, float *room, float *out) {
  const int64_t inner = heads * head, ld = 3 * inner, wide = whole(n);
  float *keys = room, *weights = room + head * wide; /* D x keys and TILE x keys */
  for (int64_t h = 0; h < heads; h++, qkv += head, out += head) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < head; d++) keys[d * wide + i] = qkv[i * ld + inner + d] * scale;
    for (int64_t d = 0; d < head; d++)
      for (int64_t i = n; i < wide; i++) keys[d * wide + i] = 0;
    for (int64_t r = 0, rows; r < n; r += rows) {
      float by[TILE];
      rows = take(n - r);
      by_columns(rows, wide, qkv + r * ld, ld, head, keys, wide, weights, wide);
      for (int64_t i = 0; i < rows; i++) {
        float *w = weights + i * wide;
        for (int64_t j = n; j < wide; j++) w[j] = -INFINITY;
        V top = load(w), total = {0};
        for (int64_t j = LANES; j < wide; j += LANES) top = larger(top, load(w + j));
        const float most = largest(top);
        I wrong = {0};
        for (int64_t j = 0; j < wide; j += LANES) {
          V x = load(w + j) - most;
          wrong |= (I)(x != x);
          x = falling(x);
          store(w + j, x);
          if (j + LANES <= n) total += x;
        }
        if (n < wide) {
          for (int64_t j = n; j < wide; j++) w[j] = 0;
          total += load(w + wide - LANES);
        }
        by[i] = 1 / sum(total + pick(wrong, all(NAN), (V){0}));
      }
      by_columns(rows, head, weights, wide, n, qkv + 2 * inner, ld, out + r * inner, inner);
      for (int64_t i = 0; i < rows; i++)
        for (float *y = out + (r + i) * inner, *end = y + head; y < end; y += LANES) store(y, load(y) * by[i]);
    }
  }
}
