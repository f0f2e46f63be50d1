/* The layers of an encoder or a decoder, for rows of states that lie one after the other. */
#include "sentences.h"

typedef struct {
  const float *gain, *bias; /* padded; NULL: no norm */
  float eps;
} Norm;

typedef struct {
  Norm norms[3]; /* of self-attention, cross-attention and feed-forward */
  Map qkv, merge, query, source, merge_source, up, down;
} Layer;

typedef struct {
  int32_t real, width, heads, head; /* C, padded C, H, padded D */
  int32_t hidden, depths, sublayers, pre_norm, gelu, cross;
  float scale; /* of scores */
  const int32_t *schedule;
  const Layer *layers;
  const float *omega; /* N x sublayers x C, or NULL */
  Norm last;
} Stack;

static void normalize(const Norm *norm, const float *x, int64_t rows, int64_t real, int64_t width, float *y) {
  const int64_t whole = real / LANES * LANES;
  for (int64_t r = 0; r < rows; r++, x += width, y += width) {
    V s = {0}, q = {0};
    for (int64_t c = 0; c < whole; c += LANES) s += load(x + c);
    float mean = sum(s);
    for (int64_t c = whole; c < real; c++) mean += x[c];
    mean /= real;
    for (int64_t c = 0; c < whole; c += LANES) {
      V d = load(x + c) - mean;
      q += d * d;
    }
    float variance = sum(q);
    for (int64_t c = whole; c < real; c++) variance += (x[c] - mean) * (x[c] - mean);
    const float k = 1 / sqrtf(variance / real + norm->eps);
    for (int64_t c = 0; c < width; c += LANES)
      store(y + c, (load(x + c) - mean) * k * load(norm->gain + c) + load(norm->bias + c));
  }
}

/* one query, H x D, over n keys, each with its value behind it; `weights` has room for heads x n rounded up to LANES */
static void attend(const Stack *s, const float *q, const float **kv, int64_t n, float *weights, float *out) {
  const int64_t D = s->head, inner = s->heads * D, room = (n + LANES - 1) / LANES * LANES;
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < s->heads; h++) {
      V a = {0};
      for (int64_t d = h * D; d < h * D + D; d += LANES) a += load(q + d) * load(kv[i] + d);
      weights[h * room + i] = sum(a) * s->scale;
    }
  for (int64_t h = 0; h < s->heads; h++) {
    float *w = weights + h * room;
    for (int64_t i = n; i < room; i++) w[i] = -INFINITY;
    V top = load(w), total = {0};
    for (int64_t i = LANES; i < room; i += LANES) top = larger(top, load(w + i));
    const float most = largest(top);
    for (int64_t i = 0; i < room; i += LANES) {
      V e = exponential(load(w + i) - most);
      store(w + i, e);
    }
    for (int64_t i = n; i < room; i++) w[i] = 0;
    for (int64_t i = 0; i < room; i += LANES) total += load(w + i);
    const float k = 1 / sum(total);
    for (int64_t d = h * D; d < h * D + D; d += LANES) {
      V a = {0};
      for (int64_t i = 0; i < n; i++) a += load(kv[i] + inner + d) * w[i];
      store(out + d, a * k);
    }
  }
}

typedef struct {
  float *y, *z, *weights; /* rows x max(C, H D), rows x max(3 H D, F), H x keys */
  const float **kv;
} Room;

static void room_close(Room *m) { free(m->y), free(m->z), free(m->weights), free(m->kv); }

static int room_open(Room *m, const Stack *s, int64_t rows, int64_t keys) {
  const int64_t inner = (int64_t)s->heads * s->head, most = inner * 3 > s->hidden ? inner * 3 : s->hidden;
  m->y = malloc(sizeof(float) * rows * (inner > s->width ? inner : s->width));
  m->z = malloc(sizeof(float) * rows * most);
  m->weights = malloc(sizeof(float) * s->heads * (keys + LANES));
  m->kv = malloc(sizeof(float *) * (keys + 1));
  if (m->y && m->z && m->weights && m->kv) return 0;
  room_close(m);
  return 1;
}

static const float *omega(const Stack *s, int depth, int sublayer) {
  return s->omega ? s->omega + ((int64_t)depth * s->sublayers + sublayer) * s->width : NULL;
}

/* what a sublayer reads of x, and what becomes of x behind it */
static const float *before(const Stack *s, const Norm *norm, const float *x, int64_t rows, float *y) {
  if (!s->pre_norm) return x;
  normalize(norm, x, rows, s->real, s->width, y);
  return y;
}
static void behind(const Stack *s, const Norm *norm, float *x, int64_t rows) {
  if (!s->pre_norm) normalize(norm, x, rows, s->real, s->width, x);
}

static void feed_forward(const Stack *s, const Layer *l, float *x, int64_t rows, int depth, Room *m) {
  product(&l->up, before(s, &l->norms[2], x, rows, m->y), rows, m->z, s->hidden, s->gelu ? GELU : RELU, NULL);
  product(&l->down, m->z, rows, x, s->width, ADD, omega(s, depth, s->sublayers - 1));
  behind(s, &l->norms[2], x, rows);
}

/* an encoder over the tokens of sentences, which lie one after the other; x, P x C, is changed in place. 0: done */
int32_t encode(const Stack *s, float *x, const int64_t *lengths, int64_t sentences) {
  const int64_t inner = (int64_t)s->heads * s->head;
  int64_t rows = 0, longest = 0;
  for (int64_t b = 0; b < sentences; b++) rows += lengths[b], longest = longest > lengths[b] ? longest : lengths[b];
  Room m;
  if (room_open(&m, s, rows, 0)) return 1;
  float *room = malloc(sizeof(float) * attention_room(s->head, longest));
  if (!room) return room_close(&m), 1;
  for (int depth = 0; depth < s->depths; depth++) {
    const Layer *l = s->layers + s->schedule[depth];
    product(&l->qkv, before(s, &l->norms[0], x, rows, m.y), rows, m.z, 3 * inner, STORE, NULL);
    for (int64_t b = 0, start = 0; b < sentences; start += lengths[b++])
      attend_within(m.z + start * 3 * inner, lengths[b], s->heads, s->head, s->scale, room, m.y + start * inner);
    product(&l->merge, m.y, rows, x, s->width, ADD, omega(s, depth, 0));
    behind(s, &l->norms[0], x, rows);
    feed_forward(s, l, x, rows, depth, &m);
  }
  if (s->last.gain) normalize(&s->last, x, rows, s->real, s->width, x);
  room_close(&m), free(room);
  return 0;
}
