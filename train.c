// train.c - trains a Chain-of-Experts: the hand-derived backward pass, AdamW, and the training run.
//
// Read coe.c first: this file includes it, and is its mirror. A section has the number of the one
// in coe.c that it corresponds to, and backward() in [7] is forward() read upwards. (The sampler
// there has no gradient, so that there is no section 8 here.) PyTorch's way to the same numbers is
// tests/reference.py with autograd.
//
//   [3] gradients of activations   [5] the chain of experts   [7] loss and backward
//   [4] operations                 [6] attention              [9] AdamW
//                                                             [10] the training run
//
// What is not about gradients or the run itself has its rooms in lib/: data.h and task.h (where
// batches come from), recipe.h and setup.h (options), checkpoint.h, samples.h (trying the model
// out).
//
// Conventions. dx is the gradient of the loss with respect to x and has its shape; above a function
// stands the forward equation, then its derivative. The gradient of a weight lies in its tensor
// (w->grad) and is always added to, because a weight is used by many tokens, iterations and
// micro-batches. Gradients of activations are overwritten, or added to where a comment says +=.
#include "coe.c"
#include "lib/output.h"
#include "lib/task.h"
#include "lib/recipe.h"
#include "lib/documents.h"
#include "lib/data.h"

// ---- [3] gradients of activations ---------------------------------------------------------------
// What the backward pass writes besides the gradients of weights, in tables like those of coe.c. T
// is all rows of a micro-batch. Arrays "grouped" by expert are rows as in Iteration.

enum { MOST_LOSS_ROWS = 512 };

// Rows whose logits are in memory at a time: so many that lm_head and its gradient are not fetched
// too often, but no more than some 256 MB of them. T is cut into equal parts.
static size_t most_loss_rows(size_t T, size_t V) {
    const size_t fit = ((size_t)1 << 26) / V;
    const size_t most = fit < 96 ? 96 : min_size(fit, MOST_LOSS_ROWS);
    const size_t parts = (T + most - 1) / most;
    return (T + parts - 1) / parts;
}

// How far apart these rows are. V is often a multiple of a power of two; without the padding, the
// numbers of a column would then all compete for the same few lines of the cache.
static size_t logits_stride(size_t V) { return V + CACHE_LINE / sizeof(real); }

#define GRADIENTS(X) \
    X(real, dx,          T,         d)              /* of a layer's output; then of y_C to y_0; */ \
                                                    /* then of the layer's input                */ \
    X(real, dmid,        T,         d)              /* of the stream after attention            */ \
    X(real, dffn,        T,         d)              /* of a feed-forward's output               */ \
    X(real, dnorm,       T,         d)              /* of a norm's output                       */ \
    X(real, dlatent_q,   T,         r)              /* of the query's normed latent             */ \
    X(real, dq_a,        T,         r)                                                             \
    X(real, dq,          T,         H * (dn + dr))                                                 \
    X(real, dkv,         T,         H * (dn + dv))                                                 \
    X(real, dk_rope,     T,         H * dr)         /* each head's part of the shared key       */ \
    X(real, dlatent,     T,         R)                                                             \
    X(real, dkv_a,       T,         R + dr)                                                        \
    X(real, dheads,      T,         H * dv)                                                        \
    X(real, dscores,     threads,   QUERY_BLOCK * context)  /* of a block of queries            */ \
    X(real, dreturned,   T * K,     d)              /* of weight * returned, grouped            */ \
    X(real, dgathered,   T * K,     d)              /* of the experts' inputs, grouped          */ \
    X(real, dact,        T,         max_size(K * f, W))     /* of weight * act; W is f S or I   */ \
    X(real, dg,          T,         max_size(K * f, W))                                            \
    X(real, du,          T,         max_size(K * f, W))                                            \
    X(real, dweight,     T,         K)              /* of the routing weights                   */ \
    X(real, row_weight,  T * K,     1)              /* the routing weights, grouped             */ \
    X(real, drow_weight, T * K,     1)              /* their gradients, grouped                 */ \
    X(real, dscore,      T,         E)              /* of the router's scores; then, in place,  */ \
                                                    /* of its logits                            */ \
    X(real, load,        E,         1)              /* of balance()                             */ \
    X(int,  row,         T,         1)              /* the rows of s->final that have a loss    */ \
    X(real, logits,      loss_rows, logits_stride(V))       /* and their gradient               */

typedef struct {
#define X(type, field, rows, cols) type *field;
    GRADIENTS(X)
#undef X
    size_t loss_rows;
    char *memory;
    size_t memory_bytes;
} Gradients;

// Places everything in Gradients for T rows, of sequences of up to `context` tokens.
static void gradients_layout(Gradients *g, const Config *config, size_t T, size_t context,
                             Arena *arena) {
    LETTERS(config);
    const size_t threads = (size_t)thread_count();
    size_t W = f * S;
    for (size_t l = 0; l < L; l++) if (!is_moe(config, l)) W = max_size(W, I);
    const size_t loss_rows = g->loss_rows = most_loss_rows(T, V);
#define X(type, field, rows, cols) g->field = take(arena, checked_mul(rows, cols), sizeof(type));
    GRADIENTS(X)
#undef X
}

// Memory for the backward pass of T rows, laid out like a State: once to measure, once to place.
static Gradients gradients_new(const Config *config, size_t T, size_t context) {
    Gradients g = { 0 };
    Arena arena = { 0 };
    gradients_layout(&g, config, T, context, &arena);
    g.memory_bytes = arena.used;
    g.memory = arena.base = allocate(arena.used, "gradients of the activations");
    arena.used = 0;
    gradients_layout(&g, config, T, context, &arena);
    return g;
}

// The sequences of one forward and backward pass. A step may take several of these, and adds up
// their gradients: it then needs memory for one of them only.
typedef struct {
    const int *tokens, *targets;    // (B, n); a target that is NO_TARGET has no loss
    size_t B, n;
    double scale;                   // of a token's cross entropy: 1 / all targets of the step
    double share;                   // of the balancing loss: this part of all targets of the step
} MicroBatch;

// What forward must keep for the backward pass of a model.
static enum Keep to_keep(const Model *m) { return m->upcycled ? KEEP_FFN : KEEP; }

// ---- [4] operations -----------------------------------------------------------------------------

// Where a sum runs over rows, the columns are shared out among the threads in blocks of this many.
enum { COLUMN_BLOCK = 32 };

