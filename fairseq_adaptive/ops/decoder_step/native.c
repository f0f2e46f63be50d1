/* A step of beam search over a decoder, and an encoder, on one core; naive.py is the definition.

   Every row of states goes its own way: what is computed for it does not depend on which rows stand beside it, bit by bit.
   So rows may be split among threads, and a sentence has the same hypotheses in any batch. Matrices are laid out in
   panels of W columns; widths are multiples of the lanes of a vector, and what pads them is zero. */
#include "words.h"

/* a depth for n rows of states, x, whose numbers are `row` */
static void decode_layer(const Search *s, int depth, const int64_t *row, int64_t n, float *x, Room *m) {
  const Stack *k = &s->decoder->stack;
  const int number = k->schedule[depth];
  const Layer *l = k->layers + number;
  const int64_t inner = (int64_t)k->heads * k->head;
  product(&l->qkv, before(k, &l->norms[0], x, n, m->y), n, m->z, 3 * inner, STORE, NULL);
  for (int64_t i = 0; i < n; i++) {
    memcpy(own_kv(s, depth, row[i]), m->z + i * 3 * inner + inner, sizeof(float) * 2 * inner);
    const int64_t keys = keys_of(s, row[i]);
    for (int64_t t = 0; t < keys; t++) m->kv[t] = kv_at(s, depth, row[i], t);
    attend(k, m->z + i * 3 * inner, m->kv, keys, m->weights, m->y + i * inner);
  }
  product(&l->merge, m->y, n, x, k->width, ADD, omega(k, depth, 0));
  behind(k, &l->norms[0], x, n);
  if (k->cross) {
    product(&l->query, before(k, &l->norms[1], x, n, m->y), n, m->z, inner, STORE, NULL);
    for (int64_t i = 0; i < n; i++) {
      const int64_t b = s->sentence[row[i]], length = s->starts[b + 1] - s->starts[b];
      for (int64_t t = 0; t < length; t++) m->kv[t] = s->source[number] + (s->starts[b] + t) * 2 * inner;
      attend(k, m->z + i * inner, m->kv, length, m->weights, m->y + i * inner);
    }
    product(&l->merge_source, m->y, n, x, k->width, ADD, omega(k, depth, 1));
    behind(k, &l->norms[1], x, n);
  }
  feed_forward(k, l, x, n, depth, m);
}

static void embed(const Decoder *d, int64_t token, const float *position, float *x) {
  const Stack *k = &d->stack;
  const float *e = d->embedding + token * k->real;
  for (int64_t c = 0; c < k->real; c++) x[c] = d->embed_scale * e[c] + (position ? position[c] : 0.f);
  for (int64_t c = k->real; c < k->width; c++) x[c] = 0;
  if (d->embed_norm.gain) normalize(&d->embed_norm, x, 1, k->real, k->width, x);
}

INLINE float dot(const float *a, const float *b, int64_t n) {
  V s = {0};
  for (int64_t i = 0; i < n; i += LANES) s += load(a + i) * load(b + i);
  return sum(s);
}

/* Whether a row is done behind a depth, by the rules of modules/policies: from states x to y, which is changed; `mass` is
   what the rule carries, 0 at the start, or the margin, and `result` UT's accumulator */
static int halts(const Decoder *d, const float *x, float *y, int last, float *mass, float *result) {
  const int64_t C = d->stack.width;
  if (d->rule == MARGIN) return *mass >= d->threshold;
  if (d->rule == SATURATION) {
    const float xx = sqrtf(dot(x, x, C)), yy = sqrtf(dot(y, y, C));
    return dot(x, y, C) / ((xx > 1e-8f ? xx : 1e-8f) * (yy > 1e-8f ? yy : 1e-8f)) >= d->threshold;
  }
  const float p = 1 / (1 + expf(-dot(d->rule == UNIVERSAL ? x : y, d->unit, C) - d->unit_bias));
  if (d->rule == PONDER) {
    const float survival = last ? 0 : (1 - *mass) * (1 - p);
    *mass = 1 - survival;
    return *mass >= d->threshold;
  }
  const int stops = *mass + p > d->threshold;
  const float share = stops ? 1 - *mass : p;
  const float *old = d->rule == ACT ? x : result;
  float *mixed = d->rule == ACT ? y : result;
  for (int64_t c = 0; c < C; c += LANES) store(mixed + c, load(y + c) * share + load(old + c) * (1 - share));
  *mass += share;
  return stops;
}

