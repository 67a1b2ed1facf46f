// coe.c - Chain-of-Experts transformers in plain C: the whole forward pass, and the sampler.
//
// A Chain-of-Experts layer (arXiv 2506.18945) applies its mixture of experts C times in a row: the
// same experts each time, but with a router for each time, so that experts can build on each
// other's output. A layer makes of the stream x, with what stands in brackets where the config says
// so:
//
//     mid     = x + attention(rmsnorm(x))             DeepSeek-V2's latent attention            [6]
//     y_0     = rmsnorm(mid)
//     y_(c+1) = [y_c +] shared(y_c) + sum over the K chosen experts of weight_k expert_k(y_c)   [5]
//     x       = y_C [+ mid]                           [inner_residual] and [outer_residual]
//            or mid + (y_C - y_0)                     with prenorm_chain
//
// The released models have the inner residual and not the outer one. So a layer puts out
// rmsnorm(mid) plus what its experts added, and mid itself is not added back: it looks like a
// mistake and is the model. (Upcycled models weight the sum instead, see enum Residual.) A layer
// without experts has one feed-forward, and is a chain of length 1.
//
// To read it, take [2] for what a model consists of, then [7], [5] and [6] for what it computes.
// tests/reference.py is this model in plain PyTorch, with the names that it has here.
//
//   [1] config           [4] operations                [7] forward
//   [2] tensors          [5] the chain of experts      [8] sampler
//   [3] activations      [6] attention
//
// train.c and run.c each include this file: one program is one translation unit. What is not about
// the architecture lives in lib/: threads, fast kernels, files, tokenizers.
//
// The alphabet. Sizes of a model: V vocab_size, d hidden_size, L num_hidden_layers, H
// num_attention_heads, dn / dr / dv the widths qk_nope_head_dim, qk_rope_head_dim and v_head_dim of
// a head, r q_lora_rank, R kv_lora_rank, E n_routed_experts, K num_experts_per_tok, S
// n_shared_experts, f moe_intermediate_size, I intermediate_size, C inner_iter. Sizes of the work:
// B sequences of n tokens, T = B n tokens in all. What is counted: token t, sequence b, position p,
// layer l, iteration c, expert e, choice k, head h, channel i.
//
// Conventions. Matrices are row-major; a weight is (out, in) as in PyTorch, so that a layer
// computes x w^T. Activations are (rows, width) where a row is one token, and only attention knows
// which rows belong to one sequence. "At stride s" means that rows start s numbers apart. Outputs
// come first in an argument list. "kept:" at the end of a comment says what the backward pass will
// want back. A number is a `real`: float, or double where gradients are checked. SHARED(work, for
// ...) is that loop, and TASKS(work, i, n, { ... }) is the block for every i < n. Both can be read
// as plain loops: they use all threads where so many operations repay it. WIDE marks functions that
// take time. m is a Model, s a State, a a LayerState, it an Iteration, w weights.
#ifndef COE_C
#define COE_C
#include "lib/base.h"
#include "lib/generation.h"

// ---- [1] config ---------------------------------------------------------------------------------
// The keys of config.json under their own names, those of its rope_scaling as rope_scaling_type and
// so on. lib/config.h has the range and the default of each. A size that config.json calls null is
// 0 here.

enum { SOFTMAX, SIGMOID };                          // scoring_func
enum { GREEDY, GROUP_LIMITED_GREEDY, NOAUX_TC };    // topk_method
enum { NO_SCALING, LINEAR, YARN };                  // rope_scaling.type
enum { FLOAT32, BFLOAT16 };                         // torch_dtype

typedef struct {
    size_t vocab_size;              // V  tokens in the vocabulary
    size_t hidden_size;             // d  width of the stream
    size_t intermediate_size;       // I  width of a dense layer's feed-forward
    size_t moe_intermediate_size;   // f  width of an expert
    size_t num_hidden_layers;       // L
    size_t num_attention_heads;     // H
    size_t n_shared_experts;        // S  experts that every token visits
    size_t n_routed_experts;        // E  experts to choose from; 0: all layers are dense
    size_t num_experts_per_tok;     // K  experts chosen per token and iteration
    size_t kv_lora_rank;            // R  width of the latent that keys and values come from
    size_t q_lora_rank;             // r  width of the query's latent; 0: there is none
    size_t qk_nope_head_dim;        // dn width of a head's key without position
    size_t qk_rope_head_dim;        // dr width of the key with RoPE, even
    size_t v_head_dim;              // dv width of a head's value
    size_t inner_iter;              // C  iterations of the chain
    bool inner_residual;            // y is added to what the experts make of it, in every iteration
    bool outer_residual;            // the stream after attention is added to the chain's end
    bool prenorm_chain;             // what the chain adds to its y goes to the stream
    bool use_igate;                 // a router for each iteration, instead of one for all
    int scoring_func;               // what makes scores of a router's outputs
    int topk_method;                // GREEDY: the K best; the others: of the best groups
    size_t n_group;                 // into how many groups of neighbours the experts are divided
    size_t topk_group;              // how many of them a token may choose from
    bool norm_topk_prob;            // the weights of the K chosen sum to 1
    double routed_scaling_factor;   // times this, where they are not normalised; SIGMOID: always
    size_t first_k_dense_replace;   // layers before this one are dense
    size_t moe_layer_freq;          // from there on, layers l with l % this = 0 have experts
    double aux_loss_alpha;          // weight of the load-balancing loss, in training
    bool seq_aux;                   // it balances each sequence, instead of a micro-batch
    double rms_norm_eps;            // epsilon of all norms but those of latents
    double rope_theta;              // base of the rotation frequencies
    int rope_scaling_type;          // how rotations are stretched for long contexts
    double rope_scaling_factor;
    size_t rope_scaling_original;   // YARN: context before stretching
    double rope_scaling_beta_fast;  // YARN: turns above which a frequency is kept
    double rope_scaling_beta_slow;  // YARN: turns below which it is stretched fully
    double rope_scaling_mscale;     // YARN: temperature on cos and sin, see rope_table()
    double rope_scaling_mscale_all; // temperature on the scores, see attention_scale()
    size_t max_position_embeddings; // longest context in tokens
    bool attention_bias;            // biases in the q_a, kv_a and o projections
    bool tie_word_embeddings;       // lm_head is embed_tokens
    double initializer_range;       // standard deviation of fresh weights
    int torch_dtype;                // of the checkpoint that export.py read or will write
    GenerationConfig generation;    // what concerns texts rather than weights: lib/generation.h
} Config;

// LETTERS(config) declares the sizes of a model as local constants, under their letters. K is 0 in
// a model without experts.
#define LETTERS(config) \
    const size_t V = (config)->vocab_size, d = (config)->hidden_size, \
        L = (config)->num_hidden_layers, H = (config)->num_attention_heads, \
        dn = (config)->qk_nope_head_dim, dr = (config)->qk_rope_head_dim, \
        dv = (config)->v_head_dim, r = (config)->q_lora_rank, R = (config)->kv_lora_rank, \
        E = (config)->n_routed_experts, K = E ? (config)->num_experts_per_tok : 0, \
        S = (config)->n_shared_experts, f = (config)->moe_intermediate_size, \
        I = (config)->intermediate_size, C = (config)->inner_iter; \
    (void)V, (void)d, (void)L, (void)H, (void)dn, (void)dr, (void)dv, (void)r, (void)R, (void)E, \
    (void)K, (void)S, (void)f, (void)I, (void)C