// dw (d) += the sum over the n rows of dy * x * scale, and of dy alone where x is NULL (a bias).
// dy (n, d), x (n, d) at stride ld, scale (n). A thread owns columns, so that the order of the sum
// is fixed.
static void add_rows(real *dw, const real *dy, const real *x, size_t ld, const real *scale,
                     size_t n, size_t d) {
    SHARED(n * d, for (size_t block = 0; block < d; block += COLUMN_BLOCK) {
        const size_t end = min_size(block + COLUMN_BLOCK, d);
        for (size_t t = 0; t < n; t++)
            for (size_t i = block; i < end; i++)
                dw[i] += x ? dy[t * d + i] * (x[t * ld + i] * scale[t]) : dy[t * d + i];
    })
}

// y_i = w_i x_i s,   s = (mean_j x_j^2 + eps)^(-1/2). `along` here and below is the number in the
// term that normalising subtracts from a gradient. Let u_i = w_i dy_i. x_j acts directly
// and through s, with ds/dx_j = -s^3 x_j / d, so
//     dx_j = s u_j - (s^3 / d) x_j sum_i u_i x_i               dw_i += dy_i x_i s
// dy (n, d); dx, += with `add`, and x (n, d) at stride ld; s = inverse (n) was kept.
static void rmsnorm_backward(real *dx, const real *dy, const real *inverse, const real *x,
                             size_t ld, Tensor *w, size_t n, int add) {
    const size_t d = w->cols;
    SHARED(n * d, for (size_t t = 0; t < n; t++) {
        const real *xt = x + t * ld, *dyt = dy + t * d, s = inverse[t];
        const real along = dot3(w->data, dyt, xt, d) * s * s * s / (real)d;
        real *dxt = dx + t * ld;
        for (size_t i = 0; i < d; i++)
            dxt[i] = (add ? dxt[i] : 0) + (s * w->data[i] * dyt[i] - along * xt[i]);
    })
    add_rows(w->grad, dy, x, ld, inverse, n, d);
}

// y = x w^T + b:   dx = dy w (+= with `add`),   dw += dy^T x,   db += the sum of its rows
// dx and x (n, columns of w), dy (n, rows of w), copy e of w. dx and the bias may be NULL.
static void linear_backward(real *dx, const real *dy, const real *x, Tensor *w, size_t e,
                            Tensor *bias, size_t n, int add) {
    const Matrix dy_rows = view(dy, n, w->rows, w->rows);
    if (dx) matmul_nn(dx, w->cols, dy_rows, matrix(w, e), add);
    matmul_tn(grad_of(w, e), w->cols, dy_rows, view(x, n, w->cols, w->cols), 1);
    if (bias && bias->data) add_rows(bias->grad, dy, NULL, 0, NULL, n, w->rows);
}

// y_i = e^(x_i) / sum_j e^(x_j):   dy_i/dx_j = y_i ([i = j] - y_j), so
//     dx_j = y_j (dy_j - sum_i dy_i y_i)
// In place: dy (n) becomes dx. y (n) is what forward made.
static void softmax_backward(real *dy, const real *y, size_t n) {
    const real along = dot(dy, y, n);
    for (size_t i = 0; i < n; i++) dy[i] = y[i] * (dy[i] - along);
}

// ---- [5] the chain of experts -------------------------------------------------------------------

// One row of f numbers: act = silu(g) u, which is then multiplied by the routing weight of the row.
// Given da, the gradient of weight * act,
//     dweight = da . act,    du = weight da silu(g),    dg = weight da u silu'(g)
//     silu'(g) = s + g s (1 - s),   s = sigmoid(g)
// act is computed again, and left as weight * act. weight and dweight may be NULL, for 1.
// (`restrict`: without the promise that nothing overlaps, the loop would not be vectorised.)
WIDE static void swiglu_backward(real *restrict dg, real *restrict du, real *restrict dweight,
                                 real *restrict act, const real *restrict da,
                                 const real *restrict g, const real *restrict u,
                                 const real *weight, size_t f) {
    const real factor = weight ? *weight : 1;
    for (size_t i = 0; i < f; i++) {
        const real s = sigmoid(g[i]), silu = g[i] * s, dact = factor * da[i];
        act[i] = silu * u[i];
        du[i] = dact * silu;
        dg[i] = dact * u[i] * (s + silu * (1 - s));
    }
    if (!weight) return;
    *dweight = dot(da, act, f);
    for (size_t i = 0; i < f; i++) act[i] *= factor;
}

// One feed-forward and the routing weight (n) of its rows: act = silu(g) u, g = gate_proj x,
// u = up_proj x, y = weight down_proj act = down_proj (weight act). With da = dy down_proj, the
// gradient of (weight act):
//     dweight, dg, du            as in swiglu_backward()
//     ddown_proj += dy^T (weight act)
//     dx = dg gate_proj + du up_proj (+= with `add`),   dgate_proj += dg^T x,   dup_proj += du^T x
// p is what forward had, where x, g and u were kept and act is scratch; dp are the gradients: dy in
// dp.out, results in dp.x and dp.weight, scratch in the rest.
static void feed_forward_backward(Mlp w, MlpRows p, MlpRows dp, int add) {
    const size_t f = w.gate_proj->rows, d = w.gate_proj->cols, n = p.n;
    matmul_nn(dp.act, f, view(dp.out, n, d, d), matrix(w.down_proj, w.e), 0);
    SHARED(n * f, for (size_t t = 0; t < n; t++) {
        const size_t at = t * f;
        swiglu_backward(dp.g + at, dp.u + at, p.weight ? dp.weight + t : NULL, p.act + at,
                        dp.act + at, p.g + at, p.u + at, p.weight ? p.weight + t : NULL, f);
    })
    linear_backward(NULL, dp.out, p.act, w.down_proj, w.e, NULL, n, 0);
    linear_backward(dp.x, dp.g, p.x, w.gate_proj, w.e, NULL, n, add);
    linear_backward(dp.x, dp.u, p.x, w.up_proj, w.e, NULL, n, 1);
}

