/* A search: what it decodes with, where its keys and values lie, and what a step of it is asked. */
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