// Whether layer l has experts; else it has one dense feed-forward of width I.
static int is_moe(const Config *config, size_t l) {
    return config->n_routed_experts > 0 && l >= config->first_k_dense_replace &&
           l % config->moe_layer_freq == 0;
}

// The iterations of layer l: a dense layer is a chain of length 1.
static size_t iterations(const Config *config, size_t l) {
    return is_moe(config, l) ? config->inner_iter : 1;
}

// How many routers a layer has, and which of them iteration c asks.
static size_t n_gates(const Config *config) { return config->use_igate ? config->inner_iter : 1; }
static size_t gate_of(const Config *config, size_t c) { return config->use_igate ? c : 0; }

// ---- [2] tensors --------------------------------------------------------------------------------
// This table is the one place that names the tensors of a layer: loading, saving, initialising,
// the gradients, AdamW and `run -m info` all walk it. A row reads: field, name in a checkpoint,
// copies, rows, columns, initial values. Copies are matrices of one shape, stored one behind the
// other: the experts of a layer, or its routers; a %d in the name counts them. A tensor that a
// model does not have has 0 copies, so that optional parts need no second list. (gate_name,
// bias_name, gates, biased, moe, corrected and upcycled are locals of weights_layout() in
// lib/memory.h.) "gate" is a router, as in DeepSeek's names; gate_proj is a part of a
// feed-forward.
//
// Norms, routers, biases and chain weights (GATE, ONES, ZEROS) are float32 in every file; NORMAL
// are the matrices that a file may hold in a narrower type. The chain weights, coe_weights, are
// those of an upcycled model: a DeepSeek-V2 that was made into a chain, see chain_forward().

// Normal with deviation initializer_range; uniform in (-1/sqrt d, 1/sqrt d); all 1; all 0.
enum Init { NORMAL, GATE, ONES, ZEROS };

#define LAYER_TENSORS(X) \
    /* attention */                                                                                \
    X(input_layernorm, "input_layernorm.weight",                 1,             1,      d, ONES)   \
    X(q_proj,          "self_attn.q_proj.weight",               !r, H * (dn + dr),      d, NORMAL) \
    X(q_a_proj,        "self_attn.q_a_proj.weight",            !!r,             r,      d, NORMAL) \
    X(q_a_bias,        "self_attn.q_a_proj.bias",      r && biased,             1,      r, ZEROS)  \
    X(q_a_layernorm,   "self_attn.q_a_layernorm.weight",       !!r,             1,      r, ONES)   \
    X(q_b_proj,        "self_attn.q_b_proj.weight",            !!r, H * (dn + dr),      r, NORMAL) \
    X(kv_a_proj,       "self_attn.kv_a_proj_with_mqa.weight",    1,        R + dr,      d, NORMAL) \
    X(kv_a_bias,       "self_attn.kv_a_proj_with_mqa.bias", biased,             1, R + dr, ZEROS)  \
    X(kv_a_layernorm,  "self_attn.kv_a_layernorm.weight",        1,             1,      R, ONES)   \
    X(kv_b_proj,       "self_attn.kv_b_proj.weight",             1, H * (dn + dv),      R, NORMAL) \
    X(o_proj,          "self_attn.o_proj.weight",                1,             d, H * dv, NORMAL) \
    X(o_bias,          "self_attn.o_proj.bias",             biased,             1,      d, ZEROS)  \
    X(post_attention_layernorm, "post_attention_layernorm.weight", 1,           1,      d, ONES)   \
    /* experts, or a dense feed-forward */                                                         \
    X(gate,              gate_name,                       moe ? gates : 0,      E,      d, GATE)   \
    X(experts_gate_proj, "mlp.experts.%d.gate_proj.weight",  moe ? E : 0,       f,      d, NORMAL) \
    X(experts_up_proj,   "mlp.experts.%d.up_proj.weight",    moe ? E : 0,       f,      d, NORMAL) \
    X(experts_down_proj, "mlp.experts.%d.down_proj.weight",  moe ? E : 0,       d,      f, NORMAL) \
    X(shared_gate_proj,  "mlp.shared_experts.gate_proj.weight", moe && S,   f * S,      d, NORMAL) \
    X(shared_up_proj,    "mlp.shared_experts.up_proj.weight",   moe && S,   f * S,      d, NORMAL) \
    X(shared_down_proj,  "mlp.shared_experts.down_proj.weight", moe && S,       d,  f * S, NORMAL) \
    X(coe_weights,       "mlp.coe_weights.%d",  moe && upcycled ? C - 1 : 0,    1,      d, ZEROS)  \
    X(dense_gate_proj,   "mlp.gate_proj.weight",                    !moe,       I,      d, NORMAL) \
    X(dense_up_proj,     "mlp.up_proj.weight",                      !moe,       I,      d, NORMAL) \
    X(dense_down_proj,   "mlp.down_proj.weight",                    !moe,       d,      I, NORMAL) \
    X(correction_bias,   bias_name,    moe && corrected ? gates : 0,    1,      E, ZEROS)

// The types of the matrices in a file; lib/matrix.h says what they are.
enum Type { F32, BF16, Q8 };

typedef struct {
    const char *name;           // without "model.layers.l."
    size_t copies, rows, cols;
    enum Init init;
    enum Type type;
    size_t offset;              // in floats from the start of the weights, a multiple of 16
    real *data;                 // (copies, rows, cols); of another type than F32, see matrix()
    real *grad;                 // (copies, rows, cols) gradient of the loss, in training; else NULL
} Tensor;

typedef struct {                // only Tensors: a layer is also an array of LAYER_TENSOR_COUNT
#define X(field, ...) Tensor field;
    LAYER_TENSORS(X)
#undef X
} Layer;
enum { LAYER_TENSOR_COUNT = sizeof(Layer) / sizeof(Tensor) };

typedef struct {                // the tensors of a model, as one array in file order and by name
    Tensor *tensor;             // embed_tokens, the layers, norm, lm_head
    size_t n_tensors;
    Tensor *embed_tokens;       // (V, d)
    Layer *layer;               // [L]
    Tensor *norm;               // (d)
    Tensor *lm_head;            // (V, d); is embed_tokens where the two are tied
    size_t size;                // in floats, the gaps included
} Weights;

typedef struct Tokenizer Tokenizer;     // lib/tokenizer.h

typedef struct {
    Config config;
    bool upcycled;              // it has coe_weights
    Tokenizer *tokenizer;       // NULL: none
    Weights w;
    real *weights;              // [w.size] the memory of all tensors
    char *files;                // the embedded files and the tokenizer's tables, as in the file
    size_t files_bytes;         // without the tables
    void *map;                  // the mapped file, or NULL where weights are allocated
    size_t map_bytes;
} Model;

// Where copy e of a tensor starts, and its gradient.
static real *data_of(const Tensor *t, size_t e) { return t->data + e * t->rows * t->cols; }
static real *grad_of(const Tensor *t, size_t e) { return t->grad + e * t->rows * t->cols; }

#include "lib/matrix.h"

