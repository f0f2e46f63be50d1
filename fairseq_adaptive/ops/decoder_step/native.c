/* A step of beam search over a decoder, and an encoder, on one core; naive.py is the definition.

   Every row of states goes its own way: what is computed for it does not depend on which rows stand beside it, bit by bit.
   So rows may be split among threads, and a sentence has the same hypotheses in any batch. Matrices are laid out in
   panels of W columns; widths are multiples of the lanes of a vector, and what pads them is zero. */
#include "layers.h"

typedef enum { NEVER, ACT, UNIVERSAL, PONDER, SATURATION, MARGIN } Rule;

typedef struct {
  Stack stack;
  const float *embedding; /* V x C, as it is */
  float embed_scale;
  Norm embed_norm;
  Map words; /* rounded up to GROUP; the bias of what pads them is far below all */
  const float *unit; /* C, of the halting rule */
  float unit_bias, threshold;
  int32_t rule, layers, vocabulary;
} Decoder;

typedef struct {
  const Decoder *decoder;
  int64_t sentences, longest, rows, steps;
  int64_t *starts;   /* sentences + 1, in the tokens of the source */
  float **source;    /* of a layer, P x 2 H D */
  float **kv;        /* of a step, N x rows of that step x 2 H D; it stays where it is */
  int64_t *kv_rows;  /* of a step */
  int64_t *past;     /* rows x steps: the row of each step from which a row descends */
  int64_t *sentence; /* of a row */
  int64_t *at;       /* of a row, its position; NULL in beam search, where all rows are at the newest step */
  float *out, *maxima, *total; /* of the newest step: rows x C, rows x groups, rows: log of the sum of all words */
} Search;

/* what a step is asked */
typedef struct {
  const int64_t *tokens;
  const float *scores, *position; /* of hypotheses so far; C or NULL, the same for all rows */
  int64_t rows;                   /* of a sentence */
  int64_t count;                  /* candidates of a sentence */
  int64_t only;                   /* the one word that may follow, or -1 */
  int64_t changes;                /* words whose log-probability is changed, in rising order */
  const int64_t *changed;
  const float *change;
  float heat; /* 1 / temperature */
  float *best; /* sentences x count each: scores, words and rows, best first */
  int64_t *words, *from;
} Step;

void search_close(Search *s) {
  if (!s) return;
  if (s->source)
    for (int l = 0; l < s->decoder->layers; l++) free(s->source[l]);
  for (int64_t t = 0; t < s->steps; t++) free(s->kv[t]);
  free(s->starts), free(s->source), free(s->kv), free(s->kv_rows), free(s->past), free(s->sentence), free(s->at);
  free(s->out), free(s->maxima), free(s->total), free(s);
}

/* a search over sources of some lengths, 0 without cross-attention; NULL: no memory */
Search *search_open(const Decoder *d, const int64_t *lengths, int64_t sentences) {
  Search *s = calloc(1, sizeof(Search));
  if (!s) return NULL;
  s->decoder = d, s->sentences = sentences;
  s->starts = calloc(sentences + 1, sizeof(int64_t));
  s->source = calloc(d->layers, sizeof(float *));
  if (!s->starts || !s->source) return search_close(s), NULL;
  for (int64_t b = 0; b < sentences; b++) {
    s->starts[b + 1] = s->starts[b] + lengths[b];
    s->longest = s->longest > lengths[b] ? s->longest : lengths[b];
  }
  const int64_t size = s->starts[sentences] * 2 * d->stack.heads * d->stack.head;
  for (int l = 0; d->stack.cross && l < d->layers; l++)
    if (!(s->source[l] = malloc(sizeof(float) * (size + 1)))) return search_close(s), NULL;
  return s;
}

/* keys and values of the source for some sentences, of states of all, P x C' */
void search_source(Search *s, const float *states, int64_t first, int64_t last) {
  const Stack *k = &s->decoder->stack;
  const int64_t start = s->starts[first], rows = s->starts[last] - start, ld = 2 * k->heads * k->head;
  for (int l = 0; l < s->decoder->layers; l++) {
    const Map *map = &k->layers[l].source;
    product(map, states + start * map->in, rows, s->source[l] + start * ld, ld, STORE, NULL);
  }
}

