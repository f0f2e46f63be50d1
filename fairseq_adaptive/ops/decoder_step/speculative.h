/* Greedy search in rounds: the first depths draft some words one by one, and the others look at all of them in one call.

   A sentence has one row a position, and goes on from a position of its own. Rows are computed as in a step of a search with
   one hypothesis, bit by bit, so that the words and scores are those of such a search whatever is drafted. */

/* what some rounds are asked; arrays have an entry for each sentence that runs, or more */
typedef struct {
  int64_t exit, width;             /* E; rows of a sentence in a round at most, drafts and 1 */
  int64_t limit, room;             /* rounds at most; words of a sentence in `words` and `scores` */
  int64_t least, most, end;        /* before this position no end may follow, from this one on nothing but the end; that */
  int64_t drafted;                 /* drafts are among so many words, the first */
  int64_t changes, short_changes;  /* words whose log-probability is changed: always, and where no end may follow */
  const int64_t *changed, *short_changed;
  const float *change, *short_change;
  const float *positions; /* T x C, added to embeddings, or NULL */
  float heat;             /* 1 / temperature */
  const int64_t *sentence;
  int64_t *place, *newest; /* position and word from which a sentence goes on; they are changed */
  float *score;            /* of its words so far; it is changed */
  int64_t *rows;           /* with `given`: how many rows it is to have, 1 to width; else room for that */
  int64_t *got, *rounds;   /* how many words it has got, and in how many rounds; 0 at first */
  int64_t *tried;          /* how many words were drafted for it; 0 at first */
  const int64_t *given;    /* width - 1 each: what to take for drafts, whatever the words are, or NULL */
  int64_t *words;
  float *scores;
} Round;

/* let there be positions for keys and values, and room for some rows. 0: done */
int32_t search_room(Search *s, int64_t steps, int64_t rows) {
  const Decoder *d = s->decoder;
  const int64_t size = (int64_t)d->stack.depths * s->sentences * 2 * d->stack.heads * d->stack.head;
  if (steps > s->steps) {
    float **kv = realloc(s->kv, sizeof(float *) * steps);
    s->kv = kv ? kv : s->kv;
    int64_t *kv_rows = realloc(s->kv_rows, sizeof(int64_t) * steps);
    s->kv_rows = kv_rows ? kv_rows : s->kv_rows;
    if (!kv || !kv_rows) return 1;
    for (; s->steps < steps; s->steps++) {
      if (!(s->kv[s->steps] = malloc(sizeof(float) * size))) return 1;
      s->kv_rows[s->steps] = s->sentences;
    }
  }
  if (rows <= s->rows) return 0;
  free(s->at), free(s->sentence), free(s->out), free(s->maxima), free(s->total);
  s->at = malloc(sizeof(int64_t) * rows), s->sentence = malloc(sizeof(int64_t) * rows);
  s->out = malloc(sizeof(float) * rows * d->stack.width), s->total = malloc(sizeof(float) * rows);
  s->maxima = malloc(sizeof(float) * rows * (d->words.out / GROUP));
  const int there = s->at && s->sentence && s->out && s->total && s->maxima;
  s->rows = there ? rows : 0;
  return !there;
}

/* what rows carry from depth to depth, n of each */
typedef struct {
  float *x, *old, *mass, *result; /* states; of a halting rule: those before, what it carries, UT's accumulator */
  int64_t *row, *done;            /* done: the rule is done with it */
} Rows;

static Rows rows_from(const Decoder *d, const Rows *a, int64_t first) {
  const int64_t C = d->stack.width;
  return (Rows){a->x + first * C, a->old + first * C, a->mass + first, a->result + first * C, a->row + first, a->done + first};
}

/* the keys and values that rows which are done have at a depth, of their last states */
static void show(const Search *s, int depth, const Rows *a, int64_t n, Room *m) {
  const Stack *k = &s->decoder->stack;
  const Layer *l = k->layers + k->schedule[depth];
  const int64_t inner = (int64_t)k->heads * k->head;
  for (int64_t i = 0; i < n; i++) {
    if (!a->done[i]) continue;
    product(&l->qkv, before(k, &l->norms[0], a->x + i * k->width, 1, m->y), 1, m->z, 3 * inner, STORE, NULL);
    memcpy(own_kv(s, depth, a->row[i]), m->z + inner, sizeof(float) * 2 * inner);
  }
}