// ---- [3] activations ----------------------------------------------------------------------------
// What forward writes. A row of a table reads: type, field, rows, columns; lib/memory.h allocates
// these shapes, and defines W, threads, score_rows and latent_rows.
//
// Training keeps the activations of every layer and iteration for the backward pass. Generating
// keeps only the latents and the choices. For the rest it has one x, one mid, one y and one ffn:
// layer l + 1's x is layer l's x, y_(c+1) is y_c, and `out` is that x too.
//
// Inside a row the heads lie one behind the other, each with these parts:
//     q:       q_nope (dn), q_rope (dr)        rows of kv_b_proj:   W_k (dn), W_v (dv)
//     kv:      k_nope (dn), v (dv)             kv_a, latent (no heads): latent (R), k_rope (dr)
//
// Rows "grouped by expert": choice k of token t is row slot[t, k]; the rows from start[e] up to
// start[e + 1] belong to expert e; and token[row] is the way back. With three experts, K = 1 and
// the choices 2 0 2 1, start is 0 1 2 4, slot is 2 0 3 1 and token is 1 3 0 2.

#define ITERATION(X)        /* one iteration of the chain in one layer */                          \
    X(real, y,        T,     d)     /* its input y_c                                            */ \
    X(real, score,    T,     E)     /* the router's softmax                                     */ \
    X(int,  slot,     T,     K)     /* the grouped row of each choice                           */ \
    X(int,  start,    E + 1, 1)     /* the first grouped row of each expert                     */ \
    X(int,  token,    T * K, 1)     /* the token of each grouped row                            */ \
    X(real, g,        T * K, f)     /* gate projections of the experts, grouped by expert       */ \
    X(real, u,        T * K, f)     /* up projections of the experts, grouped by expert         */ \
    X(real, shared_g, T,     W)     /* the same of the shared experts, where W is f S, or of a  */ \
    X(real, shared_u, T,     W)     /* dense layer's feed-forward, where W is I                 */
#define CHOICES(X)          /* of one iteration; every one has its own, for run --trace */         \
    X(int,  expert,   T,     K)     /* the chosen experts, largest weight first                 */ \
    X(real, weight,   T,     K)     /* their weights                                            */

typedef struct {
#define X(type, field, rows, cols) type *field;
    ITERATION(X)
    CHOICES(X)
#undef X
    real *ffn;              // (T, d)  its output; one for all iterations unless KEEP_FFN
} Iteration;

#define LAYER_STATE(X)      /* one layer */                                                        \
    X(real, x,           T, d)              /* its input                                        */ \
    X(real, inverse_x,   T, 1)              /* 1 / rms of x                                     */ \
    X(real, q_a,         T, r)              /* the query's latent, where there is one           */ \
    X(real, inverse_q,   T, 1)              /* 1 / rms of q_a                                   */ \
    X(real, q,           T, H * (dn + dr))  /* queries, rotated                                 */ \
    X(real, kv_a,        T, R + dr)         /* latent before its norm, key before its rotation  */ \
    X(real, inverse_kv,  T, 1)              /* 1 / rms of the latent                            */ \
    X(real, kv,          T, H * (dn + dv))  /* keys and values, expanded from the latents       */ \
    X(real, log_sum,     T, H)              /* log-sum-exp of each query's scores               */ \
    X(real, heads,       T, H * dv)         /* output of the heads, before o_proj               */ \
    X(real, mid,         T, d)              /* the stream after attention                       */ \
    X(real, inverse_mid, T, 1)              /* 1 / rms of mid                                   */

typedef struct {
#define X(type, field, rows, cols) type *field;
    LAYER_STATE(X)
#undef X
    real *latent;           // (positions, R + dr)  normed latent and rotated key of every token so
                            // far, all that is cached; positions: T in training, else `context`
    Iteration *iteration;   // [C]
} LayerState;

#define STATE(X)            /* the rest, once for the whole model */                               \
    X(real, inverse_out, T,       1)            /* 1 / rms of out                               */ \
    X(real, final,       T,       d)            /* after the final norm                         */ \
    X(real, cos,         context, dr / 2)       /* of the rotations                             */ \
    X(real, sin,         context, dr / 2)                                                          \
    X(real, norm,        T,       max_size(d, r))   /* a normed input, while it is needed       */ \
    X(real, gathered,    T * K,   d)            /* inputs of the experts, grouped               */ \
    X(real, returned,    T * K,   d)            /* their outputs                                */ \
    X(real, act,         T,       max_size(K * f + W, d))   /* silu(g) u of all experts; and    */ \
                                                            /* scratch of experts_of_one()      */ \
    X(real, left,        T,       E)            /* scores that are left, in choose()            */ \
    X(real, scores,      threads, score_rows * context)     /* of attention                     */ \
    X(real, absorbed,    threads, latent_rows * (2 * R + dr))   /* of attend_latent()           */

// What is kept for the backward pass: nothing when generating; else what it needs; and to train the
// coe_weights of an upcycled model also every ffn(y), which they are multiplied with.
enum Keep { KEEP_NOTHING, KEEP, KEEP_FFN };

typedef struct {
    size_t rows, context;   // the most T at once, and the most positions of a sequence
    enum Keep keep;
    LayerState *layer;      // [L]
    Iteration *iterations;  // [L C]
    real *out;              // (T, d)  the last layer's output
    struct Edits *edits;    // lib/edits.h: parts to leave out or change, for run; NULL: none
#define X(type, field, rows, cols) type *field;
    STATE(X)
#undef X
    char *memory;
    size_t memory_bytes;
} State;

// ---- [4] operations -----------------------------------------------------------------------------
// All products, sums of products and exponentials of the model and of its gradient go through these
// few operations. Printed here are plain loops, which say what an operation is; `make plain` builds
// programs that compute with them, to be stepped through or compared with. Otherwise lib/kernels.h
// has the same functions, written for speed: they are some fifty times as fast, and add up in
// another order.
//
// A Matrix (lib/matrix.h) is something to be read: view(x, rows, cols, ld) is memory seen as one,
// its rows ld numbers apart; matrix(w, e) is copy e of a tensor; slice(m, first, rows) is some rows
// of one; row_of(m, row) is a row as numbers, whatever their type in the file. The letters behind
// matmul_ say of each factor whether it is taken as it is (n) or transposed (t).

#ifdef PLAIN

// e^x
static real real_exp(real x) { return (real)exp((double)x); }

// 1 / (1 + e^-x)
static real sigmoid(real x) { return 1 / (1 + real_exp(-x)); }