// The load-balancing loss of one router call, and its gradient into g->dscore (T, E), which it
// overwrites. Over a span of N tokens (a sequence with seq_aux, else the whole micro-batch):
//     alpha * sum_e count_e E / (N K) * mean_t s_te,     d/ds_te = alpha count_e E / (N K) / N
// times batch->share, and averaged over the spans. Where scores are sigmoids, p_te = s_te / sum_j
// s_tj is in the place of s_te, and with a_e what stands before it
//     d/ds_te (sum_j a_j p_tj) = (a_e - sum_j a_j p_tj) / sum_j s_tj
// How often an expert was chosen, count_e, is a constant: a choice does not change with a small
// change of the scores, so its derivative is 0.
static double balance(Gradients *g, const Config *config, const Iteration *it,
                      const MicroBatch *batch) {
    LETTERS(config);
    const size_t spans = config->seq_aux ? batch->B : 1, N = batch->B * batch->n / spans;
    double loss = 0;
    for (size_t span = 0; span < spans; span++) {
        memset(g->load, 0, E * sizeof(real));
        for (size_t j = span * N * K; j < (span + 1) * N * K; j++) g->load[it->expert[j]]++;
        const double per_count = batch->share * config->aux_loss_alpha * (double)E /
                                 (double)(N * K) / (double)N / (double)spans;
        for (size_t e = 0; e < E; e++) g->load[e] *= (real)per_count;       // now d/ds_te
        for (size_t t = span * N; t < (span + 1) * N; t++) {
            const real *score = it->score + t * E;
            real sum = 1, along = 0;            // a softmax sums to 1, whatever its scores are
            if (config->scoring_func == SIGMOID) {
                sum = (real)1e-20;
                for (size_t e = 0; e < E; e++) sum += score[e];
                along = dot(g->load, score, E) / sum;
            }
            for (size_t e = 0; e < E; e++) g->dscore[t * E + e] = (g->load[e] - along) / sum;
            loss += (double)dot(g->load, score, E) / (double)sum;
        }
    }
    return loss;
}

// The router of iteration c, given g->dweight (T, K), the gradient of the routing weights: adds to
// dy (T, d) the gradient of its input y, and to w->gate.grad its own. The choice itself has no
// gradient, see balance(); the scores have one where they became weights. With `total` the sum of
// the chosen scores,
//     weight_k = factor score_k:           dscore_k = factor dweight_k
//     weight_k = factor score_k / total:
//                       dscore_k = (factor dweight_k - sum_j dweight_j weight_j) / total
// and through the balancing loss, which is returned. The correction bias is in the choice alone, so
// it has no gradient. A sigmoid s has the derivative s (1 - s).
static double route_backward(const Config *config, Gradients *g, real *dy, const Iteration *it,
                             Layer *w, size_t c, const MicroBatch *batch) {
    LETTERS(config);
    const size_t T = batch->B * batch->n;
    const double loss = balance(g, config, it, batch);
    const bool normalise = normalises(config);
    const real factor = weight_factor(config);
    SHARED(T * E, for (size_t t = 0; t < T; t++) {
        const real *score = it->score + t * E, *weight = it->weight + t * K;
        const real *dweight = g->dweight + t * K;
        const int *expert = it->expert + t * K;
        real *dscore = g->dscore + t * E, along = 0, total = (real)1e-20;
        for (size_t k = 0; normalise && k < K; k++) {
            along += dweight[k] * weight[k];
            // A weight is 0 only where all allowed scores that are left have rounded to 0.
            if (weight[k] != 0) total += score[expert[k]];
        }
        for (size_t k = 0; k < K; k++)
            if (weight[k] != 0)
                dscore[expert[k]] += normalise ? (factor * dweight[k] - along) / total
                                               : dweight[k] * factor;
        if (config->scoring_func == SOFTMAX) softmax_backward(dscore, score, E);
        else for (size_t e = 0; e < E; e++) dscore[e] *= score[e] * (1 - score[e]);
    })
    linear_backward(dy, g->dscore, it->y, &w->gate, gate_of(config, c), NULL, T, 1);
    return loss;
}

// Expert e, given dy (T, d), the gradient of what the experts return: gathers the rows of the
// tokens that chose it, and writes the gradients of its inputs to g->dgathered and of its routing
// weights to g->drow_weight. Mirrors expert_forward().
static void expert_backward(const Config *config, State *s, Gradients *g, const Iteration *it,
                            Layer *w, const real *dy, size_t e) {
    const size_t d = config->hidden_size, f = config->moe_intermediate_size;
    const size_t first = (size_t)it->start[e];
    const int *token = it->token + first;
    MlpRows p = mlp_rows(config, s, it, e);
    p.weight = g->row_weight + first;
    const MlpRows dp = { p.n, g->dgathered + first * d, g->dg + first * f, g->du + first * f,
                         g->dact + first * f, g->dreturned + first * d, g->drow_weight + first };
    for (size_t j = 0; j < p.n; j++) {
        memcpy(p.x + j * d, it->y + (size_t)token[j] * d, d * sizeof(real));
        memcpy(dp.out + j * d, dy + (size_t)token[j] * d, d * sizeof(real));
    }
    if (p.n) feed_forward_backward(expert(w, e), p, dp, 0);
}

// Given g->dffn (T, d), the gradient of ffn(y) of iteration c of layer l: g->dx (T, d) += the
// gradient of y. ffn_forward() read upwards. Returns the balancing loss.
static double ffn_backward(Model *m, State *s, Gradients *g, size_t l, size_t c,
                           const MicroBatch *batch) {
    const Config *config = &m->config;
    LETTERS(config);
    Layer *w = &m->w.layer[l];
    const Iteration *it = &s->layer[l].iteration[c];
    const size_t T = batch->B * batch->n;
    const int moe = is_moe(config, l);
    if (!moe || S)
        feed_forward_backward(shared_mlp(w, moe),
                              (MlpRows){ T, it->y, it->shared_g, it->shared_u, s->act, NULL, NULL },
                              (MlpRows){ T, g->dx, g->dg, g->du, g->dact, g->dffn, NULL }, 1);
    if (!moe) return 0;
    for (size_t j = 0; j < T * K; j++) g->row_weight[it->slot[j]] = it->weight[j];
    TASKS(T * K * d * f, e, E, { expert_backward(config, s, g, it, w, g->dffn, e); })
    SHARED(T * K * d, for (size_t t = 0; t < T; t++) {
        for (size_t k = 0; k < K; k++) {
            const size_t row = (size_t)it->slot[t * K + k];
            for (size_t i = 0; i < d; i++) g->dx[t * d + i] += g->dgathered[row * d + i];
            g->dweight[t * K + k] = g->drow_weight[row];
        }
    })
    return route_backward(config, g, g->dx, it, w, c, batch);
}

