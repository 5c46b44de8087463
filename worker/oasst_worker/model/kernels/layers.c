/* A linear layer, all layers of a GPT-NeoX, and the whole model, in one parallel region each: between two parts the
 * team waits for its slowest, but is not sent away and called again. */
#include "linear.h"
#include "norm.h"
#include "panels.h"
#include "step.h"

typedef struct {
    norm before_attention, before_mlp;
    const linear *qkv, *dense, *mlp_in, *mlp_out;
} layer;

/* `attend_rows_of_step` of attention.c, which knows what numbers the cache holds. */
typedef void attend_by_team(team *all, const step *s, scalar *qkv, void *cache, scalar *out);
/* `sum_by_team` of exchange.c. */
typedef void sum_over_ranks(team *all, void *party, scalar *part, int64_t count);

/* Layers, or a rank's share of them: of the heads and of the MLP. */
typedef struct {
    int64_t num_layers, hidden_size, is_parallel; /* Attention and MLP both read the layer's input. */
    int64_t adds_residual;                        /* Of several ranks one does. */
    double epsilon;
    const layer *layers;
    attend_by_team *attend;
    sum_over_ranks *sum; /* NULL for whole layers. */
    void *party;
} stack;

typedef struct {
    int64_t hidden_size;
    double epsilon;
    norm before;
    const linear *linear;
} head;

typedef struct {
    const scalar *embedding; /* [vocabulary, hidden_size] */
    const stack *layers;
    const head *head;
} model;

/* What the layers hand each other, [rows, ...] each. */
typedef struct {
    scalar *hidden, *next, *normed; /* [hidden_size] */
    scalar *qkv, *attended;         /* [3 * the size of all heads], [the size of all heads] */
    scalar *dense;                  /* [hidden_size] */
    scalar *inner;                  /* [intermediate_size] */
    word *scratch;                  /* [the most words of a row of any linear layer, and one] */
} buffers;

/* Outputs of a weight's panel. To be called before anything else; again does no harm. */
int64_t prepare(void) {
    ask_for_tiles();
    return PANEL;
}

/* See `fill_panels`. */
void lay_out(linear *l, int64_t num_threads, const scalar *weight, word *scratch) {
    fill_panels(l, num_threads, weight, scratch);
}

/* See `apply_linear`. The scratch is [rows, num_words + 1]. */
void apply(
    const linear *l, int64_t num_threads, int64_t rows, const scalar *x, word *scratch, const scalar *first,
    const scalar *second, scalar *out) {
    team all = {0};
#pragma omp parallel num_threads(num_threads)
    apply_linear(&all, l, rows, x, scratch, first, second, out);
}

/* By the whole team: a rank's part of rows becomes the sum of all ranks' parts. Where one is lost the party knows. */
static void complete(team *all, const stack *n, scalar *part, int64_t count) {
    if (n->sum) n->sum(all, n->party, part, count);
}

/* By the whole team: b->hidden becomes b->next. */
static void apply_layer(
    team *all, const stack *n, const layer *l, const step *s, void *cache, const buffers *b) {
    int64_t rows = s->num_rows, size = n->hidden_size;
    normalize(all, &l->before_attention, rows, size, n->epsilon, b->hidden, b->normed);
    apply_linear(all, l->qkv, rows, b->normed, b->scratch, NULL, NULL, b->qkv);
    n->attend(all, s, b->qkv, cache, b->attended);
    const scalar *middle = n->is_parallel ? b->hidden : b->dense, *beside = n->is_parallel ? b->dense : NULL;
    const scalar *first = n->is_parallel || !n->adds_residual ? NULL : b->hidden;
    apply_linear(all, l->dense, rows, b->attended, b->scratch, first, NULL, b->dense);
    if (!n->is_parallel) complete(all, n, b->dense, rows * size);
    normalize(all, &l->before_mlp, rows, size, n->epsilon, middle, b->normed);
    apply_linear(all, l->mlp_in, rows, b->normed, b->scratch, NULL, NULL, b->inner);
    apply_linear(all, l->mlp_out, rows, b->inner, b->scratch, beside, n->adds_residual ? middle : NULL, b->next);
    complete(all, n, b->next, rows * size);
}

/* By the whole team: from b->hidden into what is returned, b->hidden or, where their number is odd, b->next. Of the
 * caches, one for each layer, each has `cache_bytes`. */
static scalar *apply_all_layers(
    team *all, const stack *n, const step *s, char *caches, int64_t cache_bytes, const buffers *b) {
    buffers own = *b;
    for (int64_t i = 0; i < n->num_layers; i++) {
        apply_layer(all, n, n->layers + i, s, caches + i * cache_bytes, &own);
        scalar *given = own.hidden;
        own.hidden = own.next;
        own.next = given;
    }
    return own.hidden;
}

/* By the whole team: logits [num_rows, vocabulary] of these rows of hidden. */
static void predict(
    team *all, const head *h, int64_t num_rows, const int64_t *rows, const scalar *hidden, scalar *normed,
    word *scratch, float *logits) {
    int64_t size = h->hidden_size;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < num_rows; i++)
        normalize_row(&h->before, size, h->epsilon, hidden + rows[i] * size, normed + i * size);
    meet(all);
    apply_linear(all, h->linear, num_rows, normed, scratch, NULL, NULL, logits);
}

void apply_layers(const stack *n, const step *s, char *caches, int64_t cache_bytes, const buffers *b) {
    team all = {0};
#pragma omp parallel num_threads(s->num_threads)
    apply_all_layers(&all, n, s, caches, cache_bytes, b);
}

void apply_head(
    const head *h, int64_t num_threads, int64_t num_rows, const int64_t *rows, const scalar *hidden, scalar *normed,
    word *scratch, float *logits) {
    team all = {0};
#pragma omp parallel num_threads(num_threads)
    predict(&all, h, num_rows, rows, hidden, normed, scratch, logits);
}

/* From the ids of all rows to the logits of those that draw. Returns how many of the rows could be taken: all, or
 * those before an id that is none, and then nothing is done. */
int64_t apply_model(
    const model *m, const step *s, char *caches, int64_t cache_bytes, const int64_t *token_ids, int64_t num_drawing,
    const int64_t *drawing_rows, const buffers *b, float *logits) {
    int64_t size = m->layers->hidden_size;
    for (int64_t row = 0; row < s->num_rows; row++)
        if (token_ids[row] < 0 || token_ids[row] >= m->head->linear->outputs) return row;
    team all = {0};
#pragma omp parallel num_threads(s->num_threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < s->num_rows; row++)
            memcpy(b->hidden + row * size, m->embedding + token_ids[row] * size, size * sizeof(scalar));
        meet(&all);
        const scalar *hidden = apply_all_layers(&all, m->layers, s, caches, cache_bytes, b);
        predict(&all, m->head, num_drawing, drawing_rows, hidden, b->normed, b->scratch, logits);
    }
    return s->num_rows;
}