// sum_i x_i y_i
static real dot(const real *x, const real *y, size_t n) {
    real sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// sum_i x_i y_i z_i
static real dot3(const real *x, const real *y, const real *z, size_t n) {
    real sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * y[i] * z[i];
    return sum;
}

// x_i = e^(scale x_i) / sum_j e^(scale x_j), in place; x (n). *log_sum, if wanted, is the logarithm
// of that sum. The largest x is subtracted first, which changes nothing but keeps e^x finite.
static void softmax(real *x, size_t n, real scale, real *log_sum) {
    real max = x[0], sum = 0;
    for (size_t i = 1; i < n; i++) max = x[i] > max ? x[i] : max;
    for (size_t i = 0; i < n; i++) x[i] = real_exp(scale * (x[i] - max));
    for (size_t i = 0; i < n; i++) sum += x[i];
    for (size_t i = 0; i < n; i++) x[i] /= sum;
    if (log_sum) *log_sum = scale * max + (real)log((double)sum);
}

// y (n, out) = x (n, in) w (out, in)^T, or += with `add`; y at stride ldy
static void matmul_nt(real *y, size_t ldy, Matrix x, Matrix w, int add) {
    for (size_t o = 0; o < w.rows; o++) {
        const real *wo = row_of(w, o);
        for (size_t t = 0; t < x.rows; t++)
            y[t * ldy + o] = (add ? y[t * ldy + o] : 0) + dot(row_of(x, t), wo, w.cols);
    }
}

// x (n, in) = y (n, out) w (out, in), or += with `add`; x at stride ldx
static void matmul_nn(real *x, size_t ldx, Matrix y, Matrix w, int add) {
    for (size_t o = 0; o < w.rows; o++) {
        const real *wo = row_of(w, o);
        for (size_t t = 0; t < y.rows; t++)
            for (size_t i = 0; i < w.cols; i++)
                x[t * ldx + i] = (add || o ? x[t * ldx + i] : 0) + row_of(y, t)[o] * wo[i];
    }
}

// w (out, in) = y (n, out)^T x (n, in), or += with `add`; w at stride ldw
static void matmul_tn(real *w, size_t ldw, Matrix y, Matrix x, int add) {
    for (size_t t = 0; t < y.rows; t++) {
        const real *yt = row_of(y, t), *xt = row_of(x, t);
        for (size_t o = 0; o < y.cols; o++)
            for (size_t i = 0; i < x.cols; i++)
                w[o * ldw + i] = (add || t ? w[o * ldw + i] : 0) + yt[o] * xt[i];
    }
}
#else
#include "lib/kernels.h"
#endif

// y_i = w_i x_i / rms(x),   rms(x) = (mean_i x_i^2 + eps)^(1/2)
// PyTorch: y = w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
// x and y (n, d) at stride ld, w (d).  kept: inverse (n) = 1 / rms(x), unless NULL
static void rmsnorm(real *y, real *inverse, const real *x, size_t ld, const Tensor *w, size_t n,
                    double eps) {
    const size_t d = w->cols;
    SHARED(n * d, for (size_t t = 0; t < n; t++) {
        const real *xt = x + t * ld;
        const real scale = 1 / (real)sqrt(dot(xt, xt, d) / (real)d + (real)eps);
        for (size_t i = 0; i < d; i++) y[t * ld + i] = w->data[i] * (xt[i] * scale);
        if (inverse) inverse[t] = scale;
    })
}

// y = x w^T + bias
// PyTorch: y = F.linear(x, w, bias)
// x (n, columns of w), y (n, rows of w); w is copy e of a tensor. A bias that is NULL, or a tensor
// that the model does not have, is none.
static void linear(real *y, const real *x, const Tensor *w, size_t e, const Tensor *bias,
                   size_t n) {
    matmul_nt(y, w->rows, view(x, n, w->cols, w->cols), matrix(w, e), 0);
    if (bias && bias->data)
        for (size_t t = 0; t < n; t++)
            for (size_t i = 0; i < w->rows; i++) y[t * w->rows + i] += bias->data[i];
}

// ---- [5] the chain of experts -------------------------------------------------------------------
// Iteration c of a layer, for every token's y:
//
//     score    = softmax(gate_c y)                   (E)  by the router of this iteration
//     chosen   = the K largest scores
//     weight_k = score_k / sum of the chosen scores       with norm_topk_prob and K > 1, else
//              = score_k * routed_scaling_factor
//
// or as in DeepSeek-V3 (arXiv 2412.19437, equations 12 to 16), where training raises the bias of
// experts that get too few tokens,
//
//     score    = sigmoid(gate_c y)                        the K largest score + correction_bias
//     weight_k = score_k [/ sum of the chosen scores] * routed_scaling_factor
//
//     ffn(y)   = shared(y) + sum over k of weight_k expert_k(y)
//     expert(y) = down_proj (silu(gate_proj y) * up_proj y),     silu(z) = z / (1 + e^-z)
//
// No token is dropped and no expert has a capacity. Tokens are grouped by expert, so that an
// expert's weights are read once for all tokens that chose it.

#include "lib/edits.h"

// One feed-forward: copy e of three tensors, (f, d), (f, d) and (d, f).
typedef struct { Tensor *gate_proj, *up_proj, *down_proj; size_t e; } Mlp;

// Expert e of a layer.
static Mlp expert(Layer *w, size_t e) {
    return (Mlp){ &w->experts_gate_proj, &w->experts_up_proj, &w->experts_down_proj, e };
}

// The feed-forward that every token visits: the shared experts of a layer as one of width f S, or
// that of a dense layer.
static Mlp shared_mlp(Layer *w, int moe) {
    if (!moe) return (Mlp){ &w->dense_gate_proj, &w->dense_up_proj, &w->dense_down_proj, 0 };
    return (Mlp){ &w->shared_gate_proj, &w->shared_up_proj, &w->shared_down_proj, 0 };
}

// The activations of n rows inside one feed-forward. The backward pass has a second one of these,
// of their gradients.
typedef struct {
    size_t n;
    real *x;            // (n, d)  input
    real *g, *u;        // (n, f)  gate_proj x and up_proj x
    real *act;          // (n, f)  silu(g) * u
    real *out;          // (n, d)  down_proj act
    real *weight;       // (n)     backward only: the routing weights of the rows; NULL: all 1
} MlpRows;

// act_i = silu(g_i) u_i, for n numbers
// PyTorch: act = F.silu(g) * u
WIDE static void swiglu(real *act, const real *g, const real *u, size_t n) {
    for (size_t i = 0; i < n; i++) act[i] = g[i] * sigmoid(g[i]) * u[i];
}

// out = down_proj (silu(gate_proj x) * up_proj x)
// PyTorch: out = down_proj(F.silu(gate_proj(x)) * up_proj(x))            kept: g, u
static void feed_forward(Mlp w, MlpRows p) {
    const size_t f = w.gate_proj->rows;
    linear(p.g, p.x, w.gate_proj, w.e, NULL, p.n);
    linear(p.u, p.x, w.up_proj, w.e, NULL, p.n);
    SHARED(p.n * f, for (size_t t = 0; t < p.n; t++) {
        swiglu(p.act + t * f, p.g + t * f, p.u + t * f, f);
    })
    linear(p.out, p.act, w.down_proj, w.e, NULL, p.n);
}

// What a group of n experts is worth, of which x (n) is left to choose from: its best, or `two`.
static real group_worth(const real *x, size_t n, bool two) {
    const size_t best = argmax(x, n);
    real second = two ? -INFINITY : 0;
    for (size_t i = 0; two && i < n; i++) if (i != best && x[i] > second) second = x[i];
    return x[best] + second;
}

// Whether the weights of the chosen experts of a token are divided by their sum.
static bool normalises(const Config *c) {
    return c->norm_topk_prob && (c->num_experts_per_tok > 1 || c->scoring_func == SIGMOID);
}
// What the weights of the chosen are multiplied by: DeepSeek-V2 scales only what it did not divide.
static real weight_factor(const Config *c) {
    return c->scoring_func == SOFTMAX && normalises(c) ? 1 : (real)c->routed_scaling_factor;
}

// The K experts of one token and their weights (K), in the order of these, given its scores s (E).
// bias (E), or NULL: the choice goes by s + bias, the weight by s. Group-limited: only experts in
// the topk_group groups that are worth most count; the others' scores are taken as 0 or, with
// NOAUX_TC, as -infinity. left (E) is scratch: what is left, -infinity where it was taken.
// PyTorch: weight, expert = s.topk(K);   weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
static void choose(int *expert, real *weight, real *left, const real *s, const real *bias,
                   const Config *config) {
    const size_t E = config->n_routed_experts, K = config->num_experts_per_tok;
    const bool v3 = config->topk_method == NOAUX_TC;
    for (size_t e = 0; e < E; e++) left[e] = s[e] + (bias ? bias[e] : 0);
    if (config->topk_method != GREEDY) {
        const size_t size = E / config->n_group;
        for (size_t j = 0; j < config->topk_group; j++) {           // mark the best group left
            size_t best = 0;
            for (size_t e = size; e < E; e += size)
                if (group_worth(left + e, size, v3) > group_worth(left + best, size, v3)) best = e;
            for (size_t e = best; e < best + size; e++) left[e] = -INFINITY;
        }
        // Those that are marked are allowed, and get their scores back.
        for (size_t e = 0; e < E; e++)
            left[e] = left[e] == -INFINITY ? s[e] + (bias ? bias[e] : 0) : v3 ? -INFINITY : 0;
    }
    real total = (real)1e-20;
    for (size_t k = 0; k < K; k++) {
        const size_t best = argmax(left, E);
        const real w = bias ? s[best] : left[best];
        size_t rank = k;        // a bias may have put an expert of smaller weight in front
        for (; rank > 0 && weight[rank - 1] < w; rank--)
            weight[rank] = weight[rank - 1], expert[rank] = expert[rank - 1];
        expert[rank] = (int)best;
        weight[rank] = w;
        total += w;
        left[best] = -INFINITY;
    }
    const real factor = weight_factor(config) / (normalises(config) ? total : 1);
    for (size_t k = 0; k < K; k++) weight[k] *= factor;
}

// Makes scores (E) of what a router's matrix makes of one token, in place.
static void make_scores(real *s, const Config *config) {
    const size_t E = config->n_routed_experts;
    if (config->scoring_func == SOFTMAX) softmax(s, E, 1, NULL);
    else for (size_t e = 0; e < E; e++) s[e] = sigmoid(s[e]);
}

// The correction bias (E) of a router; NULL where the model has none.
static const real *bias_of(const Layer *w, size_t gate) {
    return w->correction_bias.copies ? data_of(&w->correction_bias, gate) : NULL;
}

// Groups the choices of T tokens by expert, with a counting sort: fills it->start, it->slot and
// it->token.
static void group_by_expert(Iteration *it, size_t T, size_t E, size_t K) {
    memset(it->start, 0, (E + 1) * sizeof(int));
    for (size_t j = 0; j < T * K; j++) it->start[it->expert[j] + 1]++;
    for (size_t e = 0; e < E; e++) it->start[e + 1] += it->start[e];
    for (size_t j = 0; j < T * K; j++) {        // start[e] runs to the end of group e ...
        const int row = it->start[it->expert[j]]++;
        it->slot[j] = row;
        it->token[row] = (int)(j / K);
    }
    memmove(it->start + 1, it->start, E * sizeof(int));     // ... which is where group e + 1 starts
    it->start[0] = 0;
}

// The router of iteration c on T tokens: fills it->score, it->expert and it->weight, and groups the
// choices by expert.
// PyTorch: score = F.softmax(F.linear(y, gate[c]), dim=-1)               kept: all of them
static void route(const Config *config, State *s, Iteration *it, Layer *w, size_t l, size_t c,
                  size_t T) {
    const size_t E = config->n_routed_experts, K = config->num_experts_per_tok;
    const size_t gate = gate_of(config, router_of(s, l, c, config->inner_iter));
    linear(it->score, router_input(s, it, l, c), &w->gate, gate, NULL, T);
    SHARED(T * E * K, for (size_t t = 0; t < T; t++) {
        make_scores(it->score + t * E, config);
        choose(it->expert + t * K, it->weight + t * K, s->left + t * E, it->score + t * E,
               bias_of(w, gate), config);
    })
    group_by_expert(it, T, E, K);
}

// The rows of expert e in the arrays that are grouped by expert.
static MlpRows mlp_rows(const Config *config, State *s, const Iteration *it, size_t e) {
    const size_t d = config->hidden_size, f = config->moe_intermediate_size;
    const size_t first = (size_t)it->start[e], n = (size_t)it->start[e + 1] - first;
    return (MlpRows){ n, s->gathered + first * d, it->g + first * f, it->u + first * f,
                      s->act + first * f, s->returned + first * d, NULL };
}

// Runs expert e on the tokens that chose it: gathers them into its rows of s->gathered, and writes
// its rows of s->returned.
static void expert_forward(const Config *config, State *s, Iteration *it, Layer *w, size_t e) {
    const size_t d = config->hidden_size;
    const MlpRows p = mlp_rows(config, s, it, e);
    const int *token = it->token + it->start[e];
    for (size_t j = 0; j < p.n; j++)
        memcpy(p.x + j * d, it->y + (size_t)token[j] * d, d * sizeof(real));
    if (p.n) feed_forward(expert(w, e), p);
}

#include "lib/one_token.h"

// it->ffn (T, d) = the feed-forward of layer l in iteration c, of it->y (T, d).
// kept: what route() and feed_forward() keep
static void ffn_forward(const Model *m, State *s, Iteration *it, size_t l, size_t c, size_t T) {
    LETTERS(&m->config);
    Layer *w = &m->w.layer[l];
    const int moe = is_moe(&m->config, l);
    // ffn starts as the shared feed-forward, or as 0; of a single token experts_of_one() makes it.
    const int single_token = moe && T == 1 && !s->keep && K < MOST_AT_ONCE;
    if (!moe || (S && !single_token))
        feed_forward(shared_mlp(w, moe), (MlpRows){ T, it->y, it->shared_g, it->shared_u,
                                                        s->act, it->ffn, NULL });
    else if (!S)
        memset(it->ffn, 0, T * d * sizeof(real));
    if (!moe) return;
    route(&m->config, s, it, w, l, c, T);
    // With many tokens the threads take an expert each; with few they take the experts one after
    // the other, and share the rows of their matrices.
    if (single_token) experts_of_one(&m->config, s, it, w);
    else TASKS(T < 16 ? 0 : T * K * d * f, e, E, { expert_forward(&m->config, s, it, w, e); })
    edit_parts(s, it, l, c, T, K, d);
    SHARED(T * K * d, for (size_t t = 0; t < T; t++) {
        for (size_t k = 0; k < K; k++) {        // in this order, whatever the number of threads
            const real *out = s->returned + (size_t)it->slot[t * K + k] * d;
            const real weight = it->weight[t * K + k];
            for (size_t i = 0; i < d; i++) it->ffn[t * d + i] += weight * out[i];
        }
    })
}

// What iteration c adds its ffn(y) to.
enum Residual {
    NOTHING,        // y_(c+1) = ffn(y_c)
    Y,              // y_(c+1) = y_c + ffn(y_c)          with inner_residual
    PRENORM,        // the same, and out = mid + the sum of all ffn      with prenorm_chain
    WEIGHTED_Y      // y_(c+1) = y_c + v_c * ffn(y_c)    v_c (d): copy c - 1 of coe_weights
};

// Which of them it is. An upcycled model is a DeepSeek-V2 that was made into a chain: its iteration
// 0 is the layer as it was, y_1 = ffn(y_0), and each later one joins with a weight v_c for each
// channel. These start as zeros, so that at first the chain computes what the layer did.
static enum Residual residual_of(const Model *m, size_t c) {
    if (m->upcycled) return c ? WEIGHTED_Y : NOTHING;
    if (m->config.prenorm_chain) return PRENORM;
    return m->config.inner_residual ? Y : NOTHING;
}

// out (T, d) = y_C, the end of the chain of layer l, which starts from y_0 = rmsnorm(mid); + mid
// with outer_residual. With prenorm_chain it is mid + (y_C - y_0), which is mid and all that the
// experts added: with C = 1 that is a DeepSeek-V2, to the last bit.
// PyTorch: y = rmsnorm(mid);   for c in range(C): y = y + ffn(c, y)       (inner_residual)
// kept: each y, 1 / rms of mid and, with KEEP_FFN, each ffn
static void chain_forward(const Model *m, State *s, size_t l, real *out, size_t T) {
    const Config *config = &m->config;
    Layer *w = &m->w.layer[l];
    LayerState *a = &s->layer[l];
    const size_t d = config->hidden_size, rounds = iterations(config, l);
    rmsnorm(a->iteration[0].y, a->inverse_mid, a->mid, d, &w->post_attention_layernorm, T,
            config->rms_norm_eps);
    for (size_t c = 0; c < rounds; c++) {
        Iteration *it = &a->iteration[c];
        edit_input(s, it, l, c, T, d);
        ffn_forward(m, s, it, l, c, T);
        edit_output(s, it, l, c, T, d);
        const enum Residual residual = residual_of(m, c);
        const real *v = residual == WEIGHTED_Y ? data_of(&w->coe_weights, c - 1) : NULL;
        const bool last = c + 1 == rounds;
        const real *mid = last && config->outer_residual ? a->mid : NULL;
        const real *sum = c ? out : a->mid;     // of PRENORM, before this iteration
        real *next = last ? out : a->iteration[c + 1].y;
        SHARED(T * d, for (size_t t = 0; t < T; t++) {
            const real *y = it->y + t * d, *ffn = it->ffn + t * d;
            real *to = next + t * d;
            switch (residual) {
            case NOTHING:    for (size_t i = 0; i < d; i++) to[i] = ffn[i]; break;
            case Y:          for (size_t i = 0; i < d; i++) to[i] = y[i] + ffn[i]; break;
            case PRENORM:    for (size_t i = 0; !last && i < d; i++) to[i] = y[i] + ffn[i];
                             for (size_t i = t * d; i < (t + 1) * d; i++)
                                 out[i] = sum[i] + it->ffn[i];
                             break;
            case WEIGHTED_Y: for (size_t i = 0; i < d; i++) to[i] = y[i] + v[i] * ffn[i]; break;
            }
            for (size_t i = 0; mid && i < d; i++) to[i] += mid[t * d + i];
        })
        tell_round(s, it, l, c, next, T);
    }
}

// ---- [6] attention ------------------------------------------------------------------------------
// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). Keys and values of all heads are
// linear in one latent of R numbers per token, so only that and the shared rotated key are cached.
// With z = rmsnorm(x), for the token at position p and for head h:
//
//     q_nope, q_rope = q_proj z           or q_b_proj rmsnorm(q_a_proj z)             (dn), (dr)
//     latent, k_rope = kv_a_proj z;       latent = rmsnorm(latent)                     (R), (dr)
//     k_nope, v      = kv_b_proj latent                                               (dn), (dv)
//     score_pj       = q_nope_p . k_nope_j + rope(q_rope_p) . rope(k_rope_j),   j <= p
//     head_p         = sum over j of softmax_j(scale score_pj) v_j
//     out            = o_proj [all heads]
//
// In memory q_rope and k_rope are the rotated ones. Whole sequences expand k_nope and v once. Later
// tokens attend on the latents themselves. With W_k and W_v, a head's rows of kv_b_proj, and alpha
// the softmax,
//
//     q_nope . (W_k latent)                = (W_k^T q_nope) . latent
//     sum over j of alpha_j (W_v latent_j) = W_v (sum over j of alpha_j latent_j)
//
// so that W_k is absorbed by the query and W_v by the output, and nothing of the past is expanded
// again: a cached position costs 2 R + dr products a head; expanding it would add R (dn + dv).

enum { QUERY_BLOCK = 48 };      // queries whose scores a thread holds at a time
static const double LATENT_EPS = 1e-6;      // of q_a_layernorm and kv_a_layernorm, always

// Fills s->cos and s->sin (context, dr / 2): position p turns pair i by the angle p * omega_i with
// omega_i = rope_theta^(-2i / dr), stretched where rope_scaling asks for it. Angles are computed in
// float as the authors' PyTorch code does, because from position 8,000 or so that rounding shows in
// the logits.
static void rope_table(State *s, const Config *config) {
    const size_t half = config->qk_rope_head_dim / 2;
    const double dim = (double)config->qk_rope_head_dim, base = config->rope_theta;
    const double factor = config->rope_scaling_factor;
    const bool yarn = config->rope_scaling_type == YARN;
    // YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times in the original context
    // stay as they are, those that turn less than beta_slow times are interpolated by `factor`,
    // with a ramp in between, which starts and ends at the pairs edge[0] and edge[1]. Pair i makes
    // original / (2 pi base^(2i / dim)) turns; that is beta where i is
    //     dim log(original / (2 pi beta)) / (2 log base)
    // The lower edge is cut at 0, the upper one at dim - 1 as the authors do, though the last pair
    // is half - 1. cos and sin are multiplied by m(mscale) / m(mscale_all_dim), where
    // m(a) = 0.1 a log factor + 1.
    double edge[2];
    for (int j = 0; j < 2; j++)
        edge[j] = dim * log((double)config->rope_scaling_original / (6.283185307179586 *
                  (j ? config->rope_scaling_beta_slow : config->rope_scaling_beta_fast))) /
                  (2 * log(base));
    double low = fmax(floor(edge[0]), 0), high = fmin(ceil(edge[1]), dim - 1);
    if (low == high) high += 0.001;
    const double growth = yarn && factor > 1 ? 0.1 * log(factor) : 0;
    const double magnitude = (growth * config->rope_scaling_mscale + 1) /
                             (growth * config->rope_scaling_mscale_all + 1);
    for (size_t i = 0; i < half; i++) {
        float omega = (float)(1 / pow(base, 2 * (double)i / dim));
        if (yarn) {
            const double ramp = fmin(fmax(((double)i - low) / (high - low), 0), 1);
            omega = (float)(omega / factor * ramp + omega * (1 - ramp));
        }
        for (size_t p = 0; p < s->context; p++) {
            const float position = config->rope_scaling_type == LINEAR ? (float)((double)p / factor)
                                                                       : (float)p;
            const float angle = position * omega;
            s->cos[p * half + i] = (real)(cos((double)angle) * magnitude);
            s->sin[p * half + i] = (real)(sin((double)angle) * magnitude);
        }
    }
}

// The factor on the scores: (dn + dr)^(-1/2), times m(mscale_all_dim) of rope_table(), squared
// because it belongs to both q and k.
static real attention_scale(const Config *config) {
    const double factor = config->rope_scaling_type ? config->rope_scaling_factor : 1;
    const double m = factor > 1 ? 0.1 * config->rope_scaling_mscale_all * log(factor) + 1 : 1;
    return (real)(m * m / sqrt((double)(config->qk_nope_head_dim + config->qk_rope_head_dim)));
}

// Rotates the dr / 2 neighbouring pairs of x (dr) by the angles of a position, in place; with
// direction -1 it rotates back.
// PyTorch: a, b = x[..., 0::2], x[..., 1::2]
//          x = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
static void rope(real *x, const State *s, size_t position, size_t dr, real direction) {
    const real *cosine = s->cos + position * dr / 2, *sine = s->sin + position * dr / 2;
    for (size_t i = 0; i < dr / 2; i++) {
        const real a = x[2 * i], b = x[2 * i + 1], sin_i = direction * sine[i];
        x[2 * i]     = a * cosine[i] - b * sin_i;
        x[2 * i + 1] = b * cosine[i] + a * sin_i;
    }
}

// Softmax over the first `seen` of a query's scores (keys), up to its own position; 0 for the rest.
static void causal_softmax(real *score, size_t seen, size_t keys, real scale, real *log_sum) {
    softmax(score, seen, scale, log_sum);
    memset(score + seen, 0, (keys - seen) * sizeof(real));
}

// A block of queries of one head in one sequence, and all keys that one of them sees.
typedef struct {
    size_t first;           // the first query's row among all T
    size_t position;        // its position in the sequence
    size_t queries, keys;
    Matrix q_nope, q_rope;      // (queries, dn), (queries, dr)
    Matrix k_nope, k_rope, v;   // (keys, dn), (keys, dr), (keys, dv)
} QueryBlock;

// Query block `index` of head h in sequence b, of whole sequences of n tokens.
static QueryBlock block_of(const Config *config, const LayerState *a, size_t n, size_t b, size_t h,
                           size_t index) {
    LETTERS(config);
    const size_t position = index * QUERY_BLOCK, first = b * n + position,
        queries = min_size(n - position, QUERY_BLOCK), keys = position + queries,
        dq = dn + dr, dkv = dn + dv;
    const real *q = a->q + (first * H + h) * dq, *kv = a->kv + (b * n * H + h) * dkv;
    const real *k_rope = a->latent + b * n * (R + dr) + R;
    return (QueryBlock){ first, position, queries, keys,
                         view(q, queries, dn, H * dq), view(q + dn, queries, dr, H * dq),
                         view(kv, keys, dn, H * dkv), view(k_rope, keys, dr, R + dr),
                         view(kv + dn, keys, dv, H * dkv) };
}

// How many blocks of queries n tokens make.
static size_t query_blocks(size_t n) { return (n + QUERY_BLOCK - 1) / QUERY_BLOCK; }

// a->heads (B n, H dv) from a->q, a->kv and the rotated keys: whole sequences from position 0 on.
// PyTorch: heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
// kept: log_sum, heads
static void attend_expanded(const Config *config, State *s, LayerState *a, size_t B, size_t n) {
    LETTERS(config);
    const size_t blocks = query_blocks(n);
    const real scale = attention_scale(config);
    TASKS(B * n * n * H, task, B * H * blocks, {
        const size_t h = task / blocks % H;
        const QueryBlock qb = block_of(config, a, n, task / blocks / H, h, task % blocks);
        real *score = s->scores + (size_t)thread_id() * QUERY_BLOCK * s->context;
        matmul_nt(score, qb.keys, qb.q_nope, qb.k_nope, 0);     // (queries, keys)
        matmul_nt(score, qb.keys, qb.q_rope, qb.k_rope, 1);
        for (size_t i = 0; i < qb.queries; i++)
            causal_softmax(score + i * qb.keys, qb.position + i + 1, qb.keys, scale,
                           a->log_sum + (qb.first + i) * H + h);
        matmul_nn(a->heads + (qb.first * H + h) * dv, H * dv,
                  view(score, qb.queries, qb.keys, qb.keys), qb.v, 0);
    })
}

// The most rows that attend_latent() takes at once, H of them for a token: as many whole tokens as
// make at most QUERY_BLOCK rows, but one at least.
static size_t most_latent_rows(const Config *config) {
    const size_t H = config->num_attention_heads;
    return H < QUERY_BLOCK ? QUERY_BLOCK / H * H : H;
}

// a->heads for some tokens of one sequence on its cached latents. They are `count` rows of a->q
// from row `first` on, and the last of the keys are their own. All heads share the latents, so that
// one product serves them all: row i * H + h of it is head h of token i. Nothing is kept.
static void attend_latent(const Config *config, State *s, LayerState *a, const Tensor *kv_b_proj,
                          size_t first, size_t count, size_t keys) {
    LETTERS(config);
    const size_t rows = count * H, dq = dn + dr, most = most_latent_rows(config);
    const real scale = attention_scale(config);
    const Matrix w = matrix(kv_b_proj, 0);
    const real *q = a->q + first * H * dq;              // (count, H, dn + dr)
    real *heads = a->heads + first * H * dv;            // (count, H, dv)
    // Scratch of the calling thread, into which all threads write in the loops below.
    real *q_latent = s->absorbed + (size_t)thread_id() * most * (2 * R + dr);   // (rows, R + dr)
    real *o_latent = q_latent + most * (R + dr);                                // (rows, R)
    real *score = s->scores + (size_t)thread_id() * most * s->context;          // (rows, keys)
    // score = [W_k^T q_nope, q_rope] . [latent, k_rope]
    SHARED(rows * dn * R, for (size_t h = 0; h < H; h++) {
        real *to = q_latent + h * (R + dr);
        matmul_nn(to, H * (R + dr), view(q + h * dq, count, dn, H * dq),
                  slice(w, h * (dn + dv), dn), 0);
        for (size_t i = 0; i < count; i++)
            memcpy(to + i * H * (R + dr) + R, q + (i * H + h) * dq + dn, dr * sizeof(real));
    })
    matmul_nt(score, keys, view(q_latent, rows, R + dr, R + dr),
              view(a->latent, keys, R + dr, R + dr), 0);
    SHARED(rows * keys, for (size_t row = 0; row < rows; row++) {
        causal_softmax(score + row * keys, keys - count + 1 + row / H, keys, scale, NULL);
    })
    // o_latent = sum over keys of the softmax times their latents;   head = W_v o_latent
    matmul_nn(o_latent, R, view(score, rows, keys, keys), view(a->latent, keys, R, R + dr), 0);
    SHARED(rows * R * dv, for (size_t h = 0; h < H; h++) {
        matmul_nt(heads + h * dv, H * dv, view(o_latent + h * R, count, R, H * R),
                  slice(w, h * (dn + dv) + dn, dv), 0);
    })
}

// a->heads for the n tokens of one sequence from position `start` on, on the cached latents.
static void attend_cached(const Config *config, State *s, LayerState *a, const Tensor *kv_b_proj,
                          size_t n, size_t start) {
    const size_t block = most_latent_rows(config) / config->num_attention_heads;    // in tokens
    const size_t blocks = (n + block - 1) / block;
    // With a single block all threads work on its products; with more, each takes blocks.
    TASKS(blocks == 1 ? 0 : SIZE_MAX, task, blocks, {
        const size_t first = task * block, count = min_size(n - first, block);
        attend_latent(config, s, a, kv_b_proj, first, count, start + first + count);
    })
}

// a->mid = a->x + attention(rmsnorm(a->x)), all (T, d), of layer l for n tokens of each of B
// sequences at positions start .. start + n - 1, where B is 1 unless start is 0. Their latents join
// those that are there.
// kept: each 1 / rms, q_a, q, kv_a, latent, kv, log_sum, heads
static void attention_forward(const Model *m, State *s, size_t l, size_t B, size_t n,
                              size_t start) {
    const Config *config = &m->config;
    LETTERS(config);
    Layer *w = &m->w.layer[l];
    LayerState *a = &s->layer[l];
    const size_t T = B * n, width = H * (dn + dv);
    real *latent = a->latent + start * (R + dr);        // of these tokens

    rmsnorm(s->norm, a->inverse_x, a->x, d, &w->input_layernorm, T, config->rms_norm_eps);
    linear(a->kv_a, s->norm, &w->kv_a_proj, 0, &w->kv_a_bias, T);
    if (!r) {
        linear(a->q, s->norm, &w->q_proj, 0, NULL, T);
    } else {
        linear(a->q_a, s->norm, &w->q_a_proj, 0, &w->q_a_bias, T);
        rmsnorm(s->norm, a->inverse_q, a->q_a, r, &w->q_a_layernorm, T, LATENT_EPS);
        linear(a->q, s->norm, &w->q_b_proj, 0, NULL, T);
    }
    rmsnorm(latent, a->inverse_kv, a->kv_a, R + dr, &w->kv_a_layernorm, T, LATENT_EPS);
    SHARED(T * H * dr, for (size_t t = 0; t < T; t++) {
        const size_t p = start + t % n;
        real *k_rope = latent + t * (R + dr) + R;
        memcpy(k_rope, a->kv_a + t * (R + dr) + R, dr * sizeof(real));
        rope(k_rope, s, p, dr, 1);
        for (size_t h = 0; h < H; h++) rope(a->q + (t * H + h) * (dn + dr) + dn, s, p, dr, 1);
    })
    // A single token is cheaper on the latents, but the backward pass wants kv and log_sum.
    if (start == 0 && (n > 1 || s->keep)) {
        matmul_nt(a->kv, width, view(latent, T, R, R + dr), matrix(&w->kv_b_proj, 0), 0);
        attend_expanded(config, s, a, B, n);
    } else {
        attend_cached(config, s, a, &w->kv_b_proj, n, start);
    }
    edit_heads(s, a->heads, l, T, H, dv);
    linear(a->mid, a->heads, &w->o_proj, 0, &w->o_bias, T);
    SHARED(T * d, for (size_t i = 0; i < T * d; i++) a->mid[i] += a->x[i];)
}

// ---- [7] forward --------------------------------------------------------------------------------
// The stream x, one vector of d numbers a token, starts as the token's embedding; layer after layer
// changes it; the last one, normed, times lm_head is a score for every token that may come next.

// Runs n tokens of each of B sequences, tokens (B, n), at positions start .. start + n - 1, and
// leaves in s->final (B n, d) what lm_head sees. Training runs whole sequences with start = 0;
// generating (run.c) runs one sequence, B = 1, its prompt and then one token at a time. Only the
// last `wanted` of all T rows get into s->final, as its first rows: nobody reads what the last
// layer's experts make of the others.
static void forward(const Model *m, State *s, const int *tokens, size_t B, size_t n, size_t start,
                    size_t wanted) {
    LETTERS(&m->config);
    const size_t T = B * n;
    const Matrix embedding = matrix(m->w.embed_tokens, 0);
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < d; i++)
            s->layer[0].x[t * d + i] = number(embedding, (size_t)tokens[t], i);
    for (size_t l = 0; l < L; l++) {
        const int last = l + 1 == L;
        attention_forward(m, s, l, B, n, start);
        if (last && wanted < T)
            memmove(s->layer[l].mid, s->layer[l].mid + (T - wanted) * d, wanted * d * sizeof(real));
        chain_forward(m, s, l, last ? s->out : s->layer[l + 1].x, last ? wanted : T);
    }
    rmsnorm(s->final, s->inverse_out, s->out, d, m->w.norm, wanted, m->config.rms_norm_eps);
}