/* go on with other rows: a row continues row `order` of the step before; NULL: the first of each sentence. 0: done */
int32_t search_turn(Search *s, const int64_t *order, int64_t rows) {
  const Decoder *d = s->decoder;
  const int64_t t = s->steps, size = (int64_t)d->stack.depths * rows * 2 * d->stack.heads * d->stack.head;
  int64_t *past = malloc(sizeof(int64_t) * rows * (t + 1)), *sentence = malloc(sizeof(int64_t) * rows);
  float **kv = realloc(s->kv, sizeof(float *) * (t + 1));
  s->kv = kv ? kv : s->kv;
  int64_t *kv_rows = realloc(s->kv_rows, sizeof(int64_t) * (t + 1));
  s->kv_rows = kv_rows ? kv_rows : s->kv_rows;
  float *block = malloc(sizeof(float) * size), *out = malloc(sizeof(float) * rows * d->stack.width);
  float *maxima = malloc(sizeof(float) * rows * (d->words.out / GROUP)), *total = malloc(sizeof(float) * rows);
  if (!past || !sentence || !kv || !kv_rows || !block || !out || !maxima || !total) {
    free(past), free(sentence), free(block), free(out), free(maxima), free(total);
    return 1;
  }
  for (int64_t r = 0; r < rows; r++) {
    const int64_t from = order ? order[r] : r;
    if (t) memcpy(past + r * (t + 1), s->past + from * t, sizeof(int64_t) * t);
    past[r * (t + 1) + t] = r;
    sentence[r] = t ? s->sentence[from] : r;
  }
  free(s->past), free(s->sentence), free(s->out), free(s->maxima), free(s->total);
  s->past = past, s->sentence = sentence, s->out = out, s->maxima = maxima, s->total = total;
  s->kv[t] = block, s->kv_rows[t] = rows, s->rows = rows, s->steps = t + 1;
  return 0;
}

static int64_t keys_of(const Search *s, int64_t row) { return s->at ? s->at[row] + 1 : s->steps; }

/* what a row reads at a depth of the token at step t */
static float *kv_at(const Search *s, int depth, int64_t row, int64_t t) {
  const Stack *k = &s->decoder->stack;
  const int64_t from = s->at ? s->sentence[row] : s->past[row * s->steps + t];
  return s->kv[t] + (depth * s->kv_rows[t] + from) * 2 * k->heads * k->head;
}

static float *own_kv(const Search *s, int depth, int64_t row) { return kv_at(s, depth, row, keys_of(s, row) - 1); }

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
    const Map kv = {l->qkv.panels + skip * l->qkv.in, l->qkv.bias + skip, l->qkv.in, ld};
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

/* what the words say of some rows of states, without keeping a logit: the log of the sum over all of them, and, where there
   is room for them, the maxima of groups, rows x groups, and how far the best word is ahead of the second, in probability */