// y_(c+1) = y_c + v * ffn(y_c). Given dy (T, d), the gradient of y_(c+1):
//     dffn = v * dy,   dv += sum over tokens of dy * ffn(y_c);   v (d), all else (T, d)
// What reaches y_c past ffn is dy itself.
static void weighted_backward(real *dffn, real *dv, const real *dy, const real *v, const real *ffn,
                              size_t T, size_t d) {
    SHARED(T * d, for (size_t block = 0; block < d; block += COLUMN_BLOCK) {
        const size_t end = min_size(block + COLUMN_BLOCK, d);
        for (size_t t = 0; t < T; t++)
            for (size_t i = block; i < end; i++) {
                dffn[t * d + i] = v[i] * dy[t * d + i];
                dv[i] += dy[t * d + i] * ffn[t * d + i];
            }
    })
}

// Given g->dx (T, d), the gradient of the output of layer l: g->dmid (T, d), that of the stream
// after attention. chain_forward() read upwards: with y_(c+1) = y_c + ffn(y_c) the gradient reaches
// y_c on both ways, with y_(c+1) = ffn(y_c) through ffn alone. With prenorm_chain the output is mid
// + the sum of all ffn(y_c): g->dmid is what reaches every ffn, and mid; g->dx is what reaches y_c,
// nothing yet behind the last. Returns the balancing loss of the layer.
static double chain_backward(Model *m, State *s, Gradients *g, size_t l, const MicroBatch *batch) {
    const Config *config = &m->config;
    Layer *w = &m->w.layer[l];
    const LayerState *a = &s->layer[l];
    const size_t T = batch->B * batch->n, d = config->hidden_size;
    double loss = 0;
    const bool keeps_mid = config->outer_residual || config->prenorm_chain;
    if (keeps_mid) memcpy(g->dmid, g->dx, T * d * sizeof(real));
    if (config->prenorm_chain) memset(g->dx, 0, T * d * sizeof(real));
    for (size_t c = iterations(config, l); c-- > 0; ) {
        const enum Residual residual = residual_of(m, c);
        if (residual == WEIGHTED_Y)
            weighted_backward(g->dffn, grad_of(&w->coe_weights, c - 1), g->dx,
                              data_of(&w->coe_weights, c - 1), a->iteration[c].ffn, T, d);
        else
            memcpy(g->dffn, g->dx, T * d * sizeof(real));
        for (size_t i = 0; residual == PRENORM && i < T * d; i++) g->dffn[i] += g->dmid[i];
        if (residual == NOTHING) memset(g->dx, 0, T * d * sizeof(real));    // only ffn passes it on
        loss += ffn_backward(m, s, g, l, c, batch);
    }
    rmsnorm_backward(g->dmid, g->dx, a->inverse_mid, a->mid, d, &w->post_attention_layernorm, T,
                     keeps_mid);
    return loss;
}

// ---- [6] attention ------------------------------------------------------------------------------

// One block of queries of one head. Query i and key j have the score s_ij = q_i . k_j, where q is
// [q_nope, q_rope] and k is [k_nope, k_rope]; a_ij = softmax_j(scale s_ij) and o_i = sum_j a_ij
// v_j:
//     dv_j  = sum_i a_ij do_i                        da_ij = do_i . v_j
//     ds_ij = scale a_ij (da_ij - sum_m a_im da_im)  where sum_m a_im da_im = do_i . o_i
//     dq_i  = sum_j ds_ij k_j                        dk_j  = sum_i ds_ij q_i
// This makes a and ds, (queries, keys) each. a was not kept: it is e^(scale s - log_sum). log_sum
// is that of the first query; o and d_o (`do` is a word of C) are (queries, dv) at stride H dv.
static void scores_backward(real *a, real *ds, QueryBlock qb, const real *log_sum, const real *o,
                            const real *d_o, const Config *config) {
    LETTERS(config);
    const real scale = attention_scale(config);
    matmul_nt(a, qb.keys, qb.q_nope, qb.k_nope, 0);
    matmul_nt(a, qb.keys, qb.q_rope, qb.k_rope, 1);
    matmul_nt(ds, qb.keys, view(d_o, qb.queries, dv, H * dv), qb.v, 0);
    for (size_t i = 0; i < qb.queries; i++) {
        const real along = dot(d_o + i * H * dv, o + i * H * dv, dv);
        real *ai = a + i * qb.keys, *dsi = ds + i * qb.keys;
        const size_t seen = qb.position + i + 1;
        for (size_t j = 0; j < seen; j++) {
            ai[j] = real_exp(scale * ai[j] - log_sum[i * H]);
            dsi[j] = scale * ai[j] * (dsi[j] - along);
        }
        memset(ai + seen, 0, (qb.keys - seen) * sizeof(real));
        memset(dsi + seen, 0, (qb.keys - seen) * sizeof(real));
    }
}

// Given g->dheads: g->dq, g->dkv and g->dk_rope, which need not be 0 before. A thread owns a head
// of a sequence and writes only its own rows, one block of queries after the other, the last first:
// that one sees all keys, and the others add to what it wrote.
static void attend_backward(const Config *config, State *s, const LayerState *layer, Gradients *g,
                            size_t B, size_t n) {
    LETTERS(config);
    const size_t dq = dn + dr, dkv = dn + dv;
    TASKS(B * n * n * H, task, B * H, {
        const size_t h = task % H, start = task / H * n * H + h;    // row of the first token's head
        real *dkv_h = g->dkv + start * dkv, *dk_rope = g->dk_rope + start * dr;
        real *a = s->scores + (size_t)thread_id() * QUERY_BLOCK * s->context;
        real *ds = g->dscores + (size_t)thread_id() * QUERY_BLOCK * s->context;
        for (size_t block = query_blocks(n); block-- > 0; ) {
            const QueryBlock qb = block_of(config, layer, n, task / H, h, block);
            const int add = qb.keys < n;
            const size_t row = qb.first * H + h;
            const real *d_o = g->dheads + row * dv;
            real *dq_h = g->dq + row * dq;
            scores_backward(a, ds, qb, layer->log_sum + row, layer->heads + row * dv, d_o,
                            config);
            const Matrix a_rows = view(a, qb.queries, qb.keys, qb.keys);
            const Matrix ds_rows = view(ds, qb.queries, qb.keys, qb.keys);
            matmul_tn(dkv_h + dn, H * dkv, a_rows, view(d_o, qb.queries, dv, H * dv), add);
            matmul_nn(dq_h, H * dq, ds_rows, qb.k_nope, 0);
            matmul_nn(dq_h + dn, H * dq, ds_rows, qb.k_rope, 0);
            matmul_tn(dkv_h, H * dkv, ds_rows, qb.q_nope, add);
            matmul_tn(dk_rope, H * dr, ds_rows, qb.q_rope, add);
        }
    })
}

