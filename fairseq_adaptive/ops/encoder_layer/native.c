/* A layer of an encoder over the rows of some sentences, and the scores of a skim predictor, on one core; naive.py is the
   definition. What is computed for a sentence does not depend on those beside it, bit by bit. */
#include "../decoder_step/layers.h"

enum { BLOCK = 16 * TILE }; /* rows at a time, whose inner states stay in the cache */

/* memory in aligned parts */
typedef struct {
  char *start, *next;
} Arena;

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static void *part(Arena *a, int64_t bytes) {
  void *at = a->next;
  a->next += aligned(bytes);
  return at;
}

/* Rows of x, which lie sentence by sentence, through the layer of a depth, to out. 0: done; 2: the lengths are not those of
   the rows */
int32_t encoder_layer(
    const Stack *s, int32_t depth, const float *x, int64_t rows, const int64_t *lengths, int64_t sentences, float *out) {
  const Layer *l = s->layers + s->schedule[depth];
  const int64_t C = s->width, inner = (int64_t)s->heads * s->head, F = s->hidden;
  int64_t left = rows, longest = 0;
  for (int64_t b = 0; b < sentences; b++) {
    if (lengths[b] < 0 || lengths[b] > left) return 2;
    left -= lengths[b], longest = longest > lengths[b] ? longest : lengths[b];
  }
  if (left) return 2;
  const int64_t at_once = rows < BLOCK ? rows : BLOCK, f = sizeof(float);
  Arena a = {aligned_alloc(
      64, aligned(rows * 3 * inner * f) + aligned(rows * inner * f) + aligned(at_once * C * f) + aligned(at_once * F * f) +
              aligned(attention_room(s->head, longest) * f) + 64)};
  if (!a.start) return 1;
  a.next = a.start;
  float *qkv = part(&a, rows * 3 * inner * f), *mixed = part(&a, rows * inner * f), *y = part(&a, at_once * C * f);
  float *z = part(&a, at_once * F * f), *room = part(&a, attention_room(s->head, longest) * f);
  for (int64_t from = 0, n; from < rows; from += n) {
    n = rows - from < BLOCK ? rows - from : BLOCK;
    product(&l->qkv, before(s, &l->norms[0], x + from * C, n, y), n, qkv + from * 3 * inner, 3 * inner, STORE, NULL);
  }
  for (int64_t b = 0, start = 0; b < sentences; start += lengths[b++])
    attend_within(qkv + start * 3 * inner, lengths[b], s->heads, s->head, s->scale, room, mixed + start * inner);
  memcpy(out, x, rows * C * f);
  for (int64_t from = 0, n; from < rows; from += n) {
    n = rows - from < BLOCK ? rows - from : BLOCK;
    float *to = out + from * C;
    product(&l->merge, mixed + from * inner, n, to, C, ADD, omega(s, depth, 0));
    behind(s, &l->norms[0], to, n);
    product(&l->up, before(s, &l->norms[2], to, n, y), n, z, F, s->gelu ? GELU : RELU, NULL);
    product(&l->down, z, n, to, C, ADD, omega(s, depth, 1));
    behind(s, &l->norms[2], to, n);
  }
  free(a.start);
  return 0;
}

typedef struct {
  Norm first, second;
  Map map;            /* C -> C */
  const float *score; /* 2 x padded C */
  float bias[2];
  int32_t real, width;
} Predictor;

/* the two scores of each row. 0: done */
int32_t skim_scores(const Predictor *p, const float *x, int64_t rows, float *scores) {
  const int64_t C = p->width, f = sizeof(float), at_once = rows < BLOCK ? rows : BLOCK;
  Arena a = {aligned_alloc(64, 2 * aligned(at_once * C * f) + 64)};
  if (!a.start) return 1;
  a.next = a.start;
  float *y = part(&a, at_once * C * f), *z = part(&a, at_once * C * f);
  for (int64_t from = 0, n; from < rows; from += n) {
    n = rows - from < BLOCK ? rows - from : BLOCK;
    normalize(&p->first, x + from * C, n, p->real, C, y);
    product(&p->map, y, n, z, C, STORE, NULL);
    normalize(&p->second, z, n, p->real, C, z);
    for (int64_t r = 0; r < n; r++) {
      V no = {0}, yes = {0};
      for (int64_t c = 0; c < C; c += LANES) {
        const V g = gelu(load(z + r * C + c));
        no += g * load(p->score + c), yes += g * load(p->score + C + c);
      }
      scores[2 * (from + r)] = sum(no) + p->bias[0], scores[2 * (from + r) + 1] = sum(yes) + p->bias[1];
    }
  }
  free(a.start);
  return 0;
}

int32_t size_of_Predictor(void) { return sizeof(Predictor); }