/* some depths for n rows */
static int run(const Search *s, int from, int to, Rows *a, int64_t n, Room *m) {
  const Decoder *d = s->decoder;
  const Stack *k = &d->stack;
  const int64_t C = k->width;
  if (!d->rule) {
    for (int depth = from; depth < to; depth++) decode_layer(s, depth, a->row, n, a->x, m);
    return 0;
  }
  float *x = malloc(sizeof(float) * n * (C + 1));
  int64_t *row = malloc(sizeof(int64_t) * n * 2), *which = row + n, left;
  if (!x || !row) return free(x), free(row), 1;
  for (int depth = from; depth < to; depth++) {
    show(s, depth, a, n, m);
    left = 0;
    for (int64_t i = 0; i < n; i++) {
      if (a->done[i]) continue;
      memcpy(x + left * C, a->x + i * C, sizeof(float) * C);
      memcpy(a->old + i * C, a->x + i * C, sizeof(float) * C);
      row[left] = a->row[i], which[left++] = i;
    }
    if (left) decode_layer(s, depth, row, left, x, m);
    const int last = depth == k->depths - 1;
    float *margin = x + n * C;
    if (left && d->rule == MARGIN && !last) {
      const float *read = x;
      if (k->last.gain) normalize(&k->last, x, left, k->real, C, m->y), read = m->y;
      if (scan(d, read, left, 1, m->z, NULL, margin)) return free(x), free(row), 1;
    }
    for (int64_t j = 0; j < left; j++) {
      const int64_t i = which[j];
      memcpy(a->x + i * C, x + j * C, sizeof(float) * C);
      if (d->rule == MARGIN && !last) a->mass[i] = margin[j];
      a->done[i] = halts(d, a->old + i * C, a->x + i * C, last, a->mass + i, a->result + i * C) || last;
    }
  }
  return free(x), free(row), 0;
}

/* what the words are to be scored by, of n rows; to out, n x C */
static void leave(const Decoder *d, const Rows *a, int64_t n, float *out) {
  const Stack *k = &d->stack;
  for (int64_t i = 0; i < n; i++)
    memcpy(out + i * k->width, (d->rule == UNIVERSAL && a->mass[i] > 0 ? a->result : a->x) + i * k->width, sizeof(float) * k->width);
  if (k->last.gain) normalize(&k->last, out, n, k->real, k->width, out);
}

/* what a step of beam search would be asked for a row at some position */
static Step asked(const Round *q, int64_t place) {
  const int early = place < q->least;
  return (Step){
      .rows = 1,
      .count = 2,
      .only = place >= q->most ? q->end : -1,
      .changes = early ? q->short_changes : q->changes,
      .changed = early ? q->short_changed : q->changed,
      .change = early ? q->short_change : q->change,
      .heat = q->heat,
  };
}

/* the best of the first words for n rows of states, some of which may not be said */
static void guess(const Search *s, const Round *q, const int64_t *row, const float *states, int64_t n, int64_t *words) {
  const Map *map = &s->decoder->words;
  const int64_t groups = (q->drafted + GROUP - 1) / GROUP;
  float out[PANELS][TILE * W];
  Rounded rounded;
  for (int64_t r = 0, rows; r < n; r += rows) {
    float top[TILE];
    rows = take(n - r);
    if (map->small) round_rows(states + r * map->in, rows, map->in, &rounded);
    for (int64_t i = 0; i < rows; i++) top[i] = -INFINITY, words[r + i] = q->end;
    for (int64_t g = 0; g < groups; g++) {
      for (int p = 0; p < PANELS; p++) panel(map, states + r * map->in, &rounded, 0, rows, g * GROUP + p * W, out[p]);
      for (int64_t i = 0; i < rows; i++) {
        V most = all(-INFINITY);
        UNROLL for (int c = 0; c < GROUP / LANES; c++) most = larger(load(out[c / VECTORS] + i * W + c % VECTORS * LANES), most);
        if (!(largest(most) * q->heat > top[i])) continue;
        const Step step = asked(q, s->at[row[r + i]]);
        for (int64_t c = 0; c < GROUP; c++) {
          const int64_t word = g * GROUP + c;
          float logit = out[c / W][i * W + c % W] * q->heat;
          for (int64_t j = 0; j < step.changes; j++) logit += step.changed[j] == word ? step.change[j] : 0;
          if (word < s->decoder->vocabulary && logit > top[i]) top[i] = logit, words[r + i] = word;
        }
      }
    }
    for (int64_t i = 0; i < rows; i++)
      if (s->at[row[r + i]] >= q->most) words[r + i] = q->end;
  }
}