// Given g->dmid (T, d), the gradient of the stream after attention: g->dx (T, d), that of the
// layer's input. mid = x + attention(rmsnorm(x)), read upwards. Normed inputs were not kept and are
// computed again. The result is made in the memory of g->dmid, which already holds what `x +`
// passes on; then the two change places.
static void attention_backward(Model *m, State *s, Gradients *g, size_t l, size_t B, size_t n) {
    const Config *config = &m->config;
    LETTERS(config);
    Layer *w = &m->w.layer[l];
    const LayerState *a = &s->layer[l];
    const size_t T = B * n, width = H * (dn + dv);

    linear_backward(g->dheads, g->dmid, a->heads, &w->o_proj, 0, &w->o_bias, T, 0);
    attend_backward(config, s, a, g, B, n);
    // kv = kv_b_proj latent, whose rows lie at stride R + dr
    const Matrix dkv = view(g->dkv, T, width, width);
    matmul_nn(g->dlatent, R, dkv, matrix(&w->kv_b_proj, 0), 0);
    matmul_tn(w->kv_b_proj.grad, R, dkv, view(a->latent, T, R, R + dr), 1);
    SHARED(T * H * dr, for (size_t t = 0; t < T; t++) {
        real *dk = g->dkv_a + t * (R + dr) + R;
        memset(dk, 0, dr * sizeof(real));
        for (size_t h = 0; h < H; h++) {
            for (size_t i = 0; i < dr; i++) dk[i] += g->dk_rope[(t * H + h) * dr + i];
            rope(g->dq + (t * H + h) * (dn + dr) + dn, s, t % n, dr, -1);
        }
        rope(dk, s, t % n, dr, -1);         // a rotation's transpose is the rotation back
    })
    rmsnorm_backward(g->dkv_a, g->dlatent, a->inverse_kv, a->kv_a, R + dr, &w->kv_a_layernorm, T,
                     0);
    if (r) {
        rmsnorm(s->norm, NULL, a->q_a, r, &w->q_a_layernorm, T, LATENT_EPS);
        linear_backward(g->dlatent_q, g->dq, s->norm, &w->q_b_proj, 0, NULL, T, 0);
        rmsnorm_backward(g->dq_a, g->dlatent_q, a->inverse_q, a->q_a, r, &w->q_a_layernorm, T, 0);
    }
    rmsnorm(s->norm, NULL, a->x, d, &w->input_layernorm, T, config->rms_norm_eps);
    if (r) linear_backward(g->dnorm, g->dq_a, s->norm, &w->q_a_proj, 0, &w->q_a_bias, T, 0);
    else linear_backward(g->dnorm, g->dq, s->norm, &w->q_proj, 0, NULL, T, 0);
    linear_backward(g->dnorm, g->dkv_a, s->norm, &w->kv_a_proj, 0, &w->kv_a_bias, T, 1);
    real *dx = g->dmid;
    rmsnorm_backward(dx, g->dnorm, a->inverse_x, a->x, d, &w->input_layernorm, T, 1);
    g->dmid = g->dx;
    g->dx = dx;
}

// ---- [7] loss and backward ----------------------------------------------------------------------

// Moves the rows of x (T, d) that have a target to its beginning. row: where they were, in order.
// Returns how many there are.
static size_t gather_rows(int *row, real *x, const int *targets, size_t T, size_t d) {
    size_t n = 0;
    for (size_t t = 0; t < T; t++) {
        if (targets[t] == NO_TARGET) continue;
        if (n != t) memcpy(x + n * d, x + t * d, d * sizeof(real));
        row[n++] = (int)t;
    }
    return n;
}

// Moves the first n rows of dx (T, d) back to where gather_rows() took them from; the rest is 0.
static void scatter_rows(real *dx, const int *row, size_t n, size_t T, size_t d) {
    for (size_t t = T; t-- > 0; ) {
        const bool has_target = n > 0 && row[n - 1] == (int)t;
        n -= has_target;
        if (!has_target) memset(dx + t * d, 0, d * sizeof(real));
        else if (n != t) memcpy(dx + t * d, dx + n * d, d * sizeof(real));
    }
}

// The sum over the rows of s->final that have a target (T) of the cross entropy, times `scale`;
// with with_gradient also the gradient of that, into lm_head and, as g->dnorm (T, d), into
// s->final. For logits z and probabilities p = softmax(z),
//     loss = log sum_j e^(z_j) - z_target,    dloss/dz_j = p_j - [j = target]
// Rows without a target need no logits: the others are moved together, at the beginning of
// s->final. Of these a block at a time: the logits of all would dwarf the model.
static double loss_of(Model *m, State *s, Gradients *g, const int *targets, size_t T, double scale,
                      bool with_gradient) {
    const size_t V = m->config.vocab_size, d = m->config.hidden_size, ld = logits_stride(V);
    const Matrix lm_head = matrix(m->w.lm_head, 0);
    double total = 0, row_loss[MOST_LOSS_ROWS];
    const size_t n = gather_rows(g->row, s->final, targets, T, d);
    for (size_t first = 0; first < n; first += g->loss_rows) {
        const size_t rows = min_size(n - first, g->loss_rows);
        const Matrix x = view(s->final + first * d, rows, d, d);
        matmul_nt(g->logits, ld, x, lm_head, 0);
        SHARED(rows * V, for (size_t t = 0; t < rows; t++) {
            real *z = g->logits + t * ld;
            const int target = targets[g->row[first + t]];
            row_loss[t] = cross_entropy(z, V, target);      // z is p now
            z[target] -= 1;
            for (size_t i = 0; with_gradient && i < V; i++) z[i] *= (real)scale;
        })
        for (size_t t = 0; t < rows; t++) total += row_loss[t];
        if (!with_gradient) continue;
        const Matrix dz = view(g->logits, rows, V, ld);
        matmul_nn(g->dnorm + first * d, d, dz, lm_head, 0);
        matmul_tn(m->w.lm_head->grad, d, dz, x, 1);
    }
    if (with_gradient) scatter_rows(g->dnorm, g->row, n, T, d);
    return total * scale;
}

typedef struct { double loss, aux; } Loss;