static int scan(const Decoder *d, const float *states, int64_t rows, float heat, float *total, float *maxima, float *margin) {
  const Map *map = &d->words;
  const int64_t groups = map->out / GROUP, block = TILE * 16;
  float out[PANELS][TILE * W];
  float *tops = malloc(sizeof(float) * block * (1 + 3 * LANES)), *sums = tops + block;
  if (!tops) return 1;
  float *best = sums + block * LANES, *second = best + block * LANES;
  for (int64_t from = 0; from < rows; from += block) {
    const int64_t to = rows < from + block ? rows : from + block;
    for (int64_t i = 0; i < block; i++) tops[i] = -1e30f;
    for (int64_t i = 0; i < block * LANES; i++) sums[i] = 0, best[i] = second[i] = -INFINITY;
    for (int64_t g = 0; g < groups; g++)
      for (int64_t r = from, n; r < to; r += n) {
        n = take(to - r);
        for (int p = 0; p < PANELS; p++) {
          const int64_t word = g * GROUP + p * W;
          some(n, states + r * map->in, map->in, map->panels + word * map->in, map->bias + word, out[p]);
        }
        for (int64_t i = 0; i < n; i++) {
          const int64_t at = r - from + i;
          V x[GROUP / LANES], most = all(-INFINITY), e = {0};
          UNROLL for (int c = 0; c < GROUP / LANES; c++) {
            x[c] = load(out[c / VECTORS] + i * W + c % VECTORS * LANES) * heat;
            most = larger(x[c], most);
          }
          const float top = largest(most);
          float *sum_of = sums + at * LANES;
          if (maxima) maxima[(r + i) * groups + g] = top;
          if (top > tops[at]) {
            store(sum_of, load(sum_of) * expf(tops[at] - top));
            tops[at] = top;
          }
          UNROLL for (int c = 0; c < GROUP / LANES; c++) e += exponential(x[c] - tops[at]);
          store(sum_of, load(sum_of) + e);
          if (margin) UNROLL for (int c = 0; c < GROUP / LANES; c++) {
            const V one = load(best + at * LANES), two = load(second + at * LANES), lower = pick((I)(one > x[c]), x[c], one);
            store(best + at * LANES, larger(one, x[c]));
            store(second + at * LANES, larger(two, lower));
          }
        }
      }
    for (int64_t r = from; r < to; r++) {
      const int64_t at = r - from;
      total[r] = tops[at] + logf(sum(load(sums + at * LANES)));
      if (!margin) continue;
      float one = -INFINITY, two = -INFINITY;
      for (int64_t i = 0; i < 2 * LANES; i++) { /* the two best of the best and second of each lane */
        const float x = i < LANES ? best[at * LANES + i] : second[at * LANES + i - LANES];
        two = x > one ? one : x > two ? x : two;
        one = x > one ? x : one;
      }
      margin[r] = expf(one - total[r]) - expf(two - total[r]);
    }
  }
  free(tops);
  return 0;
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

/* the logits of a group of words for a row, changed as the step asks: GROUP of them; the same bits as in `scan` */
static void group(const Search *s, const Step *q, int64_t row, int64_t g, float *logits) {
  const Map *map = &s->decoder->words;
  for (int p = 0; p < PANELS; p++) {
    const int64_t word = g * GROUP + p * W;
    some(1, s->out + row * map->in, map->in, map->panels + word * map->in, map->bias + word, logits + p * W);
  }
  for (int i = 0; i < GROUP; i++) logits[i] *= q->heat;
  for (int64_t i = 0; i < q->changes; i++)
    if (q->changed[i] / GROUP == g) logits[q->changed[i] % GROUP] += q->change[i];
}

/* the logits of some rows, but for what is kept of them */
static int score(const Search *s, float heat, int64_t first, int64_t last) {
  const Decoder *d = s->decoder;
  float *maxima = s->maxima + first * (d->words.out / GROUP);
  return scan(d, s->out + first * d->words.in, last - first, heat, s->total + first, maxima, NULL);
}

/* words of a row that are changed are looked at again */
static void revise(const Search *s, const Step *q, int64_t row) {
  const int64_t groups = s->decoder->words.out / GROUP;
  for (int64_t i = 0; i < q->changes; i++) {
    const int64_t g = q->changed[i] / GROUP;
    if (i && q->changed[i - 1] / GROUP == g) continue;
    float logits[GROUP], top = -INFINITY;
    group(s, q, row, g, logits);
    for (int c = 0; c < GROUP; c++) top = logits[c] > top ? logits[c] : top;
    s->maxima[row * groups + g] = top;
  }
}

typedef struct {
  float value;
  int64_t word, row;
} Candidate;

/* a heap whose worst is on top; of two that are equal the one that came first is the better */
static int worse(const Candidate *a, const Candidate *b) {
  if (a->value != b->value) return a->value < b->value;
  return a->row != b->row ? a->row > b->row : a->word > b->word;
}
static void sink(Candidate *heap, int64_t size, int64_t at) {
  for (int64_t child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && worse(heap + child + 1, heap + child)) child++;
    if (!worse(heap + child, heap + at)) return;
    const Candidate other = heap[at];
    heap[at] = heap[child], heap[child] = other;
  }
}
static void offer(Candidate *heap, int64_t *size, int64_t room, Candidate given) {
  if (*size < room) {
    int64_t at = (*size)++;
    heap[at] = given;
    for (int64_t up; at && worse(heap + at, heap + (up = (at - 1) / 2)); at = up) {
      const Candidate other = heap[at];
      heap[at] = heap[up], heap[up] = other;
    }
  } else if (worse(heap, &given)) {
    heap[0] = given;
    sink(heap, room, 0);
  }
}

/* the best continuations of the rows of sentence b, best first, to the step's results; rows with NaN have none */
static void choose(const Search *s, const Step *q, int64_t b, Candidate *heap, Candidate *tops) {
  const int64_t groups = s->decoder->words.out / GROUP, first = b * q->rows, last = first + q->rows;
  int64_t found = 0, many = 0;
  float logits[GROUP];
  for (int64_t r = first; r < last && q->only < 0; r++) {
    const float k = q->scores[r] - s->total[r];
    if (!(k > -INFINITY)) continue;
    for (int64_t g = 0; g < groups; g++) offer(tops, &many, q->count, (Candidate){s->maxima[r * groups + g] + k, g, r});
  }
  const float least = many < q->count ? -INFINITY : tops[0].value;
  for (int64_t r = first; r < last; r++) {
    const float k = q->scores[r] - s->total[r];
    if (!(k > -INFINITY)) continue;
    for (int64_t g = q->only < 0 ? 0 : q->only / GROUP; g < (q->only < 0 ? groups : q->only / GROUP + 1); g++) {
      if (q->only < 0 && !(s->maxima[r * groups + g] + k >= least)) continue;
      group(s, q, r, g, logits);
      for (int64_t i = 0; i < GROUP; i++) {
        const float value = logits[i] - s->total[r] + q->scores[r];
        const int64_t word = g * GROUP + i;
        if (value > -INFINITY && word < s->decoder->vocabulary && (q->only < 0 || word == q->only))
          offer(heap, &found, q->count, (Candidate){value, word, r});
      }
    }
  }
  for (int64_t i = q->count - 1; i >= 0; i--) {
    Candidate given = {-INFINITY, 0, first};
    if (i < found) {
      given = heap[0];
      heap[0] = heap[i];
      sink(heap, i, 0);
    }
    q->best[b * q->count + i] = given.value, q->words[b * q->count + i] = given.word, q->from[b * q->count + i] = given.row;
  }
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