/* the words that a sentence gets, of rows first..first + rows; returns how many */
static int64_t accept(const Search *s, const Round *q, int64_t i, int64_t first, int64_t rows, const int64_t *drafts, Candidate *heap) {
  float score = q->score[i], best[2];
  int64_t words[2], from[2];
  for (int64_t j = 0; j < rows; j++) {
    const int64_t row = first + j, forced = q->given && j < rows - 1;
    Step step = asked(q, s->at[row]);
    step.scores = &score, step.best = best, step.words = words, step.from = from;
    if (forced) {
      float logits[GROUP];
      group(s, &step, row, drafts[j] / GROUP, logits);
      best[0] = logits[drafts[j] % GROUP] - s->total[row] + score, words[0] = drafts[j];
    } else {
      revise(s, &step, row);
      Search own = *s; /* in which the row is the only one */
      own.out += row * s->decoder->words.in, own.maxima += row * (s->decoder->words.out / GROUP), own.total += row;
      choose(&own, &step, 0, heap, heap + step.count);
    }
    score = best[0];
    q->words[i * q->room + q->got[i] + j] = words[0], q->scores[i * q->room + q->got[i] + j] = score;
    if (j == rows - 1 || (!forced && (words[0] != drafts[j] || words[0] == q->end))) {
      q->score[i] = score, q->newest[i] = words[0], q->place[i] += j + 1;
      return j + 1;
    }
  }
  return 0;
}