// Adds the gradient of (cross entropy * scale + balancing losses * share) of a micro-batch to the
// gradients of all tensors, after forward() has run it: forward() read upwards. Returns both
// losses.
static Loss backward(Model *m, State *s, Gradients *g, const MicroBatch *batch) {
    const size_t d = m->config.hidden_size, T = batch->B * batch->n;
    Loss loss = { loss_of(m, s, g, batch->targets, T, batch->scale, true), 0 };
    rmsnorm_backward(g->dx, g->dnorm, s->inverse_out, s->out, d, m->w.norm, T, 0);
    for (size_t l = m->config.num_hidden_layers; l-- > 0; ) {
        loss.aux += chain_backward(m, s, g, l, batch);
        attention_backward(m, s, g, l, batch->B, batch->n);
    }
    // Embedding rows were copied: their gradients add up, to that of lm_head where the two are
    // tied.
    for (size_t t = 0; t < T; t++) {
        real *row = m->w.embed_tokens->grad + (size_t)batch->tokens[t] * d;
        for (size_t i = 0; i < d; i++) row[i] += g->dx[t * d + i];
    }
    return loss;
}

// ---- [9] AdamW ----------------------------------------------------------------------------------

enum { PIECE = 1 << 14 };       // numbers that a thread takes at a time

// The norm of all n gradients. Partial sums over fixed pieces make it independent of the number of
// threads.
static double gradient_norm(const real *grad, size_t n) {
    enum { PIECES = 256 };
    double total = 0, part[PIECES];
    for (size_t start = 0; start < n; start += (size_t)PIECE * PIECES) {
        const size_t pieces = min_size((n - start + PIECE - 1) / PIECE, PIECES);
        SHARED(pieces * PIECE, for (size_t j = 0; j < pieces; j++) {
            const size_t from = start + j * PIECE, to = min_size(from + PIECE, n);
            part[j] = (double)dot(grad + from, grad + from, to - from);
        })
        for (size_t j = 0; j < pieces; j++) total += part[j];
    }
    return sqrt(total);
}

// The learning rate of a step, counted from 0: warm-up reaches the full one in its last step.
static double learning_rate(const Recipe *r, int64_t step) {
    const double warmup = r->warmup_steps >= 0 ? (double)r->warmup_steps
                                               : ceil(r->warmup_ratio * (double)r->max_steps);
    if ((double)step < warmup) return r->learning_rate * ((double)step + 1) / warmup;
    if (r->lr_scheduler == CONSTANT) return r->learning_rate;
    const double left = (double)r->max_steps - warmup;
    return r->learning_rate * 0.5 *
           (1 + cos(3.14159265358979324 * ((double)step - warmup) / (left > 0 ? left : 1)));
}

// One step of AdamW (arXiv 1711.05101) on all n numbers, moments m and v, gradient g times `clip`;
// step counts from 0:
//     m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2
//     w = w - lr weight_decay w - lr m / (1 - b1^(step+1)) / (sqrt(v / (1 - b2^(step+1))) + eps)
// As in the paper's training, every tensor decays, norms and biases too. It leaves 0 in g, where
// the next step adds up its gradients: g is in the cache here.
static void adamw(real *restrict w, real *restrict m, real *restrict v, real *restrict g, size_t n,
                  const Recipe *r, int64_t step, double clip) {
    const double correction1 = 1 - pow(r->adam_beta1, (double)step + 1);
    const double correction2 = 1 - pow(r->adam_beta2, (double)step + 1);
    const double rate = learning_rate(r, step);
    const real b1 = (real)r->adam_beta1, c1 = (real)(1 - r->adam_beta1),
        b2 = (real)r->adam_beta2, c2 = (real)(1 - r->adam_beta2),
        decay = (real)(1 - rate * r->weight_decay), step_size = (real)(rate / correction1),
        root = (real)(1 / sqrt(correction2)), eps = (real)r->adam_epsilon, scale = (real)clip;
    SHARED(n, for (size_t from = 0; from < n; from += PIECE) {
        for (size_t i = from; i < min_size(from + PIECE, n); i++) {
            const real gi = scale * g[i];
            m[i] = b1 * m[i] + c1 * gi;
            v[i] = b2 * v[i] + c2 * gi * gi;
            w[i] = decay * w[i] - step_size * m[i] / ((real)sqrt(v[i]) * root + eps);
            g[i] = 0;
        }
    })
}

// ---- [10] the training run ----------------------------------------------------------------------

typedef struct {
    Model model;
    Recipe recipe;
    Job job;
    Data data;
    real *grad, *m, *v;         // [model.w.size] each, laid out like the weights; m, v: AdamW's
    State state;
    Gradients g;
    int64_t step;               // steps done
    bool saved;                 // there is a checkpoint of this run
    int *inputs, *targets;      // (batch_size, max_length)
    double val_loss, solved;    // the last ones measured; NAN: none
    double best_val_loss;       // the lowest one; -1: none yet
    int *chosen;                // (L, C, E) tokens that each expert got in the last step
    size_t n_chosen;
} Run;

// What the time went into, in seconds, for --profile. REST is what belongs to a step but to none of
// the others, as reading data does; IDLE lies between steps.
enum Phase { FORWARD, BACKWARD, ADAMW, REST, IDLE, PHASES };
static double phase_seconds[PHASES];

// Counts the time since the last call as spent in phase `spent`.
static void lap(enum Phase spent) {
    static double last;
    const double now = seconds();
    if (last > 0) phase_seconds[spent] += now - last;
    last = now;
}

// Adds to run->chosen how many tokens each expert got in what went through last.
static void count_choices(Run *run) {
    LETTERS(&run->model.config);
    for (size_t l = 0; l < L; l++)
        for (size_t c = 0; is_moe(&run->model.config, l) && c < C; c++) {
            const int *start = run->state.layer[l].iteration[c].start;
            for (size_t e = 0; e < E; e++)
                run->chosen[(l * C + c) * E + e] += start[e + 1] - start[e];
        }
}

// How unevenly iteration c shared out the tokens of the last step: those of the busiest expert over
// the mean of all experts, averaged over the layers. NAN without experts.
static double expert_load(const Run *run, size_t c) {
    LETTERS(&run->model.config);
    double total = 0, layers = 0;
    for (size_t l = 0; l < L; l++) {
        if (!is_moe(&run->model.config, l)) continue;
        const int *chosen = run->chosen + (l * C + c) * E;
        double most = 0, all = 0;
        for (size_t e = 0; e < E; e++) {
            most = chosen[e] > most ? chosen[e] : most;
            all += chosen[e];
        }
        total += most * (double)E / all;
        layers++;
    }
    return layers > 0 ? total / layers : NAN;
}


