/* A linear layer, and all layers of a GPT-NeoX in one parallel region: between two parts the team waits for its slowest,
 * but is not sent away and called again. */
#include "attention.h"
#include "linear.h"
#include "norm.h"

typedef struct {
    norm before_attention, before_mlp;
    const linear *qkv, *dense, *mlp_in, *mlp_out;
} layer;

typedef struct {
    int64_t num_layers, hidden_size, is_parallel; /* Attention and MLP both read the layer's input. */
    double epsilon;
    const layer *layers;
} stack;

/* What the layers hand each other, [rows, ...] each. */
typedef struct {
    scalar *hidden, *next, *normed; /* [hidden_size] */
    scalar *qkv;                    /* [3 * hidden_size] */
    scalar *attended, *dense;       /* [hidden_size] */
    scalar *inner;                  /* [intermediate_size] */
    word *words;                    /* The most words of a row of any linear layer, and one. */
} buffers;

/* Outputs of a weight's panel. To be called once, before anything else. */
int64_t prepare(void) {
    ask_for_tiles();
    return PANEL;
}

/* See `apply_linear`. The scratch is [rows, words + 1] words. */
void apply(
    const linear *l, int64_t num_threads, int64_t rows, const scalar *x, word *scratch, const scalar *first,
    const scalar *second, scalar *out) {
    team all = {0};
#pragma omp parallel num_threads(num_threads)
    apply_linear(&all, l, rows, x, scratch, first, second, out);
}

/* By the whole team: b->hidden becomes b->next. */
static void apply_layer(
    team *all, const stack *n, const layer *l, const step *s, stored *cache, const buffers *b) {
    int64_t rows = s->num_rows, size = n->hidden_size;
    normalize(all, &l->before_attention, rows, size, n->epsilon, b->hidden, b->normed);
    apply_linear(all, l->qkv, rows, b->normed, b->words, NULL, NULL, b->qkv);
    attend_rows_of_step(all, s, b->qkv, cache, b->attended);
    const scalar *middle = n->is_parallel ? b->hidden : b->dense, *beside = n->is_parallel ? b->dense : NULL;
    apply_linear(all, l->dense, rows, b->attended, b->words, n->is_parallel ? NULL : b->hidden, NULL, b->dense);
    normalize(all, &l->before_mlp, rows, size, n->epsilon, middle, b->normed);
    apply_linear(all, l->mlp_in, rows, b->normed, b->words, NULL, NULL, b->inner);
    apply_linear(all, l->mlp_out, rows, b->inner, b->words, beside, middle, b->next);
}

/* All layers, from b->hidden into b->hidden, or into b->next where their number is odd. `caches` holds `cache_size`
 * numbers for each layer. */
void apply_layers(const stack *n, const step *s, stored *caches, int64_t cache_size, const buffers *b) {
    team all = {0};
#pragma omp parallel num_threads(s->num_threads)
    {
        buffers own = *b;
        for (int64_t i = 0; i < n->num_layers; i++) {
            apply_layer(&all, n, n->layers + i, s, caches + i * cache_size, &own);
            scalar *given = own.hidden;
            own.hidden = own.next;
            own.next = given;
        }
    }
}