/* the keys and values of the depths that rows first..last have not reached, made of their last states once a layer */
static void fill(const Search *s, const int64_t *reached, const float *states, int64_t first, int64_t last, Room *m, float *x) {
  const Stack *k = &s->decoder->stack;
  const int64_t inner = (int64_t)k->heads * k->head, skip = inner / W * W, ld = 3 * inner - skip;
  for (int number = 0; number < s->decoder->layers; number++) {
    const Layer *l = k->layers + number;
    const Map kv = behind_panels(&l->qkv, skip);
    int deepest = 0;
    for (int depth = 0; depth < k->depths; depth++) deepest = k->schedule[depth] == number ? depth : deepest;
    int64_t n = 0;
    for (int64_t r = 0; r < last - first; r++)
      if (reached[r] < deepest) memcpy(x + k->width * n++, states + r * k->width, sizeof(float) * k->width);
    product(&kv, before(k, &l->norms[0], x, n, m->y), n, m->z, ld, STORE, NULL);
    n = 0;
    for (int64_t r = 0; r < last - first; r++)
      if (reached[r] < deepest) {
        const float *made = m->z + ld * n++ + inner - skip;
        for (int depth = reached[r] + 1; depth <= deepest; depth++)
          if (k->schedule[depth] == number) memcpy(own_kv(s, depth, first + r), made, sizeof(float) * 2 * inner);
      }
  }
}

/* all depths for rows first..last, to s->out */
static int decode(const Search *s, const Step *q, int64_t first, int64_t last) {
  const Decoder *d = s->decoder;
  const Stack *k = &d->stack;
  const int64_t C = k->width, all_rows = last - first, copies = d->rule ? 4 : 1;
  Room m;
  if (room_open(&m, k, all_rows, s->steps > s->longest ? s->steps : s->longest)) return 1;
  float *x = malloc(sizeof(float) * all_rows * (copies * C + 1));
  int64_t *row = malloc(sizeof(int64_t) * all_rows * 2), *reached = row + all_rows;
  if (!x || !row) return room_close(&m), free(x), free(row), 1;
  float *old = x + all_rows * C, *result = old + all_rows * C, *states = result + all_rows * C;
  float *mass = x + all_rows * copies * C;
  int64_t n = all_rows;
  for (int64_t r = 0; r < n; r++) {
    row[r] = first + r, reached[r] = k->depths, mass[r] = 0;
    embed(d, q->tokens[first + r], q->position, x + r * C);
  }
  if (d->rule) memset(result, 0, sizeof(float) * all_rows * C);
  for (int depth = 0; depth < k->depths && n; depth++) {
    if (d->rule) memcpy(old, x, sizeof(float) * n * C);
    decode_layer(s, depth, row, n, x, &m);
    if (!d->rule) continue;
    if (d->rule == MARGIN && depth < k->depths - 1) {
      const float *read = x;
      if (k->last.gain) normalize(&k->last, x, n, k->real, C, m.y), read = m.y;
      if (scan(d, read, n, 1, m.z, NULL, mass)) return room_close(&m), free(x), free(row), 1;
    }
    int64_t left = 0;
    for (int64_t i = 0; i < n; i++) {
      float *y = x + i * C, *sums = result + i * C;
      const int done = halts(d, old + i * C, y, depth == k->depths - 1, mass + i, sums) || depth == k->depths - 1;
      if (done) {
        const int64_t r = row[i] - first;
        reached[r] = depth;
        memcpy(states + r * C, y, sizeof(float) * C);
        memcpy(s->out + row[i] * C, d->rule == UNIVERSAL && mass[i] > 0 ? sums : y, sizeof(float) * C);
      } else {
        if (left < i) {
          memcpy(x + left * C, y, sizeof(float) * C);
          memcpy(result + left * C, sums, sizeof(float) * C);
          row[left] = row[i], mass[left] = mass[i];
        }
        left++;
      }
    }
    n = left;
  }
  if (d->rule) fill(s, reached, states, first, last, &m, x);
  else memcpy(s->out + first * C, x, sizeof(float) * all_rows * C);
  if (k->last.gain) normalize(&k->last, s->out + first * C, all_rows, k->real, C, s->out + first * C);
  room_close(&m), free(x), free(row);
  return 0;
}

/* a step for sentences first..last of those that run. 0: done */
int32_t search_step(Search *s, const Step *q, int64_t first, int64_t last) {
  if (decode(s, q, first * q->rows, last * q->rows)) return 1;
  if (score(s, q->heat, first * q->rows, last * q->rows)) return 1;
  for (int64_t r = first * q->rows; r < last * q->rows; r++) revise(s, q, r);
  Candidate *heaps = malloc(sizeof(Candidate) * q->count * 2);
  if (!heaps) return 1;
  for (int64_t b = first; b < last; b++) choose(s, q, b, heaps, heaps + q->count);
  free(heaps);
  return 0;
}

#include "speculative.h"

/* what native.py and speculative.py say again */
int32_t size_of_Map(void) { return sizeof(Map); }
int32_t size_of_Layer(void) { return sizeof(Layer); }
int32_t size_of_Decoder(void) { return sizeof(Decoder); }
int32_t size_of_Step(void) { return sizeof(Step); }
int32_t size_of_Round(void) { return sizeof(Round); }