#include "lib/checkpoint.h"

// Adds the gradient of one batch, the one at run->step, to run->grad, micro-batch after
// micro-batch, and counts its choices of experts. Returns its losses. Micro-batches weigh by their
// number of targets, so that they make the gradient of the whole batch; where there is none, by
// sequences.
static Loss batch_gradient(Run *run) {
    const size_t B = run->recipe.batch_size, n = run->recipe.max_length;
    const size_t at_once = run->state.rows / n;
    Loss loss = { 0, 0 };
    memset(run->chosen, 0, run->n_chosen * sizeof *run->chosen);
    next_batch(&run->data, (uint64_t)run->step, run->inputs, run->targets);
    const size_t all = count_targets(run->targets, B * n);
    lap(REST);
    for (size_t b = 0; b < B; b += at_once) {
        const size_t part = min_size(B - b, at_once);
        const size_t counted = count_targets(run->targets + b * n, part * n);
        const MicroBatch batch = { run->inputs + b * n, run->targets + b * n, part, n,
                                   all ? 1.0 / (double)all : 0,
                                   all ? (double)counted / (double)all : (double)part / (double)B };
        forward(&run->model, &run->state, batch.tokens, part, n, 0, part * n);
        lap(FORWARD);
        const Loss of_part = backward(&run->model, &run->state, &run->g, &batch);
        lap(BACKWARD);
        loss.loss += of_part.loss;
        loss.aux += of_part.aux;
        count_choices(run);
    }
    return loss;
}

// AdamW on all weights but correction biases, which have no gradient and do not decay.
static void update_weights(Run *run, double clip) {
    const Weights *w = &run->model.w;
    const size_t L = run->model.config.num_hidden_layers;
    size_t from = 0;
    for (size_t l = 0; l <= L; l++) {
        const Tensor *bias = l < L ? &w->layer[l].correction_bias : NULL;
        if (bias && !bias->copies) continue;
        const size_t to = bias ? bias->offset : w->size;
        adamw(run->model.weights + from, run->m + from, run->v + from, run->grad + from, to - from,
              &run->recipe, run->step, clip);
        from = bias ? to + tensor_size(bias) : to;
    }
}

// DeepSeek-V3's balancing: after a step the correction bias of each expert goes up by
// bias_update_speed where the expert got fewer tokens than the mean of all, and down where it got
// more. chosen is (L, C, E) and a layer's biases (routers, E): with a router for each iteration, i
// runs through (C, E) itself and c stays 0; a router that all iterations share sums over c.
static void update_biases(Run *run) {
    const Config *config = &run->model.config;
    LETTERS(config);
    const size_t routers = n_gates(config), calls = C / routers;
    const int64_t tokens = (int64_t)(run->recipe.batch_size * run->recipe.max_length * K * calls);
    for (size_t l = 0; l < L; l++) {
        Tensor *bias = &run->model.w.layer[l].correction_bias;
        for (size_t i = 0; i < tensor_size(bias); i++) {
            int64_t count = 0;
            for (size_t c = 0; c < calls; c++)
                count += run->chosen[(l * C + c) * E + i];
            const int64_t missing = tokens - count * (int64_t)E;
            const double up = (double)((missing > 0) - (missing < 0));
            bias->data[i] += (real)(up * run->recipe.bias_update_speed);
        }
    }
}

// One step: gradient of the batch, clipping, AdamW. Returns the losses; *norm is the gradient's
// before clipping. Ends the program where the loss or the norm is not finite.
static Loss train_step(Run *run, double *norm) {
    const Recipe *r = &run->recipe;
    const size_t size = run->model.w.size;
    const Loss loss = batch_gradient(run);
    *norm = gradient_norm(run->grad, size);
    if (!isfinite(loss.loss) || !isfinite(*norm))
        fail(FAILED, "step %lld: the loss is %g and the gradient's norm %g, must be finite; %s%s",
             (long long)run->step, loss.loss, *norm,
             run->saved ? "the last good checkpoint is " : "nothing was saved yet",
             run->saved ? run->job.output : "");
    const bool too_long = r->max_grad_norm > 0 && *norm > r->max_grad_norm;
    const double clip = too_long ? r->max_grad_norm / (*norm + 1e-6) : 1;
    lap(REST);
    update_weights(run, clip);
    update_biases(run);
    lap(ADAMW);
    run->step++;
    return loss;
}

// A line of progress on stderr about a measurement that takes more than two seconds, begun at
// `start`: redrawn on a terminal, and every ten seconds elsewhere. For one thread at a time.
static void show_part(const char *what, size_t done, size_t all, double start) {
    static double shown;
    const bool terminal = stderr_is_terminal();
    const double now = seconds();
    if (now - start < 2 || now - shown < (terminal ? 0.2 : 10)) return;
    shown = now;
    fprintf(stderr, "%s: %zu of %zu%s", what, done, all, terminal ? "  \r" : "\n");
}

#include "lib/samples.h"

// How many validation samples a measurement during the run looks at: a tenth of the samples that
// are trained on between two of them, unless the user has said how many.
static size_t samples_on_the_way(const Run *run) {
    const size_t all = val_samples(&run->data);
    const int64_t between = run->job.eval_steps * (int64_t)run->recipe.batch_size;
    int64_t wanted = run->job.eval_windows;
    if (wanted < 0) wanted = (between + 9) / 10;
    return wanted > 0 ? min_size(all, (size_t)wanted) : all;
}

// The mean cross entropy over the targets of `count` validation samples, evenly spaced among all of
// them, in file order; NAN where there is nothing to predict, or after an interruption.
static double validate(Run *run, size_t count) {
    State *s = &run->state;
    const size_t n = run->recipe.max_length, all = val_samples(&run->data), at_once = s->rows / n;
    int *input = allocate(s->rows * sizeof(int), "validation samples");
    int *target = allocate(s->rows * sizeof(int), "validation samples");
    double total = 0;
    size_t targets = 0;
    const double start = seconds();
    for (size_t i = 0; i < count && !interrupted; i += at_once) {
        show_part("validation", i, count, start);
        const size_t B = min_size(count - i, at_once);
        for (size_t b = 0; b < B; b++) {
            const double place = (double)(i + b) * (double)all / (double)count;
            val_sample(input + b * n, target + b * n, &run->data, (size_t)place);
        }
        forward(&run->model, s, input, B, n, 0, B * n);
        total += loss_of(&run->model, s, &run->g, target, B * n, 1, false);
        targets += count_targets(target, B * n);
    }
    release(input);
    release(target);
    return targets && !interrupted ? total / (double)targets : NAN;
}