// logits (rows, V) of the rows of s->final from `first` on.
static void logits_forward(const Model *m, const State *s, real *logits, size_t first,
                           size_t rows) {
    linear(logits, s->final + first * m->config.hidden_size, m->w.lm_head, 0, NULL, rows);
}

// -log softmax(logits)[target], in nats; logits (V) become probabilities.
// PyTorch: F.cross_entropy(logits, target)
static double cross_entropy(real *logits, size_t V, int target) {
    real chosen = logits[target], log_sum;
    softmax(logits, V, 1, &log_sum);
    return (double)(log_sum - chosen);
}

// ---- [8] sampler --------------------------------------------------------------------------------
// From logits to the next token, in this order:
//   1. repetition penalty p: logits of tokens that occurred are divided by p, or multiplied by it
//      where negative
//   2. temperature: logits / temperature, then softmax (0: the largest logit is the answer)
//   3. top-k: the k most probable stay
//   4. top-p: of these, renormalised, the fewest whose sum reaches p
//   5. min-p: of these, those with at least min-p times the largest probability
//   6. one of the rest is drawn in proportion. Among equals the lower id comes first everywhere.

typedef struct {
    double temperature, top_p, min_p, repetition_penalty;   // top_p 1, min_p 0, penalty 1: off
    int64_t top_k;                                          // 0: off
    uint64_t rng;
} Sampler;