/* a round of sentences first..last of those that run. 0: done */
static int one_round(Search *s, const Round *q, int64_t first, int64_t last) {
  const Decoder *d = s->decoder;
  const Stack *k = &d->stack;
  const int64_t C = k->width, n = last - first, base = first * q->width, copies = d->rule ? 3 : 1;
  int64_t most = 0, keys = s->longest, count = 0, widest = 0;
  for (int64_t i = first; i < last; i++) {
    most += q->rows[i], widest = widest > q->rows[i] ? widest : q->rows[i];
    keys = keys > q->place[i] + q->rows[i] ? keys : q->place[i] + q->rows[i];
  }
  Room m;
  if (room_open(&m, k, most, keys)) return 1;
  float *x = calloc(most * (copies * C + 1) + n * C, sizeof(float));
  int64_t *row = malloc(sizeof(int64_t) * (most * 2 + n * (q->width + 4)));
  Candidate *heap = malloc(sizeof(Candidate) * 4);
  int failed = !x || !row || !heap;
  int64_t *drafts = row + most * 2, *starts = drafts + n * q->width, *newest = starts + n, *run_of = newest + n, *words = run_of + n;
  Rows a = {x, x + (copies > 1) * most * C, x + copies * most * C, x + (copies > 2) * 2 * most * C, row, row + most};
  float *out = x + most * (copies * C + 1);
  /* rows by sentence, one after the other, so that those of a sentence are in their order */
  for (int64_t i = 0; i < n && !failed; i++) {
    starts[i] = count;
    for (int64_t j = 0; j < q->rows[first + i]; j++, count++) {
      row[count] = base + count, a.done[count] = 0;
      s->at[base + count] = q->place[first + i] + j, s->sentence[base + count] = q->sentence[first + i];
    }
    newest[i] = q->newest[first + i];
    for (int64_t j = 0; q->given && j < q->rows[first + i] - 1; j++) drafts[i * q->width + j] = q->given[(first + i) * (q->width - 1) + j];
  }
  if (q->given || widest == 1) { /* nothing is drafted: all rows at once */
    for (int64_t i = 0; i < n && !failed; i++)
      for (int64_t j = 0; j < q->rows[first + i]; j++) {
        const int64_t place = q->place[first + i] + j, word = j ? drafts[i * q->width + j - 1] : newest[i];
        embed(d, word, q->positions ? q->positions + place * k->real : NULL, x + (starts[i] + j) * C);
      }
    failed = failed || run(s, 0, k->depths, &a, count, &m);
  } else {
    for (int64_t j = 0; j < widest && !failed; j++) { /* the rows at j are gathered at the end of the line, run, and put back */
      int64_t now = 0;
      for (int64_t i = 0; i < n; i++)
        if (j < q->rows[first + i]) run_of[now++] = i;
      if (!now) break;
      float *states = malloc(sizeof(float) * now * (copies * C + 1));
      int64_t *numbers = malloc(sizeof(int64_t) * now * 2);
      failed = !states || !numbers;
      Rows b = {states, states + (copies > 1) * now * C, states + copies * now * C, states + (copies > 2) * 2 * now * C, numbers, numbers + now};
      for (int64_t r = 0; r < now && !failed; r++) {
        const int64_t i = run_of[r], place = q->place[first + i] + j;
        embed(d, newest[i], q->positions ? q->positions + place * k->real : NULL, states + r * C);
        numbers[r] = row[starts[i] + j], b.done[r] = 0, b.mass[r] = 0;
      }
      if (copies > 2 && !failed) memset(b.result, 0, sizeof(float) * now * C);
      failed = failed || run(s, 0, q->exit, &b, now, &m);
      if (!failed && j < widest - 1) {
        leave(d, &b, now, out);
        guess(s, q, numbers, out, now, words);
      }
      for (int64_t r = 0; r < now && !failed; r++) {
        const int64_t i = run_of[r];
        const Rows to = rows_from(d, &a, starts[i] + j), at = rows_from(d, &b, r);
        memcpy(to.x, at.x, sizeof(float) * C), *to.mass = *at.mass, *to.done = *at.done;
        if (copies > 2) memcpy(to.result, at.result, sizeof(float) * C);
        if (j >= q->rows[first + i] - 1) continue;
        drafts[i * q->width + j] = newest[i] = words[r], q->tried[first + i]++;
        if (words[r] == q->end) q->rows[first + i] = j + 1; /* nothing follows */
      }
      free(states), free(numbers);
    }
    /* rows that are not there any more, behind an end, leave no gap */
    count = 0;
    for (int64_t i = 0; i < n && !failed; i++)
      for (int64_t j = 0; j < q->rows[first + i]; j++, count++) {
        const int64_t was = starts[i] + j;
        if (was != count) {
          const Rows to = rows_from(d, &a, count), at = rows_from(d, &a, was);
          memcpy(to.x, at.x, sizeof(float) * C), *to.mass = *at.mass, *to.done = *at.done;
          if (copies > 2) memcpy(to.result, at.result, sizeof(float) * C);
          s->at[base + count] = s->at[base + was], s->sentence[base + count] = s->sentence[base + was];
        }
      }
    failed = failed || run(s, q->exit, k->depths, &a, count, &m);
  }
  if (!failed) {
    leave(d, &a, count, s->out + base * C);
    failed = score(s, q->heat, base, base + count);
  }
  for (int64_t i = 0, at = base; i < n && !failed; i++) {
    const int64_t rows = q->rows[first + i];
    const int64_t words = accept(s, q, first + i, at, rows, drafts + i * q->width, heap);
    q->got[first + i] += words, q->rounds[first + i]++;
    at += rows;
  }
  room_close(&m), free(x), free(row), free(heap);
  return failed;
}

/* rounds of sentences first..last, until one of them ends. 0: done */
int32_t search_rounds(Search *s, const Round *q, int64_t first, int64_t last) {
  for (int64_t round = 0, ended = 0; round < q->limit && !ended; round++) {
    for (int64_t i = first; i < last && !q->given; i++) {
      const int64_t left = q->most - q->place[i] + 1;
      q->rows[i] = q->width < left ? q->width : left;
    }
    if (one_round(s, q, first, last)) return 1;
    for (int64_t i = first; i < last; i++) ended |= q->newest[i] == q->end || q->place[i] > q->most;
  }
  return 0;
}