// Validates, and solves held-out problems: on the way with some validation samples and a quarter of
// the problems, at the end with all. The results go to run->val_loss, run->solved and stderr. The
// best weights so far, which go to --best, are always found with the same samples.
static void measure(Run *run, bool last) {
    const size_t some = samples_on_the_way(run), all = val_samples(&run->data);
    size_t problems = run->job.eval_problems;
    if (!last) problems = (problems + 3) / 4;
    run->val_loss = validate(run, some);
    keep_best(run);
    if (last && some < all) run->val_loss = validate(run, all);
    run->solved = solve(run, problems);
    if (interrupted) run->val_loss = run->solved = NAN;
    if (isnan(run->val_loss) && isnan(run->solved)) return;
    fprintf(stderr, "step %lld: val_loss %.4f", (long long)run->step, run->val_loss);
    if (!isnan(run->solved))
        fprintf(stderr, ", solved %.1f %% of %zu held-out problems", 100 * run->solved, problems);
    fputc('\n', stderr);
}

// One line of progress on stderr: redrawn on a terminal, and every few seconds elsewhere. `last`:
// in any case, for something else is printed next.
static void show_progress(const Run *run, double loss, double rate, double tokens_per_s,
                          bool last) {
    static double shown;
    const int terminal = stderr_is_terminal();
    const double now = seconds();
    if (!last && now - shown < (terminal ? 0.1 : 5)) return;
    shown = now;
    const double tokens = (double)(run->recipe.batch_size * run->recipe.max_length);
    const double left = (double)(run->recipe.max_steps - run->step) * tokens / tokens_per_s;
    fprintf(stderr, "%sstep %lld/%lld  loss %.4f  lr %.2e  %.0f tok/s  %.0f s left%s",
            terminal ? "\r" : "", (long long)run->step, (long long)run->recipe.max_steps,
            loss, rate, tokens_per_s, left, terminal && !last ? "  " : "\n");
}

// What --profile prints, on stderr: seconds a step and share of each phase, over `steps` steps.
static void print_profile(int64_t steps) {
    static const char *const names[] = { "forward", "backward", "AdamW", "rest", "all" };
    double all = 0;
    for (int i = 0; i < IDLE; i++) all += phase_seconds[i];
    fprintf(stderr, "profile of %lld step%s %10s %7s\n", (long long)steps, steps == 1 ? "" : "s",
            "s a step", "%");
    for (int i = 0; i <= IDLE; i++) {
        const double s = i < IDLE ? phase_seconds[i] : all;
        fprintf(stderr, "%-20s %10.6f %7.2f\n", names[i], s / (double)steps, 100 * s / all);
    }
}

// Whether something that is done every `period` steps and at the end is due after step s, from 0.
static bool due(int64_t period, int64_t s, int64_t last) {
    return s == last || (period && (s + 1) % period == 0);
}

// Trains from run->step to max_steps, with reports and checkpoints on the way. Returns the exit
// code.
static int train(Run *run) {
    const Recipe *r = &run->recipe;
    const Job *job = &run->job;
    FILE *log = *job->log ? open_log(job->log, run->step, run->model.config.inner_iter) : NULL;
    const int64_t first = run->step, last = r->max_steps - 1;
    int64_t profiled = 0;
    while (run->step < r->max_steps && !interrupted) {
        const int64_t s = run->step;
        const double start = seconds(), rate = learning_rate(r, s);
        double norm;
        // The first step also gets memory, so that it does not count, unless it is the only one.
        if (s == first + 1) memset(phase_seconds, 0, sizeof phase_seconds), profiled = 0;
        lap(IDLE);
        const Loss loss = train_step(run, &norm);
        profiled++;
        const double tokens_per_s = (double)(r->batch_size * r->max_length) / (seconds() - start);
        const bool measured = due(job->eval_steps, s, last);
        show_progress(run, loss.loss, rate, tokens_per_s, measured);
        if (measured) measure(run, s == last);
        if (due(job->sample_steps, s, last)) show_sample(run);
        if (log) {
            const double columns[] = { loss.loss, loss.aux, norm, rate, tokens_per_s,
                                       measured ? run->val_loss : NAN,
                                       measured ? run->solved : NAN };
            log_step(log, run, s, columns, sizeof columns / sizeof *columns);
        }
        if (due(job->save_steps, s, last) || interrupted) save_checkpoint(run);
    }
    if (job->profile && profiled) print_profile(profiled);
    if (log && fclose(log)) fail(FAILED, "%s: cannot be written: %s", job->log, strerror(errno));
    if (run->step < r->max_steps || (interrupted && isnan(run->val_loss))) {
        fprintf(stderr, "train: interrupted after step %lld; ./train --resume %s%s%s goes on\n",
                (long long)run->step, job->output, *job->data ? " -d " : "", job->data);
        return INTERRUPTED;
    }
    if (first >= r->max_steps) {                        // it was finished already
        if (*job->resume)
            fprintf(stderr, "train: %s has %lld steps behind it, --max_steps is %lld: none left\n",
                    job->resume, (long long)first, (long long)r->max_steps);
        measure(run, true);
    }
    char text[DECIMAL_TEXT];
    if (run->data.val_targets && !isfinite(run->val_loss))
        fail(FAILED, "step %lld: val_loss is %g, must be finite", (long long)run->step,
             run->val_loss);
    if (!isnan(run->val_loss)) printf("val_loss %s\n", decimal(text, run->val_loss));
    if (!isnan(run->solved)) printf("solved %s\n", decimal(text, run->solved));
    flush_stdout();
    return 0;
}

#include "lib/setup.h"

// Options, then either a list (--help), documents to look at, or training.
int main(int argc, char **argv) {
    static Run run = { .val_loss = NAN, .solved = NAN, .best_val_loss = -1 };
    Progress resumed = { 0 };
    program = "train";
    occupy_standard_files();
    if (!prepare(&run, &resumed, argc, argv)) return 0;
    print_model(&run.model);
    make_room(&run, &resumed);
    claim_outputs(&run);
    on_interrupt_say = "train: finishes the step and saves; once more stops it at once\n";
    catch_interrupts(false);
    return train(&run);
}