#include "lib/candidates.h"

// How many of the n candidates, which are sorted, pass top-p and min-p. `all` is the sum of the
// probabilities of all that passed top-k.
static size_t filter(const Sampler *o, const Candidate *candidate, size_t n, double all) {
    size_t kept = n;
    if (o->top_p < 1) {
        double part = 0;
        for (kept = 0; kept < n && (kept == 0 || part < o->top_p * all); )
            part += (double)candidate[kept++].p;
    }
    while (kept > 1 && (double)candidate[kept - 1].p < o->min_p * (double)candidate[0].p) kept--;
    return kept;
}

// Chooses a token. logits (V) is overwritten, candidate (V) is scratch, seen (V) marks tokens that
// occurred or is NULL. Fails on logits that are not finite: broken weights must not end up as text.
static int sample(Sampler *o, real *logits, Candidate *candidate, const unsigned char *seen,
                  size_t V) {
    const real penalty = (real)o->repetition_penalty;
    for (size_t i = 0; i < V; i++) {
        if (!isfinite(logits[i]))
            fail(FAILED, "logit %zu is %g: the weights hold infinite numbers or NaN",
                 i, (double)logits[i]);
        if (seen && seen[i]) logits[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
    }
    const size_t best = argmax(logits, V);
    if (o->temperature < 1e-9) return (int)best;    // so little that nothing else has a chance
    softmax(logits, V, (real)(1 / o->temperature), NULL);
    const double drawn = rng_uniform(&o->rng);
    const bool top_k = o->top_k > 0 && (size_t)o->top_k < V;
    const bool no_filter = !top_k && o->top_p >= 1 && o->min_p == 0;
    double all = 0;
    for (size_t i = 0; i < V; i++) all += (double)logits[i];
    size_t n;
    if (top_k) {
        n = first_k(candidate, logits, V, (size_t)o->top_k);
        all = sum_candidates(candidate, n);
    } else {    // only those that the filters or the draw can come to, because sorting takes long
        const double reach = o->top_p < 1 ? o->top_p : no_filter ? drawn : 1;
        n = first_reaching(candidate, logits, V, all, reach, o->min_p * (double)logits[best]);
    }
    const size_t kept = filter(o, candidate, n, all);
    double u = drawn * (no_filter ? all : sum_candidates(candidate, kept));
    for (size_t i = 0; i + 1 < kept; i++) {
        u -= (double)candidate[i].p;
        if (u < 0) return candidate[i].id;
    }
    return candidate[kept - 1].id;
}

#include "lib/config.h"
#include "lib/memory.h"
#include "lib/tokenizer.h"
#include "lib/modelfile.h"
#endif // COE_C
