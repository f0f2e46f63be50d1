/* What the words say of states, and the best continuations of the hypotheses of a sentence. */
#include "search.h"

/* logits of some rows of states, `rounded` where the words are in int8, for the words of a panel */
INLINE void panel(const Map *map, const float *x, const Rounded *rounded, int64_t from, int rows, int64_t word, float *out) {
  if (map->small) small_panel(map, rounded, from, rows, word, out);
  else some(rows, x + from * map->in, map->in, map->panels + word * map->in, map->bias + word, out);
}

/* what the words say of some rows of states, without keeping a logit: the log of the sum over all of them, and, where there
   is room for them, the maxima of groups, rows x groups, and how far the best word is ahead of the second, in probability */
static int scan(const Decoder *d, const float *states, int64_t rows, float heat, float *total, float *maxima, float *margin) {
  const Map *map = &d->words;
  const int64_t groups = map->out / GROUP, block = map->small ? small_block(map) : TILE * 16;
  float out[PANELS][TILE * W];
  Rounded rounded;
  float *tops = malloc(sizeof(float) * block * (1 + 3 * LANES)), *sums = tops + block;
  if (!tops) return 1;
  float *best = sums + block * LANES, *second = best + block * LANES;
  for (int64_t from = 0; from < rows; from += block) {
    const int64_t to = rows < from + block ? rows : from + block;
    if (map->small) round_rows(states + from * map->in, to - from, map->in, &rounded);
    for (int64_t i = 0; i < block; i++) tops[i] = -1e30f;
    for (int64_t i = 0; i < block * LANES; i++) sums[i] = 0, best[i] = second[i] = -INFINITY;
    for (int64_t g = 0; g < groups; g++)
      for (int64_t r = from, n; r < to; r += n) {
        n = take(to - r);
        for (int p = 0; p < PANELS; p++)
          panel(map, states + from * map->in, &rounded, r - from, n, g * GROUP + p * W, out[p]);
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

/* the logits of a group of words for a row, changed as the step asks: GROUP of them; the same bits as in `scan` */
static void group(const Search *s, const Step *q, int64_t row, int64_t g, float *logits) {
  const Map *map = &s->decoder->words;
  const float *x = s->out + row * map->in;
  Rounded rounded;
  if (map->small) round_rows(x, 1, map->in, &rounded);
  for (int p = 0; p < PANELS; p++) panel(map, x, &rounded, 0, 1, g * GROUP + p * W, logits + p * W);
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
