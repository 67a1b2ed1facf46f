// coe.c - Chain-of-Experts in plain C: the whole forward pass, the sampler and the tokenizer.
//
// A Chain-of-Experts layer (arXiv 2506.18945) applies its mixture of experts C times in a row, each
// time with a router of its own, so that experts can build on each other's output:
//
//     h   = x + attention(rmsnorm(x))               DeepSeek-V2's latent attention          [9]
//     y0  = rmsnorm(h)
//     y   = y + sum over the K chosen experts e of s_e(y) expert_e(y),   C times            [10]
//     out = y                                       (+ h with outer_residual)
//
// There is no main here. run.c (generate, evaluate, inspect) and train.c (backward, AdamW, data)
// each include this file: one program is one translation unit. To read it, take [4] for what a
// model consists of, then [11], [10] and [9] for what it computes; the rest serves those four.
//
//   [1] errors and memory      [5] the model file         [9]  attention
//   [2] random numbers         [6] operations on rows     [10] the chain of experts
//   [3] keys and config        [7] matrix products        [11] forward
//   [4] tensors                [8] activations            [12] sampler
//                                                         [13] tokenizer
//
// The alphabet, for shapes in comments: V vocab_size, d hidden_size, L num_hidden_layers, H heads,
// dn / dr / dv the widths of a head's key without position, of the key with RoPE and of a head's
// value, r q_lora_rank, R kv_lora_rank, E n_routed_experts, K num_experts_per_tok,
// S n_shared_experts, f moe_intermediate_size, I intermediate_size (dense layers), C inner_iter,
// B sequences of T tokens.
//
// Conventions: matrices are row-major; a weight is (out, in) as in PyTorch, so a layer computes
// x w^T. Activations are (rows, width) where a row is one token: a batch is B*T rows, and only
// attention knows which rows belong to one sequence. "At stride s" means that rows start s numbers
// apart. An output comes first in an argument list. "kept" at the end of a comment says what the
// backward pass will want back. Errors end the program with one line.
#ifndef COE_C
#define COE_C
#define COE_VERSION "1.0"
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <ctype.h>      // isspace
#include <errno.h>
#include <math.h>
#include <signal.h>     // SIGBUS: a mapped file that shrinks
#include <stdarg.h>
#include <stddef.h>     // offsetof
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifndef _WIN32
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef REAL            // the gradient check compiles the whole model with REAL double
#define REAL float
#define REAL_IS_FLOAT
#endif
typedef REAL real;

// ---- [1] errors and memory ----------------------------------------------------------------------
// Every failure is one line "program: thing: what was found, what was expected" and an exit code: 1
// for what goes wrong while running, 2 for wrong usage. Nothing here tries to survive a failed
// allocation: there is nothing sensible that a program whose model does not fit could go on with.

static const char *program = "coe";
enum { FAILED = 1, WRONG_USAGE = 2 };

// Prints one line to stderr and ends the program with `code`.
static _Noreturn void fail(int code, const char *format, ...) {
    va_list args;
    fflush(stdout);
    fprintf(stderr, "%s: ", program);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    exit(code);
}

// a * b. Every size in this project passes through here: a product that wraps around would be a
// small allocation followed by large writes.
static size_t product(size_t a, size_t b) {
    size_t c;
    if (__builtin_mul_overflow(a, b, &c))
        fail(FAILED, "sizes too large: %zu x %zu does not fit 64 bits", a, b);
    return c;
}

// a + b, checked in the same way.
static size_t sum(size_t a, size_t b) {
    size_t c;
    if (__builtin_add_overflow(a, b, &c))
        fail(FAILED, "sizes too large: %zu + %zu does not fit 64 bits", a, b);
    return c;
}

// `bytes` of zeroed memory at a multiple of 64 (a cache line, and the widest vector), for
// release(); `what` is for the error message. Large blocks come from the system as untouched pages
// and cost nothing until they are used.
static void *allocate(size_t bytes, const char *what) {
    void *block = calloc(sum(bytes, 64 + sizeof(void *)), 1);
    if (!block) fail(FAILED, "out of memory: %.1f MB for %s", (double)bytes / 1e6, what);
    uintptr_t aligned = ((uintptr_t)block + sizeof(void *) + 63) & ~(uintptr_t)63;
    ((void **)aligned)[-1] = block;     // where release() finds what calloc returned
    return (void *)aligned;
}

// Gives back what allocate() gave, or does nothing for NULL.
static void release(void *aligned) { if (aligned) free(((void **)aligned)[-1]); }

// The most threads that a region gets; the number of the running one; how many are in its team; and
// whether this is inside a region of several already.
#ifdef _OPENMP
static int thread_count(void) { return omp_get_max_threads(); }
static int thread_id(void)    { return omp_get_thread_num(); }
static int team_size(void)    { return omp_get_num_threads(); }
static int at_work(void)      { return omp_in_parallel(); }
#else
static int thread_count(void) { return 1; }
static int thread_id(void)    { return 0; }
static int team_size(void)    { return 1; }
static int at_work(void)      { return 0; }
#endif

// Seconds from some fixed point, on a clock that nobody can set back.
static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Where the time of a training step goes. The backward pass of phase p is BACKWARD + p; REST is all
// that has no name, IDLE what lies between steps.
enum { EMBEDDING, ATTENTION, ROUTER, EXPERTS, HEAD, BACKWARD, ADAMW = 2 * BACKWARD, REST, IDLE,
       PHASES };
static double phase_seconds[PHASES];
static int profiling;               // set by train --profile, while only one thread passes here

// What follows is phase `next`: the time since the last call goes to the phase that it began.
static void phase(int next) {
    static int current = IDLE;
    static double since;
    if (!profiling) return;
    const double now = seconds();
    phase_seconds[current] += now - since;
    current = next;
    since = now;
}

enum { MOST_THREADS = 1024 };

// Pieces of work 0 .. n - 1 for the threads of a parallel region. A thread begins with a share of
// its own, the same every time, because what it wrote there before is in its cache; then it helps
// the others, which may be slower or disturbed.
typedef struct { size_t n; unsigned taken[MOST_THREADS]; } Work;

// A piece that nobody has taken yet, or n when there is none.
static size_t next_piece(Work *w) {
    const size_t threads = (size_t)team_size(), me = (size_t)thread_id();
    for (size_t k = 0; k < threads; k++) {
        const size_t who = (me + k) % threads, first = w->n * who / threads;
        const size_t share = w->n * (who + 1) / threads - first;
        const size_t piece = __atomic_fetch_add(&w->taken[who], 1, __ATOMIC_RELAXED);
        if (piece < share) return first + piece;
    }
    return w->n;
}

// Uses n threads; with 0 as many as OMP_NUM_THREADS says, or where that makes no sense the machine.
static void set_threads(int64_t n) {
#ifdef _OPENMP
    if (!n) n = omp_get_max_threads();
    const int all = omp_get_num_procs() < MOST_THREADS ? omp_get_num_procs() : MOST_THREADS;
    omp_set_num_threads(n >= 1 && n <= MOST_THREADS ? (int)n : all);
#else
    (void)n;
#endif
}

enum { DECIMAL_TEXT = 400 };        // enough for the largest double with all its digits
// x with 9 significant digits, never with an exponent, for tables and logs. Returns `text`.
static const char *decimal(char text[DECIMAL_TEXT], double x) {
    int digits = x == 0 || !isfinite(x) ? 8 : 8 - (int)floor(log10(fabs(x)));
    snprintf(text, DECIMAL_TEXT, "%.*f", digits < 0 ? 0 : digits > 60 ? 60 : digits, x);
    return text;
}

// A closed stdin, stdout or stderr would leave its number to the next file that is opened, and what
// is meant for it would end up there. So /dev/null stands in, and writing to it fails.
static void occupy_standard_files(void) {
#ifndef _WIN32
    int file = open("/dev/null", O_RDONLY);
    while (file >= 0 && file < 3) file = open("/dev/null", O_RDONLY);
    if (file >= 0) close(file);
    signal(SIGPIPE, SIG_IGN);       // a closed pipe shows as a failed write, with a message
#endif
}

// Sends off what was printed. A full disk or a closed pipe is an error: nobody gets the result.
static void flush_stdout(void) {
    if (fflush(stdout) || ferror(stdout))
        fail(FAILED, "stdout: cannot be written: %s", strerror(errno));
}

// ---- [2] random numbers -------------------------------------------------------------------------
// splitmix64 (Steele, Lea, Flood 2014). Its state is a counter, so a stream can start anywhere: any
// number is as good a seed as any other.

// The next 64 random bits of the stream whose state is *state.
static uint64_t rng_next(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Uniform in [0, 1), with 53 random bits.
static double rng_uniform(uint64_t *state) { return (double)(rng_next(state) >> 11) * 0x1p-53; }

// Normal with mean 0 and deviation 1 (Box and Muller 1958; the pair's second value is not used).
static double rng_normal(uint64_t *state) {
    double radius = sqrt(-2 * log(1 - rng_uniform(state)));
    return radius * cos(6.283185307179586 * rng_uniform(state));
}

// ---- [3] keys and config ------------------------------------------------------------------------
// Whatever has a name and a value - the keys of config.json, the options of both programs - is a
// row of a table: one parser, one range check and one --help serve them all. A table's values live
// in a struct whose fields are 8 bytes each, in the order of the table, so that the config in a
// model file is that struct, byte for byte.

typedef enum { INT, NUM, BOOL, WORD, TEXT, FLAG } Kind;     // FLAG: a BOOL given without a value
typedef int64_t TYPE_INT, TYPE_BOOL, TYPE_WORD, TYPE_FLAG;
typedef double TYPE_NUM;
typedef const char *TYPE_TEXT;

typedef struct {
    const char *name;       // the option is --name
    char letter;            // the option is -letter too; 0: none
    Kind kind;
    double least, most;     // the range of an INT or NUM
    const char *words;      // WORD: what it may be, "greedy|group_limited_greedy";
                            // INT: a name for `least`, "null"
    const char *init;       // the value it starts with, as text
    const char *help;       // one line with the unit
    size_t offset;          // of the field in the table's struct
} Key;

//    kind  field                    name                  least most     words    init
#define CONFIG(X) \
    X(INT,  vocab_size,              "vocab_size",                  1, 1 << 24, "",      "258",    \
      "tokens in the vocabulary, V")                                                               \
    X(INT,  hidden_size,             "hidden_size",                 1, 1 << 16, "",      "128",    \
      "width of the residual stream, d")                                                           \
    X(INT,  intermediate_size,       "intermediate_size",           1, 1 << 20, "",      "256",    \
      "width of a dense layer's feed-forward, I")                                                  \
    X(INT,  moe_intermediate_size,   "moe_intermediate_size",       1, 1 << 20, "",      "64",     \
      "width of an expert, f")                                                                     \
    X(INT,  num_hidden_layers,       "num_hidden_layers",           1, 1 << 12, "",      "4",      \
      "layers, L")                                                                                 \
    X(INT,  num_attention_heads,     "num_attention_heads",         1, 1 << 12, "",      "8",      \
      "heads, H")                                                                                  \
    X(INT,  n_shared_experts,        "n_shared_experts",            0, 1 << 10, "null",  "1",      \
      "experts that every token visits, S")                                                        \
    X(INT,  n_routed_experts,        "n_routed_experts",            0, 1 << 14, "null",  "16",     \
      "experts to choose from, E; null: all layers are dense")                                     \
    X(INT,  num_experts_per_tok,     "num_experts_per_tok",         1, 1 << 14, "",      "2",      \
      "experts chosen per token and iteration, K")                                                 \
    X(INT,  kv_lora_rank,            "kv_lora_rank",                1, 1 << 16, "",      "64",     \
      "width of the key-value latent, R")                                                          \
    X(INT,  q_lora_rank,             "q_lora_rank",                 0, 1 << 16, "null",  "null",   \
      "width of the query latent, r; null: one matrix")                                            \
    X(INT,  qk_nope_head_dim,        "qk_nope_head_dim",            1, 1 << 16, "",      "16",     \
      "width of a head's key without position, dn")                                                \
    X(INT,  qk_rope_head_dim,        "qk_rope_head_dim",            2, 1 << 16, "",      "16",     \
      "width of the key with RoPE, dr, even")                                                      \
    X(INT,  v_head_dim,              "v_head_dim",                  1, 1 << 16, "",      "16",     \
      "width of a head's value, dv")                                                               \
    X(INT,  inner_iter,              "inner_iter",                  1, 1 << 10, "",      "2",      \
      "iterations of the chain, C")                                                                \
    X(BOOL, inner_residual,          "inner_residual",              0, 1,       "",      "true",   \
      "y = y + experts(y) in every iteration")                                                     \
    X(BOOL, outer_residual,          "outer_residual",              0, 1,       "",      "false",  \
      "the layer's input is added to the chain's end")                                             \
    X(BOOL, use_igate,               "use_igate",                   0, 1,       "",      "true",   \
      "a router for each iteration; false: one for all")                                           \
    X(WORD, topk_method,             "topk_method",                 0, 1,       METHODS, "greedy", \
      "how experts are chosen")                                                                    \
    X(INT,  n_group,                 "n_group",                     1, 1 << 14, "null",  "1",      \
      "groups of experts (group_limited_greedy)")                                                  \
    X(INT,  topk_group,              "topk_group",                  1, 1 << 14, "null",  "1",      \
      "groups a token may choose from")                                                            \
    X(BOOL, norm_topk_prob,          "norm_topk_prob",              0, 1,       "",      "false",  \
      "weights of the chosen sum to 1")                                                            \
    X(NUM,  routed_scaling_factor,   "routed_scaling_factor",    -1e9, 1e9,     "",      "1",      \
      "weights of the chosen times this, where not normalised")                                    \
    X(INT,  first_k_dense_replace,   "first_k_dense_replace",       0, 1 << 12, "",      "0",      \
      "layers before this one are dense")                                                          \
    X(INT,  moe_layer_freq,          "moe_layer_freq",              1, 1 << 12, "",      "1",      \
      "every how many layers there are experts")                                                   \
    X(NUM,  aux_loss_alpha,          "aux_loss_alpha",              0, 1e9,     "",      "0.001",  \
      "weight of the load-balancing loss, per router call")                                        \
    X(BOOL, seq_aux,                 "seq_aux",                     0, 1,       "",      "true",   \
      "balance each sequence; false: the batch")                                                   \
    X(NUM,  rms_norm_eps,            "rms_norm_eps",            1e-30, 1,       "",      "1e-6",   \
      "epsilon of the layer norms")                                                                \
    X(NUM,  rope_theta,              "rope_theta",              1e-30, 1e30,    "",      "100",    \
      "base of the rotation frequencies")                                                          \
    X(WORD, rope_scaling_type,       "rope_scaling.type",           0, 2,       SCALING, "null",   \
      "how rotations are stretched")                                                               \
    X(NUM,  rope_scaling_factor,     "rope_scaling.factor",     1e-30, 1e9,     "",      "1",      \
      "by how much")                                                                               \
    X(INT,  rope_scaling_original,   ROPE_ORIGINAL,                 1, 1 << 30, "",      "4096",   \
      "context before stretching (yarn)")                                                          \
    X(NUM,  rope_scaling_beta_fast,  "rope_scaling.beta_fast",  1e-30, 1e9,     "",      "32",     \
      "turns above which a frequency is kept (yarn)")                                              \
    X(NUM,  rope_scaling_beta_slow,  "rope_scaling.beta_slow",  1e-30, 1e9,     "",      "1",      \
      "turns below which it is stretched fully (yarn)")                                            \
    X(NUM,  rope_scaling_mscale,     "rope_scaling.mscale",      -1e9, 1e9,     "",      "1",      \
      "temperature on cos and sin (yarn)")                                                         \
    X(NUM,  rope_scaling_mscale_all, "rope_scaling.mscale_all_dim", -1e9, 1e9,  "",      "0",      \
      "temperature on the scores; 0: none")                                                        \
    X(INT,  max_position_embeddings, "max_position_embeddings",     1, 1 << 30, "",      "256",    \
      "longest context in tokens")                                                                 \
    X(BOOL, attention_bias,          "attention_bias",              0, 1,       "",      "false",  \
      "biases in q_a, kv_a and o projections")                                                     \
    X(BOOL, tie_word_embeddings,     "tie_word_embeddings",         0, 1,       "",      "true",   \
      "lm_head is embed_tokens")                                                                   \
    X(NUM,  initializer_range,       "initializer_range",           0, 1e9,     "",      "0.04",   \
      "deviation of fresh weights")                                                                \
    X(INT,  bos_token_id,            "bos_token_id",               -1, 1 << 24, "null",  "257",    \
      "token that starts a text; EOS, as between documents")                                       \
    X(INT,  eos_token_id,            "eos_token_id",               -1, 1 << 24, "null",  "257",    \
      "token that ends a text")                                                                    \
    X(WORD, torch_dtype,             "torch_dtype",                 0, 1,       DTYPES, "float32", \
      "type of the weights in safetensors")                                                        \
    X(NUM,  temperature,             "temperature",                -1, 1e9,     "",      "-1",     \
      "generation default; -1: none given")                                                        \
    X(INT,  top_k,                   "top_k",                      -1, 1 << 24, "",      "-1",     \
      "generation default; -1: none given")                                                        \
    X(NUM,  top_p,                   "top_p",                      -1, 1,       "",      "-1",     \
      "generation default; -1: none given")                                                        \
    X(NUM,  min_p,                   "min_p",                      -1, 1,       "",      "-1",     \
      "generation default; -1: none given")                                                        \
    X(NUM,  repetition_penalty,      "repetition_penalty",         -1, 1e9,     "",      "-1",     \
      "generation default; -1: none given")                                                        \
    X(BOOL, add_bos_token,           "add_bos_token",               0, 1,       "",      "true",   \
      "text gets BOS in front")                                                                    \
    X(WORD, chat_template,           "chat_template",               0, 1,    TEMPLATES,  "none",   \
      "form of a conversation, for run --mode chat")

// What would not fit into its column of the table.
#define METHODS "greedy|group_limited_greedy"
#define SCALING "null|linear|yarn"
#define DTYPES  "float32|bfloat16"
#define TEMPLATES "none|deepseek_v2"
#define ROPE_ORIGINAL "rope_scaling.original_max_position_embeddings"

typedef struct {
#define X(kind, field, ...) TYPE_##kind field;
    CONFIG(X)
#undef X
} Config;

static const Key config_keys[] = {
#define X(kind, field, name, least, most, words, init, help) \
    { name, 0, kind, least, most, words, init, help, offsetof(Config, field) },
    CONFIG(X)
#undef X
};
enum { CONFIG_KEYS = sizeof config_keys / sizeof *config_keys };

// The i-th of the words "a|b|c", and its length in *length; NULL past the last.
static const char *word(const char *words, int64_t i, size_t *length) {
    for (;; words += *length + 1, i--) {
        *length = strcspn(words, "|");
        if (i == 0) return words;
        if (!words[*length]) return NULL;
    }
}

// What a key may be, for messages and --help: "1..65536 or null", "greedy|group_limited_greedy".
// The text is overwritten by the next call.
static const char *key_range(const Key *k) {
    static char text[128];
    if (k->kind == BOOL) return "true or false";
    if (k->kind == WORD) return k->words;
    if (k->kind == TEXT) return "a text";
    snprintf(text, sizeof text, k->kind == INT ? "%.0f..%.0f%s%s" : "%g..%g%s%s",
             k->least, k->most, *k->words ? " or " : "", k->words);
    return text;
}

// The value of key k in the struct at `base`, as it would stand in config.json. The text is
// overwritten by the next call.
static const char *key_text(const Key *k, const void *base) {
    static char text[64];
    const char *field = (const char *)base + k->offset;
    int64_t i;
    double f;
    memcpy(&i, field, sizeof i);
    memcpy(&f, field, sizeof f);
    size_t length;
    const char *w;
    switch (k->kind) {
    case NUM:  snprintf(text, sizeof text, "%.10g", f); break;
    case INT:  snprintf(text, sizeof text, "%lld", (long long)i);
               if (!strcmp(k->words, "null") && (double)i == k->least && k->least < 1)
                   return "null";
               break;
    case WORD: w = word(k->words, i, &length);
               snprintf(text, sizeof text, "%.*s", w ? (int)length : 1, w ? w : "?"); break;
    case TEXT: memcpy(&w, field, sizeof w); return w ? w : "";
    default:   return i ? "true" : "false";
    }
    return text;
}

// Reads `value` into key k of the struct at `base`. False where it is not one of the key's values:
// not a number to its last character, out of range, not one of the words.
static int key_parse(const Key *k, void *base, const char *value) {
    char *field = (char *)base + k->offset, *end;
    int64_t i = 0;
    double f = 0;
    size_t length;
    errno = 0;
    if (k->kind == TEXT) { memcpy(field, &value, sizeof value); return 1; }
    if (k->kind == BOOL || k->kind == FLAG) {
        if (strcmp(value, "true") && strcmp(value, "false")) return 0;
        i = value[0] == 't';
    } else if (k->kind == WORD) {
        const char *w;
        for (i = 0; (w = word(k->words, i, &length)); i++)
            if (strlen(value) == length && !strncmp(w, value, length)) break;
        if (!w) return 0;
    } else if (*k->words && !strcmp(value, k->words)) {
        i = (int64_t)k->least;
    } else if (!*value || isspace((unsigned char)*value)) {
        return 0;
    } else if (k->kind == INT) {
        i = strtoll(value, &end, 10);
        if (*end || errno || !((double)i >= k->least && (double)i <= k->most)) return 0;
    } else {
        f = strtod(value, &end);
        if (*end || !(f >= k->least && f <= k->most)) return 0;     // this form refuses NaN as well
    }
    if (k->kind == NUM) memcpy(field, &f, sizeof f); else memcpy(field, &i, sizeof i);
    return 1;
}

// Every key of the table gets the value it starts with.
static void keys_init(const Key *keys, size_t n, void *base) {
    for (size_t i = 0; i < n; i++)
        if (keys[i].init && !key_parse(&keys[i], base, keys[i].init))
            fail(FAILED, "bug: default of %s", keys[i].name);
}

// A table of keys as options of a program: where the values go, and which of them the user gave.
typedef struct { const Key *keys; size_t n; void *base; unsigned char *given; } Options;

// The key that an option means: its name has `length` characters, or is its one letter. The number
// of its table goes to *table. NULL if there is no such key.
static const Key *find_key(const Options *tables, size_t n_tables, const char *name, size_t length,
                           size_t *table) {
    for (*table = 0; *table < n_tables; ++*table)
        for (size_t i = 0; i < tables[*table].n; i++) {
            const Key *k = &tables[*table].keys[i];
            if (length == 1 ? *name == k->letter
                            : strlen(k->name) == length && !strncmp(k->name, name, length))
                return k;
        }
    return NULL;
}

// Sets one option, or ends the program; `shown` is how the user wrote its name.
static void set_option(const Options *table, const Key *k, const char *shown, const char *value) {
    if (!value) fail(WRONG_USAGE, "%s: needs a value, %s", shown, key_range(k));
    if (!key_parse(k, table->base, value))
        fail(WRONG_USAGE, "%s is \"%s\", must be %s", shown, value, key_range(k));
    if (table->given) table->given[k - table->keys] = 1;
}

// Reads the command line from argv[first] on: --name value, --name=value, -letter value; a FLAG
// takes no value. Ends the program on what it does not know.
static void parse_options(const Options *tables, size_t n_tables, int argc, char **argv,
                          int first) {
    for (int i = first; i < argc; i++) {
        const char *arg = argv[i], *name = arg + (arg[0] == '-') + (arg[0] == '-' && arg[1] == '-');
        const size_t length = strcspn(name, "=");
        size_t table;
        const int is_long = name == arg + 2, is_short = name == arg + 1 && name[0] && !name[1];
        const Key *k = (is_long && length > 1) || is_short
            ? find_key(tables, n_tables, name, length, &table) : NULL;
        if (!k) fail(WRONG_USAGE, "%s: unknown option; --help lists them", arg);
        if (name[length]) set_option(&tables[table], k, k->name, name + length + 1);
        else if (k->kind == FLAG) set_option(&tables[table], k, arg, "true");
        else set_option(&tables[table], k, arg, ++i < argc ? argv[i] : NULL);
    }
}

// The lines of --help for a table: every option with what it may be and what it is otherwise.
static void print_options(const Options *table) {
    for (size_t i = 0; i < table->n; i++) {
        const Key *k = &table->keys[i];
        char option[80];
        if (k->letter) snprintf(option, sizeof option, "-%c, --%s", k->letter, k->name);
        else snprintf(option, sizeof option, "--%s", k->name);
        printf("  %-28s %s", option, k->help);
        if (k->kind != FLAG && k->kind != TEXT)
            printf(" [%s; %s]", key_range(k), k->init ? k->init : "none");
        else if (k->kind == TEXT && k->init && *k->init)
            printf(" [%s]", k->init);
        putchar('\n');
    }
}

// How many routers a layer has: one for each iteration of the chain, or one for all of them.
static size_t n_gates(const Config *c) { return c->use_igate ? (size_t)c->inner_iter : 1; }

// Whether layer l has experts; else its feed-forward is dense, and not iterated.
static int is_moe(const Config *c, size_t l) {
    return c->n_routed_experts > 0 && l >= (size_t)c->first_k_dense_replace &&
           l % (size_t)c->moe_layer_freq == 0;
}

// Ends the program unless every number of a table is in its range: what is read from a file has not
// been through key_parse().
static void check_ranges(const Key *keys, size_t n_keys, const void *base, const char *where,
                         int code) {
    for (size_t i = 0; i < n_keys; i++) {
        const Key *k = &keys[i];
        const char *field = (const char *)base + k->offset;
        double f;
        int64_t n;
        memcpy(&f, field, sizeof f);
        memcpy(&n, field, sizeof n);
        if (k->kind != NUM) f = (double)n;      // all ranges end where a double still is exact
        if (!(f >= k->least && f <= k->most)) {
            if (k->kind == NUM)
                fail(code, "%s: %s is %g, must be %s", where, k->name, f, key_range(k));
            fail(code, "%s: %s is %lld, must be %s", where, k->name, (long long)n, key_range(k));
        }
    }
}


// Ends the program unless every key is in its range and the config describes a model that this file
// computes. `where` is the file or option that it came from.
static void config_check(const Config *c, const char *where, int code) {
    check_ranges(config_keys, CONFIG_KEYS, c, where, code);
    // The ranges bound each key by itself; what is left are the relations between them.
#define REQUIRE(condition, ...) if (!(condition)) fail(code, __VA_ARGS__)
    REQUIRE(c->qk_rope_head_dim % 2 == 0, "%s: qk_rope_head_dim is %lld, must be even",
            where, (long long)c->qk_rope_head_dim);
    REQUIRE(c->bos_token_id < c->vocab_size,
            "%s: bos_token_id is %lld, must be below vocab_size %lld",
            where, (long long)c->bos_token_id, (long long)c->vocab_size);
    REQUIRE(c->eos_token_id < c->vocab_size,
            "%s: eos_token_id is %lld, must be below vocab_size %lld",
            where, (long long)c->eos_token_id, (long long)c->vocab_size);
    REQUIRE(c->rope_scaling_type != 2 || c->rope_scaling_beta_fast >= c->rope_scaling_beta_slow,
            "%s: rope_scaling.beta_fast is %g, must be at least beta_slow %g",
            where, c->rope_scaling_beta_fast, c->rope_scaling_beta_slow);
    REQUIRE(c->first_k_dense_replace <= c->num_hidden_layers,
            "%s: first_k_dense_replace is %lld, must be 0..%lld (the layers)",
            where, (long long)c->first_k_dense_replace, (long long)c->num_hidden_layers);
    if (!c->n_routed_experts) return;
    REQUIRE(c->num_experts_per_tok <= c->n_routed_experts,
            "%s: num_experts_per_tok is %lld, must be 1..%lld (n_routed_experts)",
            where, (long long)c->num_experts_per_tok, (long long)c->n_routed_experts);
    if (c->topk_method == 0) return;
    REQUIRE(c->n_routed_experts % c->n_group == 0,
            "%s: n_group is %lld, must divide n_routed_experts %lld",
            where, (long long)c->n_group, (long long)c->n_routed_experts);
    REQUIRE(c->topk_group <= c->n_group, "%s: topk_group is %lld, must be 1..%lld (n_group)",
            where, (long long)c->topk_group, (long long)c->n_group);
    const int64_t left = c->topk_group * (c->n_routed_experts / c->n_group);
    REQUIRE(left >= c->num_experts_per_tok,
            "%s: topk_group %lld of n_group %lld leave %lld experts, "
            "fewer than num_experts_per_tok %lld",
            where, (long long)c->topk_group, (long long)c->n_group,
            (long long)left, (long long)c->num_experts_per_tok);
#undef REQUIRE
}

// ---- [4] tensors --------------------------------------------------------------------------------
// This table is the one place that names a tensor: loading, saving, initialising, AdamW, the
// gradients and `run -m info` all walk it. A row reads: field, name in a checkpoint (a %d in it
// counts the copies), copies, rows, columns, initial values. A tensor that a model does not have
// has 0 copies, so that optional parts need no second list. Norms, routers, biases and chain
// weights (GATE, ONES, ZEROS) are float32 in every file; NORMAL are the matrices that a file may
// hold in a narrower type.

enum Init { NORMAL, GATE, ONES, ZEROS };    // N(0, initializer_range), U(-1/sqrt d, 1/sqrt d), 1, 0

// bfloat16 is the upper half of a float32. Q8 is an int8 times a scale that GROUP neighbours in a
// row share: largest magnitude / 127. A copy in Q8 is its int8, then its scales, see copy_bytes().
enum Type { F32, BF16, Q8 };
enum { GROUP = 64 };

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
    X(gate,              gate_name,                          moe ? G : 0,     E,     d, GATE)      \
    X(experts_gate_proj, "mlp.experts.%d.gate_proj.weight",  moe ? E : 0,     f,     d, NORMAL)    \
    X(experts_up_proj,   "mlp.experts.%d.up_proj.weight",    moe ? E : 0,     f,     d, NORMAL)    \
    X(experts_down_proj, "mlp.experts.%d.down_proj.weight",  moe ? E : 0,     d,     f, NORMAL)    \
    X(shared_gate_proj,  "mlp.shared_experts.gate_proj.weight", moe && S, f * S,     d, NORMAL)    \
    X(shared_up_proj,    "mlp.shared_experts.up_proj.weight",   moe && S, f * S,     d, NORMAL)    \
    X(shared_down_proj,  "mlp.shared_experts.down_proj.weight", moe && S,     d, f * S, NORMAL)    \
    X(coe_weights,       "mlp.coe_weights.%d",     moe && up ? C - 1 : 0,     1,     d, ZEROS)     \
    X(dense_gate_proj,   "mlp.gate_proj.weight",                    !moe,     I,     d, NORMAL)    \
    X(dense_up_proj,     "mlp.up_proj.weight",                      !moe,     I,     d, NORMAL)    \
    X(dense_down_proj,   "mlp.down_proj.weight",                    !moe,     d,     I, NORMAL)

typedef struct {
    const char *name;           // without "model.layers.l."
    size_t copies, rows, cols;
    enum Init init;
    enum Type type;
    size_t offset;              // in floats from the start of the weights, a multiple of 16
    real *data;                 // (copies, rows, cols); where type is not F32, for matrix() only
} Tensor;

typedef struct {                // only Tensors: a layer is also an array of LAYER_TENSOR_COUNT
#define X(field, ...) Tensor field;
    LAYER_TENSORS(X)
#undef X
} Layer;
enum { LAYER_TENSOR_COUNT = sizeof(Layer) / sizeof(Tensor) };

// All tensors twice over: as one array in file order, and by name. The gradients are a second
// struct of this kind.
typedef struct {
    Tensor *tensor;             // embed_tokens, the layers, norm, lm_head
    size_t n_tensors;
    Tensor *embed_tokens;       // (V, d)
    Layer *layer;               // [L]
    Tensor *norm;               // (d)
    Tensor *lm_head;            // (V, d); is embed_tokens where the two are tied
    size_t size;                // in floats, the gaps included
} Weights;

// One matrix where it lies, its rows ld numbers apart, so that a product can read any type.
typedef struct {
    const void *data;
    const float *scale;         // Q8: (rows, groups_of(ld))
    size_t ld;
    enum Type type;
} Matrix;

static const char HEAD_TENSORS[3][24] = { "embed_tokens.weight", "norm.weight", "lm_head.weight" };

// How many numbers a tensor holds, and where its copy e starts.
static size_t tensor_size(const Tensor *t) { return t->copies * t->rows * t->cols; }
static real *at(const Tensor *t, size_t e) { return t->data + e * t->rows * t->cols; }

// How many scales a row of n numbers has, and a size rounded up to whole cache lines.
static size_t groups_of(size_t n) { return (n + GROUP - 1) / GROUP; }
static size_t lines(size_t bytes) { return sum(bytes, 63) & ~(size_t)63; }

// The bytes from one copy of a tensor to the next in a file. In Q8 its int8 and its scales both
// start at multiples of 64.
static size_t copy_bytes(const Tensor *t) {
    const size_t size = product(t->rows, t->cols);
    if (t->type != Q8) return product(size, t->type == F32 ? sizeof(float) : sizeof(uint16_t));
    return sum(lines(size), lines(product(product(t->rows, groups_of(t->cols)), sizeof(float))));
}

// Numbers in memory as a matrix with rows ld numbers apart.
static Matrix plain(const real *x, size_t ld) { return (Matrix){ x, NULL, ld, F32 }; }

// Copy e of a tensor, from row `row` on.
static Matrix matrix(const Tensor *t, size_t e, size_t row) {
    if (t->type == F32) return plain(at(t, e) + row * t->cols, t->cols);
    const char *copy = (const char *)t->data + e * copy_bytes(t);
    if (t->type == BF16) return (Matrix){ copy + 2 * row * t->cols, NULL, t->cols, BF16 };
    const float *scale = (const float *)(const void *)(copy + lines(t->rows * t->cols));
    return (Matrix){ copy + row * t->cols, scale + row * groups_of(t->cols), t->cols, Q8 };
}

// Number i of a row.
static real weight(Matrix w, size_t row, size_t i) {
    const size_t k = row * w.ld + i;
    if (w.type == F32) return ((const real *)w.data)[k];
    if (w.type == Q8)
        return (real)(w.scale[row * groups_of(w.ld) + i / GROUP] * ((const int8_t *)w.data)[k]);
    const uint32_t bits = (uint32_t)((const uint16_t *)w.data)[k] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return (real)x;
}

// Lays out the tensors of a model: names, shapes, offsets. weights_bind then gives them memory.
// `up`: the upcycled kind, with coe_weights; `type`: of the matrices. Fails where sizes overflow.
static Weights weights_layout(const Config *c, int up, enum Type type) {
    const size_t V = c->vocab_size, d = c->hidden_size, L = c->num_hidden_layers,
        H = c->num_attention_heads, dn = c->qk_nope_head_dim, dr = c->qk_rope_head_dim,
        dv = c->v_head_dim, r = c->q_lora_rank, R = c->kv_lora_rank, E = c->n_routed_experts,
        f = c->moe_intermediate_size, S = c->n_shared_experts, I = c->intermediate_size,
        C = c->inner_iter, G = n_gates(c);
    const int biased = c->attention_bias != 0;
    const char *gate_name = c->use_igate ? "mlp.gate.%d.weight" : "mlp.gate.weight";
    Weights w = { .n_tensors = 3 + L * LAYER_TENSOR_COUNT };
    w.tensor = allocate(product(w.n_tensors, sizeof(Tensor)), "the list of tensors");
    w.embed_tokens = w.tensor;
    w.layer = (Layer *)(w.tensor + 1);
    w.norm = w.tensor + w.n_tensors - 2;
    w.lm_head = w.tensor + w.n_tensors - 1;
    *w.embed_tokens = (Tensor){ HEAD_TENSORS[0], 1, V, d, NORMAL, F32, 0, NULL };
    *w.norm = (Tensor){ HEAD_TENSORS[1], 1, 1, d, ONES, F32, 0, NULL };
    *w.lm_head = (Tensor){ HEAD_TENSORS[2], !c->tie_word_embeddings, V, d, NORMAL, F32, 0, NULL };
    for (size_t l = 0; l < L; l++) {
        const int moe = is_moe(c, l);
#define X(field, name, copies, rows, cols, init) \
        w.layer[l].field = (Tensor){ name, (size_t)(copies), rows, cols, init, F32, 0, NULL };
        LAYER_TENSORS(X)
#undef X
    }
    for (size_t i = 0; i < w.n_tensors; i++) {
        Tensor *t = &w.tensor[i];
        if (t->init == NORMAL) t->type = type;
        t->offset = w.size;
        w.size = sum(w.size, lines(product(t->copies, copy_bytes(t))) / sizeof(float));
    }
    product(w.size, 4 * sizeof(real));      // weights, gradients, both moments: countable in bytes
    if (c->tie_word_embeddings) w.lm_head = w.embed_tokens;
    return w;
}

// Points every tensor into `block`, which holds w->size numbers in file order: reals, or where the
// matrices are of a narrower type what the file holds.
static void weights_bind(Weights *w, void *block) {
    const size_t unit = w->tensor[0].type == F32 ? sizeof(real) : sizeof(float);
    for (size_t i = 0; i < w->n_tensors; i++) {
        Tensor *t = &w->tensor[i];
        t->data = t->copies ? (real *)(void *)((char *)block + unit * t->offset) : NULL;
    }
}

// The full name of copy e of tensor i, as in a checkpoint, into name[size]:
// "model.layers.3.mlp.experts.7.up_proj.weight".
static void tensor_name(char *name, size_t size, const Weights *w, size_t i, size_t e) {
    char part[96];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(part, sizeof part, w->tensor[i].name, (int)e);     // the format is a name of the table
#pragma GCC diagnostic pop
    if (i == 0 || i >= w->n_tensors - 2)
        snprintf(name, size, "%s%s", i == w->n_tensors - 1 ? "" : "model.", part);
    else
        snprintf(name, size, "model.layers.%zu.%s", (i - 1) / LAYER_TENSOR_COUNT, part);
}

typedef struct Tokenizer Tokenizer;         // [13]

typedef struct {
    Config config;
    int coe_weights;            // an upcycled DeepSeek-V2: y = y + coe_weights * experts(y)
    Tokenizer *tokenizer;       // NULL: none
    Weights w;
    real *weights;              // [w.size]
    char *files;                // the embedded files and the tokenizer's section, as in the file
    size_t files_bytes;         // without the section
    void *map;                  // the mapped file, or NULL where weights are allocated
    size_t map_bytes;
} Model;

// Fresh weights from a seed. Each tensor has a random stream of its own.
static void weights_init(Model *m, uint64_t seed) {
    for (size_t i = 0; i < m->w.n_tensors; i++) {
        Tensor *t = &m->w.tensor[i];
        uint64_t rng = seed * 0x2545F4914F6CDD1Du + i;
        rng = rng_next(&rng);
        const double bound = 1 / sqrt((double)m->config.hidden_size);
        const double deviation = m->config.initializer_range;
        for (size_t n = tensor_size(t), k = 0; k < n; k++)
            switch (t->init) {
            case NORMAL: t->data[k] = (real)(deviation * rng_normal(&rng)); break;
            case GATE:   t->data[k] = (real)(bound * (2 * rng_uniform(&rng) - 1)); break;
            case ONES:   t->data[k] = 1; break;
            case ZEROS:  t->data[k] = 0; break;
            }
    }
}

typedef struct {
    size_t total, bytes;                // parameters in all
    size_t active, active_bytes;        // those that one token is multiplied with, once per
                                        // iteration where the chain repeats them
    size_t last_ffn;                    // of the active, those behind the last layer's attention
} Parameters;

// How many there are. (Embedding rows are looked up, not multiplied.)
static Parameters count_parameters(const Model *m) {
    const Config *c = &m->config;
    const size_t K = c->num_experts_per_tok, C = c->inner_iter;
    Parameters p = { 0 };
    for (size_t i = 0; i < m->w.n_tensors; i++) {
        const Tensor *t = &m->w.tensor[i];
        size_t times = t->copies;       // that a copy is used per token
        if (strstr(t->name, ".experts.") && times) times = K * C;
        if (strstr(t->name, ".shared_experts.") || strstr(t->name, "mlp.gate.weight")) times *= C;
        if (t == m->w.embed_tokens && t != m->w.lm_head) times = 0;
        p.total += tensor_size(t);
        p.bytes += t->copies * copy_bytes(t);
        p.active += times * t->rows * t->cols;
        p.active_bytes += times * copy_bytes(t);
        if (t >= &m->w.layer[c->num_hidden_layers - 1].gate && t < m->w.norm)
            p.last_ffn += times * t->rows * t->cols;
    }
    return p;
}

// The resolved model in one line, on stderr.
static void print_model(const Model *m) {
    const Config *c = &m->config;
    const char *residual =
        m->coe_weights ? (c->outer_residual ? "coe_weights+outer" : "coe_weights") :
        c->inner_residual ? (c->outer_residual ? "inner+outer" : "inner") :
        c->outer_residual ? "outer" : "none";
    const Parameters p = count_parameters(m);
    fprintf(stderr, "model: d %lld, L %lld, E %lld, K %lld, C %lld, S %lld, residual %s, gates %s, "
            "%.3f M parameters, %.3f M active, %d thread%s\n",
            (long long)c->hidden_size, (long long)c->num_hidden_layers,
            (long long)c->n_routed_experts, (long long)c->num_experts_per_tok,
            (long long)c->inner_iter, (long long)c->n_shared_experts, residual,
            c->use_igate ? "own" : "shared", (double)p.total / 1e6, (double)p.active / 1e6,
            thread_count(), thread_count() == 1 ? "" : "s");
}

// ---- [5] the model file -------------------------------------------------------------------------
// Little-endian. Every section starts at a multiple of 64, so a mapped file can be used as it lies.
//
//     +--------------------+ 0
//     | header, 1024 bytes |  magic, sizes of the sections, the config
//     +--------------------+ 1024
//     | embedded files     |  tokenizer.json etc.: name (56 bytes), length (8), content, padding
//     +--------------------+
//     | tokenizer          |  the tables of [13]; empty for the byte tokenizer and for none
//     +--------------------+
//     | weights            |  the tensors of [4] in their order, each at a multiple of 64
//     +--------------------+
//     | training state     |  written by train.c, absent in a model that is only run
//     +--------------------+
//
// The header says how long each of them is, and the file must be exactly as long as that: what was
// cut off in a download, or belongs to another config, is found before the first weight is read.

enum { NO_TOKENIZER, BYTES, BPE };  // kinds of tokenizers
enum { HEADER_BYTES = 1024, MODEL_VERSION = 1 };

typedef struct {
    char magic[4];                  // "COE1"
    uint32_t version;
    uint64_t file_bytes, files_bytes, tokenizer_bytes, state_bytes;
    int64_t dtype;                  // of the matrices, an enum Type
    int64_t tokenizer, coe_weights;
    int64_t unused[8];
    Config config;
    char padding[HEADER_BYTES - 16 * 8 - sizeof(Config)];
} Header;
_Static_assert(sizeof(Header) == HEADER_BYTES, "the header is 1024 bytes");

// Ends the program and says what a file is that does not start like a model file, from its first n
// bytes.
static _Noreturn void not_a_model(const char *path, const char *head, size_t n) {
    const char *convert = "; python export.py makes a model.bin of a Hugging Face checkpoint";
    if (n == 0) fail(FAILED, "%s: is empty, must be a model file", path);
    if (n >= 4 && !memcmp(head, "1EOC", 4))
        fail(FAILED, "%s: was written on a machine of the other endianness, "
             "must be little-endian", path);
    if (n >= 4 && !memcmp(head, "GGUF", 4))
        fail(FAILED, "%s: is a GGUF file, must be a model file%s", path, convert);
    if (n > 9 && head[8] == '{' && head[9] == '"')
        fail(FAILED, "%s: is a safetensors file, must be a model file%s", path, convert);
    if (n >= 7 && !memcmp(head, "version", 7))
        fail(FAILED, "%s: is a git-LFS pointer, not the file itself: git lfs pull fetches it",
             path);
    if (*head == '{' || *head == '<')
        fail(FAILED, "%s: is %s text, must be a model file%s",
             path, *head == '{' ? "JSON" : "HTML", convert);
    fail(FAILED, "%s: starts with bytes %02x %02x, must start with \"COE1\"",
         path, (unsigned char)head[0], n > 1 ? (unsigned char)head[1] : 0u);
}

// The tokenizer of a file, from its section of so many bytes. In [13].
static Tokenizer *tokenizer_new(int64_t kind, char *section, size_t bytes, const char *path,
                                int64_t vocab_size);

// Checks everything that the header says against itself and against the file's size, and lays out
// the tensors: m gets its config and w, *h the header. `head` has HEADER_BYTES bytes.
static void read_header(Model *m, Header *h, const char *path, const char *head,
                        uint64_t file_bytes) {
    size_t n = file_bytes < HEADER_BYTES ? (size_t)file_bytes : HEADER_BYTES;
    if (n < 4 || memcmp(head, "COE1", 4)) not_a_model(path, head, n);
    if (n < HEADER_BYTES)
        fail(FAILED, "%s: is %zu bytes long, the header alone is %d", path, n, HEADER_BYTES);
    memcpy(h, head, sizeof *h);
    if (h->version != MODEL_VERSION)
        fail(FAILED, "%s: version is %u, this program reads version %d",
             path, h->version, MODEL_VERSION);
    if (h->file_bytes != file_bytes)
        fail(FAILED, "%s: is %llu bytes long, its header says %llu: cut off or damaged",
             path, (unsigned long long)file_bytes, (unsigned long long)h->file_bytes);
    if (h->dtype < F32 || h->dtype > Q8)
        fail(FAILED, "%s: weight type is %lld, must be 0 (float32), 1 (bfloat16) or 2 (int8)",
             path, (long long)h->dtype);
    if (h->tokenizer < 0 || h->tokenizer > BPE)
        fail(FAILED, "%s: tokenizer is %lld, must be 0 (none), 1 (bytes) or 2 (bpe)",
             path, (long long)h->tokenizer);
    if (h->coe_weights < 0 || h->coe_weights > 1)
        fail(FAILED, "%s: coe_weights is %lld, must be 0 or 1", path, (long long)h->coe_weights);
    if (h->tokenizer_bytes % 64 || (h->tokenizer_bytes != 0) != (h->tokenizer == BPE))
        fail(FAILED, "%s: the tokenizer takes %llu bytes, must be %s",
             path, (unsigned long long)h->tokenizer_bytes,
             h->tokenizer == BPE ? "a multiple of 64 and not 0" : "0");
    config_check(&h->config, path, FAILED);
    m->config = h->config;
    m->coe_weights = (int)h->coe_weights;
    if (m->coe_weights && h->config.inner_iter < 2)
        fail(FAILED, "%s: inner_iter is 1, must be at least 2 with coe_weights", path);
    // A layer takes 64 bytes or more. So a file that is too small for its number of layers is
    // found before the list of their tensors takes up memory.
    if ((uint64_t)h->config.num_hidden_layers * 64 > file_bytes)
        fail(FAILED, "%s: num_hidden_layers is %lld, more than a file of %llu bytes holds",
             path, (long long)h->config.num_hidden_layers, (unsigned long long)file_bytes);
    m->w = weights_layout(&m->config, m->coe_weights, (enum Type)h->dtype);
    size_t sections = sum(sum(h->files_bytes, h->state_bytes), product(m->w.size, 4));
    size_t expected = sum(HEADER_BYTES, sum(h->tokenizer_bytes, sections));
    if (expected != file_bytes || h->files_bytes % 64)
        fail(FAILED, "%s: is %llu bytes long, but this config needs %zu: header and file disagree",
             path, (unsigned long long)file_bytes, expected);
}

// Reads exactly `bytes` from a file, or ends the program.
static void read_exactly(void *to, size_t bytes, FILE *file, const char *path) {
    if (fread(to, 1, bytes, file) != bytes)
        fail(FAILED, "%s: ends early or cannot be read (%s)",
             path, errno ? strerror(errno) : "end of file");
}

// Reads n float32 numbers.
static void read_floats(real *to, size_t n, FILE *file, const char *path) {
    float chunk[4096];
    for (size_t i = 0; i < n; ) {
        size_t k = n - i < 4096 ? n - i : 4096;
        read_exactly(chunk, k * sizeof(float), file, path);
        for (size_t j = 0; j < k; j++) to[i++] = (real)chunk[j];
    }
}

// Opens a regular file and tells its size. Directories and pipes open too on some systems, hence
// the checks.
static FILE *open_regular(const char *path, uint64_t *bytes) {
    errno = 0;
#ifndef _WIN32
    struct stat info = { 0 };   // asked for before fopen, which would wait for a pipe's other end
    if (!stat(path, &info) && !S_ISREG(info.st_mode))
        fail(FAILED, "%s: is %s, must be a regular file",
             path, S_ISDIR(info.st_mode) ? "a directory" : "a device or pipe");
#endif
    FILE *file = fopen(path, "rb");
    if (!file) fail(FAILED, "%s: cannot be opened: %s", path, strerror(errno));
#ifndef _WIN32
    if (fstat(fileno(file), &info))
        fail(FAILED, "%s: cannot be examined: %s", path, strerror(errno));
    *bytes = (uint64_t)info.st_size;
#else
    _fseeki64(file, 0, SEEK_END);
    *bytes = (uint64_t)_ftelli64(file);
    rewind(file);
#endif
    return file;
}

#ifndef _WIN32
// A mapped file that another program cuts short raises SIGBUS where the missing page is touched.
// Only write() and _exit() are safe in a signal handler.
static void on_sigbus(int signal_number) {
    (void)signal_number;
    static const char text[] = "error: the model file became shorter while it was read\n";
    if (write(2, text, sizeof text - 1) < 0) _exit(FAILED);
    _exit(FAILED);
}
#endif

// Makes the weights of a model that was read from a narrower type float32, in memory of their own.
static void widen(Model *m) {
    Weights wide = weights_layout(&m->config, m->coe_weights, F32);
    real *block = allocate(product(wide.size, sizeof(real)), "the weights");
    weights_bind(&wide, block);
    for (size_t i = 0; i < wide.n_tensors; i++) {
        const Tensor *from = &m->w.tensor[i], *to = &wide.tensor[i];
        const float *floats = (const float *)(const void *)from->data;
        for (size_t k = 0; k < to->copies * to->rows; k++)
            for (size_t j = 0; j < to->cols; j++)
                to->data[k * to->cols + j] = from->type == F32 ? (real)floats[k * to->cols + j]
                    : weight(matrix(from, k / to->rows, k % to->rows), 0, j);
    }
    release(m->weights);
    release(m->w.tensor);
    m->w = wide;
    m->weights = block;
}

// Opens a model file, or ends the program. With `to_train` the weights are read into memory, as
// float32; otherwise they are mapped, so that starting takes no longer for a large model and pages
// come as they are used. *state, if wanted, is the file, still open, at its training state of
// *state_bytes bytes; that works with to_train only.
static Model model_open(const char *path, int to_train, FILE **state, uint64_t *state_bytes) {
    Model m = { 0 };
    Header h;
    uint64_t bytes;
    FILE *file = open_regular(path, &bytes);
    char head[HEADER_BYTES] = { 0 };
    errno = 0;
    read_exactly(head, bytes < HEADER_BYTES ? (size_t)bytes : HEADER_BYTES, file, path);
    read_header(&m, &h, path, head, bytes);
    m.files_bytes = (size_t)h.files_bytes;
    const size_t before_weights = m.files_bytes + (size_t)h.tokenizer_bytes;
    m.files = allocate(before_weights, "the embedded files");
    read_exactly(m.files, before_weights, file, path);
    m.tokenizer = tokenizer_new(h.tokenizer, m.files + m.files_bytes, (size_t)h.tokenizer_bytes,
                                path, h.config.vocab_size);
#ifndef _WIN32
    if (!to_train && sizeof(real) == sizeof(float)) {
        m.map_bytes = (size_t)bytes;
        m.map = mmap(NULL, m.map_bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
        if (m.map == MAP_FAILED) fail(FAILED, "%s: cannot be mapped: %s", path, strerror(errno));
        signal(SIGBUS, on_sigbus);
        m.weights = (real *)(void *)((char *)m.map + HEADER_BYTES + before_weights);
    }
#endif
    if (!m.map) {
        m.weights = allocate(product(m.w.size, sizeof(real)), "the weights");
        if (h.dtype == F32) read_floats(m.weights, m.w.size, file, path);
        else read_exactly(m.weights, m.w.size * sizeof(float), file, path);
    }
    weights_bind(&m.w, m.weights);
    if (h.dtype != F32 && (to_train || sizeof(real) != sizeof(float))) widen(&m);
    if (state) *state = file; else fclose(file);
    if (state_bytes) *state_bytes = h.state_bytes;
    return m;
}

// Gives back the memory of a model, or its mapping; m is empty then.
static void model_free(Model *m) {
#ifndef _WIN32
    if (m->map) munmap(m->map, m->map_bytes); else
#endif
    release(m->weights);
    release(m->w.tensor);
    release(m->tokenizer);
    release(m->files);
    memset(m, 0, sizeof *m);
}

// ---- [6] operations on rows ---------------------------------------------------------------------
// A compiler may not reorder a sum of floats, so a plain loop over one adds one number at a time.
// Where a sum matters for speed it is written with vectors, the widest that the machine has
// registers for.
//
// A build for any x86-64 may count on 16 bytes only, and on no fused multiply-adds, but nearly all
// of these machines have more. So it has its WIDE functions twice, and starting it links those that
// the processor can run: half as fast as a build for AVX-512, and not a fifth. (-DONE_VERSION does
// without.) The warning, that how a vector is passed to a function depends on the version, concerns
// no one: only INLINE functions get any.

#if defined(__x86_64__) && !defined(__AVX__) && defined(__GLIBC__) && !defined(ONE_VERSION)
#if __has_attribute(target_clones)
#define TWO_VERSIONS
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define PANEL_VECTORS 4         // 32 registers of 64 bytes: see [7] for the 4
#elif defined(__AVX__) || defined(TWO_VERSIONS)
#define VECTOR_BYTES 32
#define PANEL_VECTORS 2         // 16 registers of 32
#elif defined(__ARM_NEON)
#define VECTOR_BYTES 16
#define PANEL_VECTORS 4         // 32 registers of 16
#else
#define VECTOR_BYTES 16
#define PANEL_VECTORS 2
#endif
enum { LANES = VECTOR_BYTES / sizeof(real) };
typedef real vec  __attribute__((vector_size(VECTOR_BYTES)));
// The same at any address.
typedef real uvec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
// As many 32-bit words of a file, and what they turn into on the way to a vec.
typedef uint32_t vec_u32  __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec_u32 __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float vec_f32     __attribute__((vector_size(4 * LANES)));

// WIDE functions take most of the time; INLINE ones are their insides.
#if defined(TWO_VERSIONS)
#define WIDE __attribute__((target_clones("default", "fma")))
#define INLINE static inline __attribute__((always_inline))
#elif defined(__clang__) && __has_attribute(min_vector_width)
// clang would split 64-byte vectors in two, for processors on which they slow down the clock.
#define WIDE __attribute__((min_vector_width(512)))
#define INLINE WIDE static inline __attribute__((always_inline))
#else
#define WIDE
#define INLINE static inline __attribute__((always_inline))
#endif

// LANES numbers from p on.
INLINE vec load(const real *p) { return *(const uvec *)p; }

// The lanes of a vector added up, always in the same order.
INLINE real add_lanes(const vec *v) {
    real a[LANES];
    memcpy(a, v, sizeof a);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a[i] += a[i + width];
    return a[0];
}

// sum_i x_i y_i
WIDE static real dot(const real *x, const real *y, size_t n) {
    vec s0 = { 0 }, s1 = { 0 };     // two sums, because one must wait for itself
    size_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        s0 += load(x + i) * load(y + i);
        s1 += load(x + i + LANES) * load(y + i + LANES);
    }
    real tail = 0;
    for (; i < n; i++) tail += x[i] * y[i];
    s0 += s1;
    return add_lanes(&s0) + tail;
}

// e^x to 2 units in the last place, in a form that the compiler can vectorise (libm's is a call).
// x = k ln 2 + r with |r| <= ln 2 / 2: e^r is its Taylor series, 2^k is written into the exponent
// bits. |x| is cut at 87, where float's normal range ends; a NaN stays one.
INLINE real exp_fast(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    const float magic = 12582912.0f;            // 1.5 * 2^23: adding it rounds to a whole number
    float v = x < -87 ? -87.0f : x > 87 ? 87.0f : (float)x;
    float shifted = v * 1.44269504f + magic, k = shifted - magic;
    // ln 2 in two parts, the first with so few bits that k times it is exact.
    float r = v - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 +
              r * (1.0f / 120 + r * (1.0f / 720 + r / 5040))))));
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000u;          // the low bits are k; 0x3F800000 is 1.0
    float power;
    memcpy(&power, &bits, sizeof power);
    return (real)(p * power);
}

// 1 / (1 + e^-x)
INLINE real sigmoid(real x) { return 1 / (1 + exp_fast(-x)); }

// Whether work of this many operations repays waking the other threads (a few microseconds). Where
// all are at work already it does not.
static int worth_threads(size_t operations) { return operations > 20000 && !at_work(); }

// SHARED(operations, for (...) { ... }) is the loop, on all threads if that is worth it. If not, it
// does not reach the pragma: OpenMP would make a team of one, which takes longer than a small loop.
#define SHARED(operations, ...) \
    if (worth_threads(operations)) { _Pragma("omp parallel for") __VA_ARGS__ } \
    else { __VA_ARGS__ }

// Calls piece(job, i) for all i < n, on all threads if the operations are worth it.
static void share_out(void (*piece)(const void *job, size_t i), const void *job, size_t n,
                      size_t operations) {
    SHARED(operations, for (size_t i = 0; i < n; i++) piece(job, i);)
}

// y_i = w_i x_i / rms,  1 / rms = (mean_j x_j^2 + eps)^(-1/2)
// y (n, d) at stride ldy, x (n, d) at stride ldx, w (d).  kept: inverse (n) = 1 / rms, unless NULL
static void rmsnorm(real *y, size_t ldy, real *inverse, const real *x, size_t ldx, const Tensor *w,
                    size_t n, real eps) {
    const size_t d = w->cols;
    SHARED(n * d, for (size_t t = 0; t < n; t++) {
        const real *xt = x + t * ldx;
        real *yt = y + t * ldy;
        real scale = 1 / (real)sqrt(dot(xt, xt, d) / (real)d + eps);
        for (size_t i = 0; i < d; i++) yt[i] = w->data[i] * (xt[i] * scale);
        if (inverse) inverse[t] = scale;
    })
}

// The largest of n numbers. LANES of them at a time, because a compiler keeps to the order of a
// plain loop.
WIDE static real max_of(const real *x, size_t n) {
    real lanes[LANES], max = x[0];
    for (int j = 0; j < LANES; j++) lanes[j] = x[0];
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
    for (; i < n; i++) max = x[i] > max ? x[i] : max;
    for (int j = 0; j < LANES; j++) max = lanes[j] > max ? lanes[j] : max;
    return max;
}

// The sum of n numbers, in the same way.
WIDE static real sum_of(const real *x, size_t n) {
    vec lanes = { 0 };
    real tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) lanes += load(x + i);
    for (; i < n; i++) tail += x[i];
    return add_lanes(&lanes) + tail;
}

// x_i = e^(scale (x_i - max)) / sum, in place; x (n). *total, if wanted: log sum_i e^(scale x_i).
WIDE static void softmax(real *x, size_t n, real scale, real *total) {
    const real max = max_of(x, n);
    for (size_t i = 0; i < n; i++) x[i] = exp_fast(scale * (x[i] - max));
    const real all = sum_of(x, n), inverse = 1 / all;
    for (size_t i = 0; i < n; i++) x[i] *= inverse;
    if (total) *total = scale * max + (real)log(all);
}

// ---- [7] matrix products ------------------------------------------------------------------------
// All of training is one product, c = a b, met in three forms: y = x w^T forward, dx = dy w and
// dw = dy^T x backward. They differ in strides only, so there is one kernel.
//
// Its heart, tile(), computes 6 rows by PANEL_VECTORS vectors of c. These 24 sums (with 32
// registers) stay in registers while k runs: each step loads 4 vectors of b and 6 numbers of a for
// 24 fused multiply-adds, two of which the machine starts per cycle. 10 loads in 12 cycles leave
// room, and 24 independent sums hide that each takes 4 cycles. Fewer rows would wait for loads, and
// more would not fit.
//
// Where b is w^T, or of a narrow type, it is copied on the way, PANEL_DEPTH rows and one tile wide,
// into a panel that serves a whole block of rows of a. Where it is w itself it is read in place
// (except at a ragged right edge): what a tile needs of a row is contiguous, and that the rows lie
// far apart is hidden by asking for each some steps early.
//
// Each c is summed over k in one fixed order, whatever tile or thread it falls to: the number of
// threads does not change a bit.

enum { TILE_ROWS = 6, TILE_COLS = PANEL_VECTORS * LANES, PANEL_DEPTH = 256, AHEAD = 8,
       BLOCK_ROWS = 32 * TILE_ROWS,
       CACHE_NUMBERS = 1 << 19 };       // what a core keeps close: 2 MB of floats

// c (rows, vectors * LANES) = a b, or += with `add`, over depth k: a[i][k] at a[i * ai + k * ak],
// b[k][j] at b[k * ldb + j], c[i][j] at c[i * ldc + j]. Inlined with constant `rows` and `vectors`:
// only then do the sums live in registers. The prefetches use the room for loads: c is needed at
// the end, and rows of b in place follow no pattern that the processor would guess. (Those past b's
// end are harmless: a prefetch cannot fault.)
INLINE void tile(real *c, size_t ldc, const real *a, size_t ai, size_t ak, const real *b,
                 size_t ldb, size_t depth, int rows, int vectors, int add) {
    vec s[TILE_ROWS][PANEL_VECTORS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) {
            s[i][j] = (vec){ 0 };
            __builtin_prefetch(c + (size_t)i * ldc + (size_t)j * LANES, 1);
        }
    for (size_t k = 0; k < depth; k++) {
        vec bk[PANEL_VECTORS];
        for (int j = 0; j < vectors; j++) {
            bk[j] = load(b + k * ldb + (size_t)j * LANES);
            __builtin_prefetch(b + (k + AHEAD) * ldb + (size_t)j * LANES);
        }
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) s[i][j] += a[(size_t)i * ai + k * ak] * bk[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) {
            uvec *to = (uvec *)(c + (size_t)i * ldc + (size_t)j * LANES);
            *to = add ? (vec)(*to + s[i][j]) : s[i][j];
        }
}

// tile() for a number of rows and vectors known only now.
WIDE static void tile_of(real *c, size_t ldc, const real *a, size_t ai, size_t ak, const real *b,
                         size_t ldb, size_t depth, size_t rows, size_t vectors, int add) {
#define TILE(m, n) \
    case m * PANEL_VECTORS + n: tile(c, ldc, a, ai, ak, b, ldb, depth, m, n, add); break;
#if PANEL_VECTORS == 4
#define ROWS(m) TILE(m, 1) TILE(m, 2) TILE(m, 3) TILE(m, 4)
#else
#define ROWS(m) TILE(m, 1) TILE(m, 2)
#endif
    switch (rows * PANEL_VECTORS + vectors) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
#undef ROWS
#undef TILE
}

// The same for `cols` <= TILE_COLS columns; b has room for whole vectors. If they are not whole
// vectors of c, the tile is computed beside it and copied.
WIDE static void tile_cols(real *c, size_t ldc, const real *a, size_t ai, size_t ak,
                           const real *b, size_t ldb, size_t depth, size_t rows, size_t cols,
                           int add) {
    const size_t vectors = (cols + LANES - 1) / LANES;
    if (cols % LANES == 0) {
        tile_of(c, ldc, a, ai, ak, b, ldb, depth, rows, vectors, add);
        return;
    }
    real edge[TILE_ROWS * TILE_COLS];
    tile_of(edge, TILE_COLS, a, ai, ak, b, ldb, depth, rows, vectors, 0);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++)
            c[i * ldc + j] = edge[i * TILE_COLS + j] + (add ? c[i * ldc + j] : 0);
}

// The halves of two vectors, interleaved: a0 b0 a1 b1 ..., and the same from the middle on.
#if !defined(REAL_IS_FLOAT) || !(defined(__clang__) || __GNUC__ >= 12)
#elif VECTOR_BYTES == 64
#define RIFFLE_LOW(a, b)  __builtin_shufflevector(a, b, \
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define RIFFLE_HIGH(a, b) __builtin_shufflevector(a, b, \
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VECTOR_BYTES == 32
#define RIFFLE_LOW(a, b)  __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define RIFFLE_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define RIFFLE_LOW(a, b)  __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define RIFFLE_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#endif

// Weights of the narrow types come out of 32-bit words with a shift and a mask, which any processor
// can do to a whole vector: a word holds per_word() of them. LANES words starting at column i have,
// as part k, the columns i + k, i + P + k, i + 2 P + k, ... with P = per_word(). Those of BF16 are
// the upper half of a float. A byte of Q8 becomes the lowest bits of one, under an exponent that
// makes their unit 1: with its sign bit turned over it reads 2^23 + 128 + byte. Where it is the
// second byte from below, an exponent 8 less saves a shift.
INLINE size_t per_word(enum Type type) { return type == F32 ? 1 : type == BF16 ? 2 : 4; }

// Where column i of a row is. `type` is w.type, here and below a constant where this is inlined.
INLINE const void *place(Matrix w, size_t row, size_t i, enum Type type) {
    return (const char *)w.data + (row * w.ld + i) *
           (type == F32 ? sizeof(real) : type == BF16 ? sizeof(uint16_t) : sizeof(int8_t));
}

// Part k of the LANES words of a row that start at column i; in Q8 without the scale, which they
// share.
INLINE vec load_part(Matrix w, size_t row, size_t i, size_t k, enum Type type) {
    if (type == F32) return load(place(w, row, i, type));
    const vec_u32 words = *(const uvec_u32 *)place(w, row, i, type);
    const vec_u32 low = k < 2 ? words : words >> 16;
    const vec_u32 bits = type == BF16 ? (k ? words & 0xFFFF0000u : words << 16)
                         : k % 2 ? (low & 0xFF00u) ^ 0x47008000u : (low & 0xFFu) ^ 0x4B000080u;
    vec_f32 x;
    memcpy(&x, &bits, sizeof x);
    if (type == Q8) x -= (k % 2 ? 0x1p15f : 0x1p23f) + 128;
    return __builtin_convertvector(x, vec);
}

// The same with the scale.
INLINE vec load_scaled(Matrix w, size_t row, size_t i, size_t k, enum Type type) {
    const vec x = load_part(w, row, i, k, type);
    return type == Q8 ? x * w.scale[row * groups_of(w.ld) + i / GROUP] : x;
}

// Writes LANES rows of b, part k of the words at column i, as columns of a panel: part k's columns
// become rows P apart. Riffling the rows like two halves of a pack of cards, log2(LANES) times,
// transposes them: every round moves the highest bit of the row's number to the lowest of the
// column's.
INLINE void transpose_square(real *panel, Matrix b, size_t row, size_t i, size_t k,
                             enum Type type) {
    const size_t stride = per_word(type) * TILE_COLS;
    vec x[LANES];
    for (size_t j = 0; j < LANES; j++) x[j] = load_scaled(b, row + j, i, k, type);
    panel += k * TILE_COLS;
#ifdef RIFFLE_LOW
    vec y[LANES];
    for (int round = 1; round < LANES; round *= 2) {
        for (int j = 0; j < LANES / 2; j++) {
            y[2 * j] = RIFFLE_LOW(x[j], x[j + LANES / 2]);
            y[2 * j + 1] = RIFFLE_HIGH(x[j], x[j + LANES / 2]);
        }
        for (int j = 0; j < LANES; j++) x[j] = y[j];
    }
    for (size_t j = 0; j < LANES; j++) *(uvec *)(panel + j * stride) = x[j];
#else
    for (size_t j = 0; j < LANES; j++)
        for (size_t e = 0; e < LANES; e++) panel[j * stride + e] = x[e][j];
#endif
}

// panel[k][j] = b[k0 + k][j0 + j], or of b's transpose, for k < depth, j < cols, in rows of
// TILE_COLS; 0 from there on, up to a whole vector.
INLINE void pack_of(real *panel, Matrix b, int transposed, size_t k0, size_t j0, size_t depth,
                    size_t cols, enum Type type) {
    const size_t whole = (cols + LANES - 1) / LANES * LANES, P = per_word(type);
    if (!transposed) {
        for (size_t k = 0; k < depth; k++) {
            real *to = panel + k * TILE_COLS;
            size_t j = 0;
            for (; j + P * LANES <= cols; j += P * LANES)
                for (size_t part = 0; part < P; part++) {
                    const vec x = load_scaled(b, k0 + k, j0 + j, part, type);
                    if (P == 1) *(uvec *)(to + j) = x;
                    else for (size_t i = 0; i < LANES; i++) to[j + P * i + part] = x[i];
                }
            for (; j < whole; j++) to[j] = j < cols ? weight(b, k0 + k, j0 + j) : 0;
        }
        return;
    }
    for (size_t j = 0; j < whole; j += LANES) {
        size_t k = 0;
        if (cols - j >= LANES)
            for (; k + P * LANES <= depth; k += P * LANES)
                for (size_t part = 0; part < P; part++)
                    transpose_square(panel + k * TILE_COLS + j, b, j0 + j, k0 + k, part, type);
        for (; k < depth; k++)
            for (size_t i = j; i < j + LANES; i++)
                panel[k * TILE_COLS + i] = i < cols ? weight(b, j0 + i, k0 + k) : 0;
    }
}

// The same for any type.
WIDE static void pack(real *panel, Matrix b, int transposed, size_t k0, size_t j0, size_t depth,
                      size_t cols) {
    if (b.type == F32) pack_of(panel, b, transposed, k0, j0, depth, cols, F32);
    else if (b.type == BF16) pack_of(panel, b, transposed, k0, j0, depth, cols, BF16);
    else pack_of(panel, b, transposed, k0, j0, depth, cols, Q8);
}

// c (M, N) = a b, or += with `add`: c[i][j] at c[i * ldc + j], a[i][k] at a[i * ai + k * ak]; b, or
// its transpose, is (K, N); K > 0. The rest is gemm()'s own: c is cut into down x across blocks,
// each the work of one thread, and from .. to is the slice of K at work.
typedef struct {
    real *c; size_t ldc;
    const real *a; size_t ai, ak;
    Matrix b; int transposed;
    size_t M, N, K;
    int add;
    size_t from, to, down, across;
} Gemm;

// One block of c: TILE_COLS columns, and as many rows as other blocks have, but for one tile, so
// that threads end together.
static void gemm_block(const Gemm *g, size_t block) {
    static _Thread_local real panel[PANEL_DEPTH * TILE_COLS] __attribute__((aligned(64)));
    const size_t down = block / g->across, tiles = (g->M + TILE_ROWS - 1) / TILE_ROWS;
    const size_t top = tiles * down / g->down * TILE_ROWS, j0 = block % g->across * TILE_COLS;
    const size_t below = tiles * (down + 1) / g->down * TILE_ROWS;
    const size_t end = below < g->M ? below : g->M;
    const size_t cols = g->N - j0 < TILE_COLS ? g->N - j0 : TILE_COLS;
    const Matrix b = g->b;
    const int in_place = !g->transposed && b.type == F32 && cols % LANES == 0;
    for (size_t k0 = g->from; k0 < g->to; k0 += PANEL_DEPTH) {
        const size_t depth = g->to - k0 < PANEL_DEPTH ? g->to - k0 : PANEL_DEPTH;
        const real *from = in_place ? (const real *)b.data + k0 * b.ld + j0 : panel;
        if (!in_place) pack(panel, b, g->transposed, k0, j0, depth, cols);
        for (size_t i = top; i < end; i += TILE_ROWS)
            tile_cols(g->c + i * g->ldc + j0, g->ldc, g->a + i * g->ai + k0 * g->ak, g->ai, g->ak,
                      from, in_place ? b.ld : TILE_COLS, depth,
                      end - i < TILE_ROWS ? end - i : TILE_ROWS, cols, g->add || k0);
    }
}

// All of it. Blocks are smaller where there would be too few for the threads to end together, but
// not so small that a panel would not be worth its copying. Where K is long and c is not, it goes
// in slices of K, so that what all blocks read of a and b stays in the cache meanwhile.
static void gemm(Gemm g) {
    const size_t tiles = (g.M + TILE_ROWS - 1) / TILE_ROWS, least = g.transposed ? 8 : 1;
    const int shared = worth_threads(g.M * g.N * g.K / 16);
    g.across = (g.N + TILE_COLS - 1) / TILE_COLS;
    g.down = (g.M + BLOCK_ROWS - 1) / BLOCK_ROWS;
    while (shared && g.down * least < tiles && g.down * g.across < 4 * (size_t)thread_count())
        g.down++;
    const size_t blocks = g.down * g.across;
    size_t slice = CACHE_NUMBERS / (g.M + g.N) / PANEL_DEPTH * PANEL_DEPTH;
    if (!slice || g.M * g.N > CACHE_NUMBERS) slice = g.K;
    for (; g.from < g.K; g.from = g.to) {
        g.to = g.K - g.from < slice ? g.K : g.from + slice;
        if (!shared) {
            for (size_t block = 0; block < blocks; block++) gemm_block(&g, block);
            continue;
        }
        Work work = { .n = blocks };
        #pragma omp parallel
        for (size_t block; (block = next_piece(&work)) < blocks; ) gemm_block(&g, block);
    }
}

// The lanes of each of four vectors added up. Riffling two vectors and adding the halves makes one
// vector of their sums, at half the length each.
INLINE void add_lanes_of_four(real total[4], const vec s[4]) {
#ifdef RIFFLE_LOW
    const vec a = RIFFLE_LOW(s[0], s[1]) + RIFFLE_HIGH(s[0], s[1]);
    const vec b = RIFFLE_LOW(s[2], s[3]) + RIFFLE_HIGH(s[2], s[3]);
    const vec c = RIFFLE_LOW(a, b) + RIFFLE_HIGH(a, b);     // lanes of rows 0, 2, 1, 3, 0, 2, 1, 3
    real part[LANES];
    memcpy(part, &c, sizeof part);
    for (size_t half = LANES / 2; half >= 4; half /= 2)
        for (size_t i = 0; i < half; i++) part[i] += part[i + half];
    for (size_t i = 0; i < 4; i++) total[(i * 2 + i / 2) % 4] = part[i];
#else
    for (size_t k = 0; k < 4; k++) total[k] = add_lanes(&s[k]);
#endif
}

// s[t][k] += row row[k] of w times row t of x, lane by lane, for n rows of x and the columns from
// begin to end, of which column `first` of w is the 0th; x is in the order of spread(). Four rows
// of w keep enough loads on their way, and the next four are asked for early: the processor guesses
// by itself what is read next only within a page of 4 KB.
INLINE void add_products(vec s[][4], const real *x, size_t ldx, Matrix w, const size_t row[4],
                         size_t first, size_t begin, size_t end, size_t n, enum Type type) {
    const size_t P = per_word(type);
    for (size_t i = begin; i < end; i += P * LANES) {
        for (size_t k = 0; k < 4; k++)
            __builtin_prefetch(place(w, row[k] + 4, first + i, type));
        for (size_t part = 0; part < P; part++) {
            vec wi[4];
            for (size_t k = 0; k < 4; k++) wi[k] = load_part(w, row[k], first + i, part, type);
            for (size_t t = 0; t < n; t++)
                for (size_t k = 0; k < 4; k++)
                    s[t][k] += load(x + t * ldx + i + part * LANES) * wi[k];
        }
    }
}

// The most rows of x whose sums with four rows of w fit registers, beside 4 for w and 1 for x.
enum { FEW = PANEL_VECTORS == 4 ? 6 : 3 };

// y[t][j .. j + 3] (of the `out` that there are) = rows j .. of w times row t of x, or += with
// `add`, for n <= FEW rows of x and `in` columns of w from `first` on. In Q8, where n is 1, the sum
// over a group is scaled.
INLINE void four_rows(real *y, size_t ldy, const real *x, size_t ldx, Matrix w, size_t j,
                      size_t first, size_t in, size_t out, size_t n, int add, enum Type type) {
    const size_t words = per_word(type) * LANES, whole = in / words * words;
    size_t row[4];
    for (size_t k = 0; k < 4; k++) row[k] = j + k < out ? j + k : out - 1;
    vec s[FEW][4], g[1][4];
    for (size_t t = 0; t < n; t++)
        for (size_t k = 0; k < 4; k++) s[t][k] = (vec){ 0 };
    if (type == Q8)
        for (size_t begin = 0; begin < whole; begin += GROUP) {
            const size_t end = whole - begin < GROUP ? whole : begin + GROUP;
            const float *scale = w.scale + (first + begin) / GROUP;
            for (size_t k = 0; k < 4; k++) g[0][k] = (vec){ 0 };
            add_products(g, x, ldx, w, row, first, begin, end, n, type);
            for (size_t k = 0; k < 4; k++) s[0][k] += g[0][k] * scale[row[k] * groups_of(w.ld)];
        }
    else
        add_products(s, x, ldx, w, row, first, 0, whole, n, type);
    vec sums[FEW][4];           // clang would not keep s in registers if it were used below
    for (size_t t = 0; t < n; t++)
        for (size_t k = 0; k < 4; k++) sums[t][k] = s[t][k];
    for (size_t t = 0; t < n; t++) {
        real total[4];
        add_lanes_of_four(total, sums[t]);
        for (size_t k = 0; k < 4 && j + k < out; k++) {
            for (size_t i = whole; i < in; i++)
                total[k] += x[t * ldx + i] * weight(w, j + k, first + i);
            y[t * ldy + j + k] = (add ? y[t * ldy + j + k] : 0) + total[k];
        }
    }
}

// four_rows() of one row of x, for a type known only now.
WIDE static void rows_of(real *y, const real *x, Matrix w, size_t j, size_t first, size_t in,
                         size_t out, int add) {
    if (w.type == F32) four_rows(y, 0, x, 0, w, j, first, in, out, 1, add, F32);
    else if (w.type == BF16) four_rows(y, 0, x, 0, w, j, first, in, out, 1, add, BF16);
    else four_rows(y, 0, x, 0, w, j, first, in, out, 1, add, Q8);
}

// Four rows of w in y = x w^T, which is what the job says (a Gemm), for 2 to FEW rows of x at once.
WIDE static void rows_at_once(const void *job, size_t four) {
    const Gemm *g = job;
#define ROWS(m) case m: \
    four_rows(g->c, g->ldc, g->a, g->ai, g->b, 4 * four, 0, g->K, g->N, m, g->add, F32); break;
    switch (g->M) {
        ROWS(2) ROWS(3)
#if PANEL_VECTORS == 4
        ROWS(4) ROWS(5) ROWS(6)
#endif
    }
#undef ROWS
}

// Copies n numbers of x to where load_part() wants them: of each P * LANES, those that belong to
// part 0 come first. What is left over keeps its order.
static void spread(real *to, const real *x, size_t n, size_t P) {
    size_t i = 0;
    for (; i + P * LANES <= n; i += P * LANES)
        for (size_t k = 0; k < P; k++)
            for (size_t l = 0; l < LANES; l++) to[i + k * LANES + l] = x[i + l * P + k];
    for (; i < n; i++) to[i] = x[i];
}

// y (n, out) = x (n, in) w (out, in)^T, or += with `add`, for one row, or n <= FEW with a w of a
// narrow type: every number of w is used n times only, so what counts is reading it in order.
enum { FEW_COLS = 4096 };
static void few_rows(real *y, size_t ldy, const real *x, size_t ldx, Matrix w,
                     size_t n, size_t in, size_t out, int add) {
    real ready[FEW * FEW_COLS];
    size_t width = in, ld = ldx;
    for (size_t first = 0; first < in; first += width, add = 1) {
        const real *from = x;
        if (w.type != F32) {
            width = in - first < FEW_COLS ? in - first : FEW_COLS;
            for (size_t t = 0; t < n; t++)
                spread(ready + t * FEW_COLS, x + t * ldx + first, width, per_word(w.type));
            from = ready, ld = FEW_COLS;
        }
        SHARED(width * out, for (size_t j = 0; j < out; j += 4) {
            for (size_t t = 0; t < n; t++)
                rows_of(y + t * ldy, from + t * ld, w, j, first, width, out, add);
        })
    }
}

// x (in) = w (out, in)^T y (out), or += with `add`, for a narrow type: gemm() would make a panel of
// floats for a single use.
INLINE void sum_rows(real *x, const real *y, Matrix w, size_t in, size_t out, int add,
                     enum Type type) {
    const size_t P = per_word(type);
    size_t i = 0;
    for (; i + P * LANES <= in; i += P * LANES) {
        vec s[4] = { { 0 } };
        for (size_t k = 0; k < out; k++) {
            __builtin_prefetch(place(w, k + AHEAD, i, type));
            for (size_t part = 0; part < P; part++)
                s[part] += y[k] * load_scaled(w, k, i, part, type);
        }
        for (size_t j = 0; j < P * LANES; j++)
            x[i + j] = (add ? x[i + j] : 0) + s[j % P][j / P];
    }
    for (; i < in; i++) {
        real total = add ? x[i] : 0;
        for (size_t k = 0; k < out; k++) total += y[k] * weight(w, k, i);
        x[i] = total;
    }
}

// y (out) = w (out, in) x (in); x is in the order of spread().
typedef struct { real *y; const real *x; Matrix w; size_t in, out; } Product;
enum { MOST_PRODUCTS = 128 };

// Four rows of several products: end[k] says how many fours there are up to the end of product k.
static void product_rows(const Product *p, const size_t *end, size_t four) {
    size_t k = 0;
    while (four >= end[k]) k++;
    rows_of(p[k].y, p[k].x, p[k].w, 4 * (four - (k ? end[k - 1] : 0)), 0, p[k].in, p[k].out, 0);
}

// n <= MOST_PRODUCTS of them, whose rows the threads share as if they were one: where matrices are
// small, meeting once for each would take longer than the work.
static void products(const Product *p, size_t n) {
    size_t end[MOST_PRODUCTS], all = 0, work = 0;
    for (size_t k = 0; k < n; k++) {
        end[k] = all += (p[k].out + 3) / 4;
        work += p[k].in * p[k].out;
    }
    SHARED(work, for (size_t four = 0; four < all; four++) product_rows(p, end, four);)
}

// The three forms, n rows of activations each; += instead of = with `add`. An argument ld... is the
// stride of the one before it.

// y (n, out) = x (n, in) w (out, in)^T
static void matmul_nt(real *y, size_t ldy, const real *x, size_t ldx, Matrix w,
                      size_t n, size_t in, size_t out, int add) {
    const Gemm g = { y, ldy, x, ldx, 1, w, 1, n, out, in, add, 0, 0, 0, 0 };
    if (n > FEW) gemm(g);
    else if (n > 1 && w.type == F32) share_out(rows_at_once, &g, (out + 3) / 4, in * out);
    else few_rows(y, ldy, x, ldx, w, n, in, out, add);
}

// x (n, in) = y (n, out) w (out, in)
WIDE static void matmul_nn(real *x, size_t ldx, const real *y, size_t ldy, Matrix w,
                           size_t n, size_t in, size_t out, int add) {
    if (n > FEW || w.type == F32)
        gemm((Gemm){ x, ldx, y, ldy, 1, w, 0, n, in, out, add, 0, 0, 0, 0 });
    else
        for (size_t t = 0; t < n; t++, x += ldx, y += ldy)
            if (w.type == BF16) sum_rows(x, y, w, in, out, add, BF16);
            else sum_rows(x, y, w, in, out, add, Q8);
}

// w (out, in) = y (n, out)^T x (n, in)
static void matmul_tn(real *w, size_t ldw, const real *y, size_t ldy, const real *x, size_t ldx,
                      size_t n, size_t in, size_t out, int add) {
    gemm((Gemm){ w, ldw, y, 1, ldy, plain(x, ldx), 0, out, in, n, add, 0, 0, 0, 0 });
}

// y (n, rows of w) = x (n, columns of w) w^T + bias, with copy e of the stack w. A bias that is
// NULL, or a tensor without data, is none.
static void linear(real *y, const real *x, const Tensor *w, size_t e, const Tensor *bias,
                   size_t n) {
    matmul_nt(y, w->rows, x, w->cols, matrix(w, e, 0), n, w->cols, w->rows, 0);
    if (bias && bias->data)
        for (size_t t = 0; t < n; t++)
            for (size_t i = 0; i < w->rows; i++) y[t * w->rows + i] += bias->data[i];
}

// ---- [8] activations ----------------------------------------------------------------------------
// What forward writes. Training keeps every layer's activations for the backward pass; generating
// uses one set over and over. One function lays out both, called twice: without memory it only
// measures.

typedef struct { char *base; size_t used; } Arena;

// n * size bytes at a multiple of 64, or only their count while the arena has no memory.
static void *take(Arena *arena, size_t n, size_t size) {
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used = sum(arena->used, sum(product(n, size), 63)) & ~(size_t)63;
    return p;
}

typedef struct {        // one iteration of the chain in one layer; rows of an expert lie together
    real *x;            // (T, d)     input
    real *score;        // (T, E)     s, all of them
    int *expert;        // (T, K)     the chosen, largest score first
    real *weight;       // (T, K)     their weights
    int *slot;          // (T, K)     which row of the grouped arrays each choice became
    int *start;         // (E + 1)    the first grouped row of each expert
    int *token;         // (T K)      the token of each grouped row
    real *g, *u;        // (T K, f)   gate and up projections of the experts
    real *shared_g, *shared_u;  // (T, f S), in dense layers (T, I)
    real *ffn;          // (T, d)     output of the feed-forward; one for all unless KEEP_FFN
} Iteration;

typedef struct {        // T here is all rows, B * T of them
    real *x;            // (T, d)            input
    real *inverse_x;    // (T)               1 / rms of x
    real *q_a;          // (T, r)            the query's latent, where there is one
    real *inverse_q;    // (T)
    real *q;            // (T, H (dn + dr))  queries, rotated
    real *kv_a;         // (T, R + dr)       latent before its norm, key before its rotation
    real *inverse_kv;   // (T)
    real *latent;       // (B ctx, R + dr)   normed latent, rotated key: all that is cached
    real *kv;           // (T, H (dn + dv))  keys and values, expanded from the latents
    real *log_sum;      // (T, H)            logarithm of the softmax's denominator
    real *heads;        // (T, H dv)         output of attention, before o_proj
    real *mid;          // (T, d)            the stream after attention
    real *inverse_mid;  // (T)
    Iteration *iteration;       // [C]
} LayerState;

// What is kept for the backward pass: nothing when generating, else what it needs, and to train the
// coe_weights of an upcycled model also what they are multiplied with.
enum Keep { KEEP_NOTHING, KEEP, KEEP_FFN };

typedef struct {
    size_t rows, context;       // capacity: rows at once, positions per sequence
    enum Keep keep;             // what every layer has of its own
    LayerState *layer;          // [L]
    Iteration *iterations;      // [L C]
    real *out;                  // (T, d)     the last layer's output
    real *inverse_out;          // (T)
    real *final;                // (T, d)     after the final norm
    real *cos, *sin;            // (ctx, dr / 2)
    real *norm;                 // (T, max(d, r))  a normed input, for as long as it is needed
    real *gathered, *returned;  // (T K, d)   inputs and outputs of the experts, grouped
    real *act;                  // (T K, f) and (T, f S), or (T, I); of one token also (d)
    real *scores;               // (threads, QUERY_BLOCK or latent_rows(), ctx)
    real *absorbed;             // (threads, latent_rows(), 2 R + dr)
    char *memory;
    size_t memory_bytes;
} State;

enum { QUERY_BLOCK = 48 };      // queries whose scores a thread holds at a time

// The same on the latents, where the queries of all heads of a token are together.
static size_t latent_rows(const Config *c) {
    const size_t H = c->num_attention_heads;
    return H < QUERY_BLOCK ? QUERY_BLOCK / H * H : H;
}

static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

// Places what attention needs in one layer, for T rows; not the cache.
static void place_layer(LayerState *a, const Config *c, size_t T, Arena *arena) {
    const size_t d = c->hidden_size, H = c->num_attention_heads, dn = c->qk_nope_head_dim,
        dr = c->qk_rope_head_dim, dv = c->v_head_dim, r = c->q_lora_rank, R = c->kv_lora_rank,
        fit = sizeof(real);
    a->x           = take(arena, T * d, fit);
    a->inverse_x   = take(arena, T, fit);
    a->q_a         = take(arena, T * r, fit);
    a->inverse_q   = take(arena, T, fit);
    a->q           = take(arena, T * H * (dn + dr), fit);
    a->kv_a        = take(arena, T * (R + dr), fit);
    a->inverse_kv  = take(arena, T, fit);
    a->kv          = take(arena, T * H * (dn + dv), fit);
    a->log_sum     = take(arena, T * H, fit);
    a->heads       = take(arena, T * H * dv, fit);
    a->mid         = take(arena, T * d, fit);
    a->inverse_mid = take(arena, T, fit);
}

// Places one iteration for T rows, without its choices: E experts, chosen TK times in all, and
// a feed-forward of width `wide` that every token visits.
static void place_iteration(Iteration *i, const Config *c, size_t T, size_t E, size_t TK,
                            size_t wide, Arena *arena) {
    const size_t d = c->hidden_size, f = c->moe_intermediate_size, fit = sizeof(real);
    i->x        = take(arena, T * d, fit);
    i->score    = take(arena, T * E, fit);
    i->slot     = take(arena, TK, sizeof(int));
    i->start    = take(arena, (size_t)c->n_routed_experts + 1, sizeof(int));
    i->token    = take(arena, TK, sizeof(int));
    i->g        = take(arena, E ? TK * f : 0, fit);
    i->u        = take(arena, E ? TK * f : 0, fit);
    i->shared_g = take(arena, T * wide, fit);
    i->shared_u = take(arena, T * wide, fit);
}

// Places everything that a State holds. The cache and the choices of experts, which run --trace
// shows, exist for every layer in any case.
static void state_layout(State *s, const Config *c, Arena *arena) {
    const size_t T = s->rows, d = c->hidden_size, L = c->num_hidden_layers,
        dr = c->qk_rope_head_dim, r = c->q_lora_rank, R = c->kv_lora_rank,
        E = c->n_routed_experts, K = E ? (size_t)c->num_experts_per_tok : 0,
        f = c->moe_intermediate_size, fS = f * (size_t)c->n_shared_experts,
        I = c->intermediate_size, C = c->inner_iter, threads = (size_t)thread_count();
    const size_t fit = sizeof(real), TK = product(T, K), positions = s->keep ? T : s->context;
    int all_moe = 1;
    for (size_t l = 0; l < L; l++) all_moe &= is_moe(c, l);
    const size_t wide = max_size(fS, all_moe ? 0 : I);  // of the feed-forward for every token
    s->layer = take(arena, L, sizeof *s->layer);
    s->iterations = take(arena, product(L, C), sizeof *s->iterations);
    LayerState one = { 0 };                 // without keep, what all layers share
    Iteration once = { 0 };
    real *ffn = take(arena, T * d, fit);
    for (size_t l = 0; l < L; l++) {
        const int moe = is_moe(c, l);
        if (s->keep || l == 0) place_layer(&one, c, T, arena);
        LayerState a = one;
        a.latent = take(arena, product(positions, R + dr), fit);
        for (size_t t = 0; t < C; t++) {
            if (!s->keep && l + t == 0) place_iteration(&once, c, T, E, TK, wide, arena);
            if (s->keep && (t == 0 || moe))
                place_iteration(&once, c, T, moe ? E : 0, TK, moe ? fS : I, arena);
            once.ffn = s->keep == KEEP_FFN && moe && t ? take(arena, T * d, fit) : ffn;
            Iteration i = once;
            i.expert = take(arena, TK, sizeof(int));
            i.weight = take(arena, TK, fit);
            if (arena->base) s->iterations[l * C + t] = i;
        }
        if (arena->base) {
            a.iteration = s->iterations + l * C;
            s->layer[l] = a;
        }
    }
    s->out         = s->keep || !arena->base ? take(arena, T * d, fit) : s->layer[0].x;
    s->inverse_out = take(arena, T, fit);
    s->final       = take(arena, T * d, fit);
    s->cos         = take(arena, s->context * dr / 2, fit);
    s->sin         = take(arena, s->context * dr / 2, fit);
    s->norm        = take(arena, T * max_size(d, r), fit);
    s->gathered    = take(arena, TK * d, fit);
    s->returned    = take(arena, TK * d, fit);
    s->act         = take(arena, max_size(sum(TK * f, T * wide), d), fit);
    const size_t cached_rows = s->keep ? 0 : latent_rows(c);
    s->scores      = take(arena, product(threads * max_size(QUERY_BLOCK, cached_rows), s->context),
                          fit);
    s->absorbed    = take(arena, threads * cached_rows * (2 * R + dr), fit);
}

// Fills s->cos and s->sin (context, dr / 2): position p turns pair i by the angle p * omega_i with
// omega_i = rope_theta^(-2i / dr), stretched where rope_scaling asks for it. Computed in float like
// the reference: at position 8,000 its rounding shows.
static void rope_table(State *s, const Config *c) {
    const size_t half = c->qk_rope_head_dim / 2;
    const double dim = (double)c->qk_rope_head_dim, base = c->rope_theta;
    const double factor = c->rope_scaling_factor;
    const int linear_scaling = c->rope_scaling_type == 1, yarn = c->rope_scaling_type == 2;
    // YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times in the original context
    // stay as they are, those that turn less than beta_slow times are interpolated by `factor`,
    // with a ramp in between. edge[]: the pairs where the ramp starts and ends.
    double edge[2];
    for (int k = 0; k < 2; k++)
        edge[k] = dim * log((double)c->rope_scaling_original / (6.283185307179586 *
                  (k ? c->rope_scaling_beta_slow : c->rope_scaling_beta_fast))) / (2 * log(base));
    double low = fmax(floor(edge[0]), 0), high = fmin(ceil(edge[1]), dim - 1);
    if (low == high) high += 0.001;
    double stretch = yarn && factor > 1 ? 0.1 * log(factor) : 0;
    double magnitude = (stretch * c->rope_scaling_mscale + 1) /
                       (stretch * c->rope_scaling_mscale_all + 1);
    for (size_t i = 0; i < half; i++) {
        float omega = (float)(1 / pow(base, 2 * (double)i / dim));
        if (yarn) {
            double ramp = fmin(fmax(((double)i - low) / (high - low), 0), 1);
            omega = (float)(omega / factor * ramp + omega * (1 - ramp));
        }
        for (size_t p = 0; p < s->context; p++) {
            float position = linear_scaling ? (float)((double)p / factor) : (float)p;
            float angle = position * omega;
            s->cos[p * half + i] = (real)(cos((double)angle) * magnitude);
            s->sin[p * half + i] = (real)(sin((double)angle) * magnitude);
        }
    }
}

// Memory for `rows` tokens at once and sequences of up to `context` positions. With `keep`, for
// training, rows are whole sequences. Fails where memory does not suffice.
static State state_new(const Config *c, size_t rows, size_t context, enum Keep keep) {
    State s = { .rows = rows, .context = context, .keep = keep };
    Arena arena = { 0 };
    state_layout(&s, c, &arena);
    s.memory_bytes = arena.used;
    s.memory = arena.base = allocate(arena.used, "activations");
    arena.used = 0;
    state_layout(&s, c, &arena);
    rope_table(&s, c);
    return s;
}

// Gives a State's memory back.
static void state_free(State *s) { release(s->memory); s->memory = NULL; }

// ---- [9] attention ------------------------------------------------------------------------------
// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). Keys and values of all heads are
// linear in one latent of R numbers per token, so only that and the shared rotated key are cached.
// For token i, head h:
//
//     q        = q_proj x                       (or q_b_proj rmsnorm(q_a_proj x))     (dn + dr)
//     c, k_rot = kv_a_proj x;    c = rmsnorm(c)                                       (R), (dr)
//     k, v     = kv_b_proj c                                                          (dn), (dv)
//     score_ij = scale (q_i . k_j + rope(q_rot_i) . rope(k_rot_j)),  j <= i
//     head_i   = sum_j softmax_j(score_ij) v_j;      out = o_proj [heads]
//
// Whole sequences expand k and v once. Later tokens attend on the latents themselves, because
// q . (W_k c) = (W_k^T q) . c and sum p_j (W_v c_j) = W_v (sum p_j c_j), where W_k and W_v are a
// head's rows of kv_b_proj: nothing of the past is expanded again.

// The factor on the scores: (dn + dr)^(-1/2), times YaRN's temperature (mscale_all_dim), squared
// because it belongs to both q and k.
static real attention_scale(const Config *c) {
    double factor = c->rope_scaling_type ? c->rope_scaling_factor : 1;
    double m = factor > 1 ? 0.1 * c->rope_scaling_mscale_all * log(factor) + 1 : 1;
    return (real)(m * m / sqrt((double)(c->qk_nope_head_dim + c->qk_rope_head_dim)));
}

// Rotates the dr / 2 neighbouring pairs of x (dr) by the angles of a position, in place; with
// direction -1 it rotates back.
static void rope(real *x, const State *s, size_t position, size_t dr, real direction) {
    const real *cosine = s->cos + position * dr / 2, *sine = s->sin + position * dr / 2;
    for (size_t i = 0; i < dr / 2; i++) {
        real a = x[2 * i], b = x[2 * i + 1], sin_i = direction * sine[i];
        x[2 * i]     = a * cosine[i] - b * sin_i;
        x[2 * i + 1] = b * cosine[i] + a * sin_i;
    }
}

// How many query blocks n tokens make.
static size_t query_blocks(size_t n) { return (n + QUERY_BLOCK - 1) / QUERY_BLOCK; }

// The size of the one that starts at token i0.
static size_t block_rows(size_t n, size_t i0) {
    return n - i0 < QUERY_BLOCK ? n - i0 : QUERY_BLOCK;
}

// Softmax over the first n of a query's scores p (keys), those it may see; 0 for the rest.
static void causal_softmax(real *p, size_t n, size_t keys, real scale, real *log_sum) {
    softmax(p, n, scale, log_sum);
    memset(p + n, 0, (keys - n) * sizeof(real));
}

// The scores of `rows` queries against `keys` keys of one head:
//     p (rows, keys) = q k^T + q_rot k_rot^T
// q and q_rot side by side (rows, dn + dr) at stride ldq, k (keys, dn) at ldk, k_rot (keys, dr) at
// ldr.
static void scores_of(real *p, const real *q, size_t ldq, const real *k, size_t ldk,
                      const real *k_rot, size_t ldr, size_t rows, size_t keys,
                      size_t dn, size_t dr) {
    matmul_nt(p, keys, q, ldq, plain(k, ldk), rows, dn, keys, 0);
    matmul_nt(p, keys, q + dn, ldq, plain(k_rot, ldr), rows, dr, keys, 1);
}

// a->heads (B n, H dv) from a->q, a->kv and the rotated keys: whole sequences from position 0 on.
// In the cache they start `stride` positions apart.  kept: log_sum, heads
static void attend_expanded(const Config *c, State *s, LayerState *a, size_t B, size_t n,
                            size_t stride) {
    const size_t H = c->num_attention_heads, dn = c->qk_nope_head_dim, dr = c->qk_rope_head_dim,
        dv = c->v_head_dim, R = c->kv_lora_rank, dq = dn + dr, dkv = dn + dv,
        blocks = query_blocks(n);
    const real scale = attention_scale(c);
    Work work = { .n = B * H * blocks };
    #pragma omp parallel if (worth_threads(B * n * n * H))
    for (size_t task; (task = next_piece(&work)) < work.n; ) {
        const size_t b = task / blocks / H, h = task / blocks % H, i0 = task % blocks * QUERY_BLOCK;
        const size_t rows = block_rows(n, i0), keys = i0 + rows, first = b * n + i0;
        const real *q = a->q + (first * H + h) * dq, *kv = a->kv + (b * n * H + h) * dkv;
        const real *k_rot = a->latent + b * stride * (R + dr) + R;
        real *heads = a->heads + (first * H + h) * dv;
        real *p = s->scores + (size_t)thread_id() * QUERY_BLOCK * s->context;
        scores_of(p, q, H * dq, kv, H * dkv, k_rot, R + dr, rows, keys, dn, dr);
        for (size_t i = 0; i < rows; i++)
            causal_softmax(p + i * keys, i0 + i + 1, keys, scale,
                           a->log_sum + (first + i) * H + h);
        matmul_nn(heads, H * dv, p, keys, plain(kv + dn, H * dkv), rows, dv, keys, 0);
    }
}

// Attention of `queries` tokens of one sequence to its cached latents. All heads share them, so a
// head of a token is a row of one product: (queries, H) rows.
typedef struct {
    const Config *c;
    const Tensor *kv_b_proj;
    size_t queries, keys;   // the last of the keys are those of the queries
    const real *q;          // (queries, H, dn + dr)
    real *q_latent;         // (rows, R + dr)   W_k^T q beside q_rot
    real *p;                // (rows, keys)     scores, then their softmax
    real *o_latent;         // (rows, R)        sum_j p_j c_j
    real *heads;            // (queries, H, dv) W_v of it
} Latent;

// q_latent of head h.
static void absorb_head(const void *job, size_t h) {
    const Latent *a = job;
    const size_t H = a->c->num_attention_heads, dn = a->c->qk_nope_head_dim,
        dr = a->c->qk_rope_head_dim, dv = a->c->v_head_dim, R = a->c->kv_lora_rank, dq = dn + dr;
    const real *q = a->q + h * dq;
    real *q_latent = a->q_latent + h * (R + dr);
    matmul_nn(q_latent, H * (R + dr), q, H * dq, matrix(a->kv_b_proj, 0, h * (dn + dv)),
              a->queries, R, dn, 0);
    for (size_t i = 0; i < a->queries; i++)
        memcpy(q_latent + i * H * (R + dr) + R, q + i * H * dq + dn, dr * sizeof(real));
}

// The softmax of row i.
static void weigh_row(const void *job, size_t i) {
    const Latent *a = job;
    const size_t seen = a->keys - a->queries + 1 + i / (size_t)a->c->num_attention_heads;
    causal_softmax(a->p + i * a->keys, seen, a->keys, attention_scale(a->c), NULL);
}

// heads of head h.
static void read_head(const void *job, size_t h) {
    const Latent *a = job;
    const size_t H = a->c->num_attention_heads, dn = a->c->qk_nope_head_dim,
        dv = a->c->v_head_dim, R = a->c->kv_lora_rank;
    matmul_nt(a->heads + h * dv, H * dv, a->o_latent + h * R, H * R,
              matrix(a->kv_b_proj, 0, h * (dn + dv) + dn), a->queries, R, dv, 0);
}

// a->heads for `queries` tokens of one sequence on its cached latents, row `first` of a->q being
// the one at position pos. Nothing is kept.
static void attend_latent(const Config *c, State *s, LayerState *a, const Tensor *kv_b_proj,
                          const real *cached, size_t first, size_t queries, size_t pos) {
    const size_t H = c->num_attention_heads, dn = c->qk_nope_head_dim, dr = c->qk_rope_head_dim,
        dv = c->v_head_dim, R = c->kv_lora_rank, rows = queries * H, keys = pos + queries,
        most = latent_rows(c), thread = (size_t)thread_id();
    const Matrix latent = plain(cached, R + dr);
    real *memory = s->absorbed + thread * most * (2 * R + dr);
    const Latent job = {
        .c = c, .kv_b_proj = kv_b_proj, .queries = queries, .keys = keys,
        .q = a->q + first * H * (dn + dr), .q_latent = memory,
        .p = s->scores + thread * most * s->context, .o_latent = memory + most * (R + dr),
        .heads = a->heads + first * H * dv };
    share_out(absorb_head, &job, H, rows * dn * R);
    matmul_nt(job.p, keys, job.q_latent, R + dr, latent, rows, R + dr, keys, 0);
    share_out(weigh_row, &job, rows, rows * keys);
    matmul_nn(job.o_latent, R, job.p, keys, latent, rows, R, keys, 0);
    share_out(read_head, &job, H, rows * R * dv);
}

// The same for n tokens of each of B sequences, from position pos on.
static void attend_cached(const Config *c, State *s, LayerState *a, const Tensor *kv_b_proj,
                          size_t B, size_t n, size_t stride, size_t pos) {
    const size_t block = latent_rows(c) / (size_t)c->num_attention_heads;   // tokens at a time
    const size_t blocks = (n + block - 1) / block;
    const size_t row = (size_t)(c->kv_lora_rank + c->qk_rope_head_dim);
    if (B * blocks == 1) {                  // all threads work on its products
        attend_latent(c, s, a, kv_b_proj, a->latent, 0, n, pos);
        return;
    }
    Work work = { .n = B * blocks };
    #pragma omp parallel
    for (size_t task; (task = next_piece(&work)) < work.n; ) {
        const size_t b = task / blocks, i0 = task % blocks * block;
        attend_latent(c, s, a, kv_b_proj, a->latent + b * stride * row, b * n + i0,
                      n - i0 < block ? n - i0 : block, pos + i0);
    }
}

// a->mid = a->x + attention(rmsnorm(a->x)), all (T, d), of layer l for n tokens of each of B
// sequences at positions pos .. pos + n - 1; their latents join the cache.
// kept: the 1 / rms, q_a, q, kv_a, latent, kv, log_sum, heads
static void attention_forward(const Model *m, State *s, size_t l, size_t B, size_t n, size_t pos) {
    const Config *c = &m->config;
    const Layer *w = &m->w.layer[l];
    LayerState *a = &s->layer[l];
    const size_t T = B * n, d = c->hidden_size, H = c->num_attention_heads,
        dn = c->qk_nope_head_dim, dr = c->qk_rope_head_dim, dv = c->v_head_dim,
        r = c->q_lora_rank, R = c->kv_lora_rank, dq = dn + dr, dkv = dn + dv;
    const size_t stride = s->keep ? n : s->context;         // positions per sequence in the cache
    const real eps = (real)c->rms_norm_eps;
    const real latent_eps = (real)1e-6;                     // fixed in the reference

    rmsnorm(s->norm, d, a->inverse_x, a->x, d, &w->input_layernorm, T, eps);
    linear(a->kv_a, s->norm, &w->kv_a_proj, 0, &w->kv_a_bias, T);
    if (!r) {
        linear(a->q, s->norm, &w->q_proj, 0, NULL, T);
    } else {
        linear(a->q_a, s->norm, &w->q_a_proj, 0, &w->q_a_bias, T);
        rmsnorm(s->norm, r, a->inverse_q, a->q_a, r, &w->q_a_layernorm, T, latent_eps);
        linear(a->q, s->norm, &w->q_b_proj, 0, NULL, T);
    }
    const size_t parts = stride == n ? 1 : B;       // in a cache there are gaps between sequences
    for (size_t b = 0; b < parts; b++)
        rmsnorm(a->latent + (b * stride + pos) * (R + dr), R + dr, a->inverse_kv + b * n,
                a->kv_a + b * n * (R + dr), R + dr, &w->kv_a_layernorm, T / parts, latent_eps);
    SHARED(T * H * dr, for (size_t t = 0; t < T; t++) {
        const size_t position = pos + t % n;
        real *k_rot = a->latent + (t / n * stride + position) * (R + dr) + R;
        memcpy(k_rot, a->kv_a + t * (R + dr) + R, dr * sizeof(real));
        rope(k_rot, s, position, dr, 1);
        for (size_t h = 0; h < H; h++) rope(a->q + (t * H + h) * dq + dn, s, position, dr, 1);
    })
    if (pos == 0 && n > 1) {
        for (size_t b = 0; b < parts; b++)
            matmul_nt(a->kv + b * n * H * dkv, H * dkv, a->latent + b * stride * (R + dr), R + dr,
                      matrix(&w->kv_b_proj, 0, 0), T / parts, R, H * dkv, 0);
        attend_expanded(c, s, a, B, n, stride);
    } else {
        attend_cached(c, s, a, &w->kv_b_proj, B, n, stride, pos);
    }
    linear(a->mid, a->heads, &w->o_proj, 0, &w->o_bias, T);
    SHARED(T * d, for (size_t i = 0; i < T * d; i++) a->mid[i] += a->x[i];)
}

// ---- [10] the chain of experts ------------------------------------------------------------------
// Iteration t of a layer, on every token x:
//
//     s      = softmax(gate_t x)                              (E)     the paper's router of step t
//     chosen = the K largest s;    weight_k = s / sum of the chosen s, or s * routed_scaling_factor
//     ffn(x) = sum_k weight_k expert_k(x) + shared_experts(x)
//     expert(x) = down(silu(gate x) * up x),     silu(z) = z / (1 + e^-z)
//
// With the released configuration (inner_residual, not outer_residual) the chain starts from the
// normed stream and the raw one is dropped: it looks like a mistake and is the model. Tokens are
// grouped by expert, so that an expert's weights are read once for all tokens that chose it.

// act_i = silu(g_i) u_i, for n numbers
WIDE static void swiglu(real *act, const real *g, const real *u, size_t n) {
    for (size_t i = 0; i < n; i++) act[i] = g[i] * sigmoid(g[i]) * u[i];
}

// The same for n rows of f numbers.
static void swiglu_rows(real *act, const real *g, const real *u, size_t n, size_t f) {
    SHARED(n * f, for (size_t t = 0; t < n; t++) swiglu(act + t * f, g + t * f, u + t * f, f);)
}

// out (n, d) = down(silu(gate x) * up x) for x (n, d), with copy e of the three stacks; g = gate x,
// u = up x and act are (n, f).  kept: g, u
static void feed_forward(real *out, real *g, real *u, real *act, const real *x,
                         const Tensor *gate_proj, const Tensor *up_proj, const Tensor *down_proj,
                         size_t e, size_t n) {
    const size_t f = gate_proj->rows;
    linear(g, x, gate_proj, e, NULL, n);
    linear(u, x, up_proj, e, NULL, n);
    swiglu_rows(act, g, u, n, f);
    linear(out, act, down_proj, e, NULL, n);
}

// The index of the largest of n x that is not taken yet, the lowest among equals. Takes it.
static int take_largest(const real *x, unsigned char *taken, size_t n) {
    size_t best = n;
    for (size_t i = 0; i < n; i++)
        if (!taken[i] && (best == n || x[i] > x[best])) best = i;
    taken[best] = 1;
    return (int)best;
}

// One token's K experts, the best first, and their weights (K), by its scores s (E). Group-limited:
// only experts of the topk_group groups with the largest best score count, the others' scores are
// taken as 0.
static void choose(int *expert, real *weight, const real *s, const Config *c) {
    const size_t E = c->n_routed_experts, K = c->num_experts_per_tok;
    real allowed[E], best[E];
    unsigned char taken[E];
    memcpy(allowed, s, E * sizeof(real));
    if (c->topk_method == 1) {
        const size_t groups = c->n_group, size = E / groups;
        memset(allowed, 0, E * sizeof(real));
        for (size_t g = 0; g < groups; g++) {
            best[g] = s[g * size];
            for (size_t i = 1; i < size; i++)
                best[g] = s[g * size + i] > best[g] ? s[g * size + i] : best[g];
        }
        memset(taken, 0, groups);
        for (size_t k = 0; k < (size_t)c->topk_group; k++) {
            size_t g = (size_t)take_largest(best, taken, groups);
            memcpy(allowed + g * size, s + g * size, size * sizeof(real));
        }
    }
    memset(taken, 0, E);
    real total = (real)1e-20;
    for (size_t k = 0; k < K; k++) {
        expert[k] = take_largest(allowed, taken, E);
        weight[k] = allowed[expert[k]];
        total += weight[k];
    }
    real scale = c->norm_topk_prob && K > 1 ? 1 / total : (real)c->routed_scaling_factor;
    for (size_t k = 0; k < K; k++) weight[k] *= scale;
}

// Routes T tokens: score, expert and weight by router t, then the grouping by expert (a counting
// sort): start, slot and token.  kept: all of them
static void route(const Config *c, Iteration *i, const Layer *w, size_t t, size_t T) {
    const size_t E = c->n_routed_experts, K = c->num_experts_per_tok;
    linear(i->score, i->x, &w->gate, c->use_igate ? t : 0, NULL, T);
    SHARED(T * E * K, for (size_t k = 0; k < T; k++) {
        softmax(i->score + k * E, E, 1, NULL);
        choose(i->expert + k * K, i->weight + k * K, i->score + k * E, c);
    })
    memset(i->start, 0, (E + 1) * sizeof(int));
    for (size_t k = 0; k < T * K; k++) i->start[i->expert[k] + 1]++;
    for (size_t e = 0; e < E; e++) i->start[e + 1] += i->start[e];
    for (size_t k = 0; k < T * K; k++) {        // start[e] runs to the end of group e ...
        int row = i->start[i->expert[k]]++;
        i->slot[k] = row;
        i->token[row] = (int)(k / K);
    }
    memmove(i->start + 1, i->start, E * sizeof(int));   // ... which is the start of group e + 1
    i->start[0] = 0;
}

// s->returned = expert e of the tokens that chose it, gathered into s->gathered; its rows of both.
static void expert_forward(State *s, Iteration *i, const Layer *w, size_t e) {
    const size_t d = w->experts_gate_proj.cols, f = w->experts_gate_proj.rows;
    const size_t first = (size_t)i->start[e], n = (size_t)i->start[e + 1] - first;
    for (size_t k = first; k < first + n; k++)
        memcpy(s->gathered + k * d, i->x + (size_t)i->token[k] * d, d * sizeof(real));
    if (n)
        feed_forward(s->returned + first * d, i->g + first * f, i->u + first * f,
                     s->act + first * f, s->gathered + first * d, &w->experts_gate_proj,
                     &w->experts_up_proj, &w->experts_down_proj, e, n);
}

// The same for all experts that a single token chose, and i->ffn = the shared ones. With so little
// work it matters how often the threads meet: here twice, for all gate and up projections and for
// all down projections.
static void experts_of_one(const Config *c, State *s, Iteration *i, const Layer *w) {
    const size_t K = c->num_experts_per_tok, d = c->hidden_size, f = c->moe_intermediate_size,
        fS = f * (size_t)c->n_shared_experts, P = per_word(w->experts_gate_proj.type);
    Product in[MOST_PRODUCTS], out[MOST_PRODUCTS];
    size_t n = 0;
    spread(s->act, i->x, d, P);
    for (size_t k = 0; k <= K; k++) {                   // the last are the shared ones
        const size_t e = k < K ? (size_t)i->expert[k] : 0, row = k < K ? (size_t)i->slot[k] : 0;
        if (k == K && !fS) break;
        real *g = k < K ? i->g + row * f : i->shared_g, *u = k < K ? i->u + row * f : i->shared_u;
        in[n++] = (Product){ g, s->act,
            matrix(k < K ? &w->experts_gate_proj : &w->shared_gate_proj, e, 0), d, k < K ? f : fS };
        in[n++] = (Product){ u, s->act,
            matrix(k < K ? &w->experts_up_proj : &w->shared_up_proj, e, 0), d, k < K ? f : fS };
    }
    products(in, n);
    real *act = s->act;
    for (size_t k = 0; k < n / 2; k++) {
        const size_t width = in[2 * k].out;
        swiglu(in[2 * k].y, in[2 * k].y, in[2 * k + 1].y, width);
        spread(act, in[2 * k].y, width, P);
        out[k] = k < K
            ? (Product){ s->returned + (size_t)i->slot[k] * d, act,
                         matrix(&w->experts_down_proj, (size_t)i->expert[k], 0), f, d }
            : (Product){ i->ffn, act, matrix(&w->shared_down_proj, 0, 0), fS, d };
        act += width;
    }
    products(out, n / 2);
}

// i->ffn (T, d) = the feed-forward of layer l in iteration t, of i->x (T, d).
// kept: what route() and feed_forward() keep
static void ffn_forward(const Model *m, State *s, Iteration *i, size_t l, size_t t, size_t T) {
    const Config *c = &m->config;
    const Layer *w = &m->w.layer[l];
    const size_t d = c->hidden_size, E = c->n_routed_experts, K = c->num_experts_per_tok;
    if (!is_moe(c, l)) {
        feed_forward(i->ffn, i->shared_g, i->shared_u, s->act, i->x, &w->dense_gate_proj,
                     &w->dense_up_proj, &w->dense_down_proj, 0, T);
        return;
    }
    const int one = T == 1 && !s->keep && K < MOST_PRODUCTS / 2;
    if (!c->n_shared_experts)
        memset(i->ffn, 0, T * d * sizeof(real));
    else if (!one)
        feed_forward(i->ffn, i->shared_g, i->shared_u, s->act, i->x, &w->shared_gate_proj,
                     &w->shared_up_proj, &w->shared_down_proj, 0, T);
    phase(ROUTER);
    route(c, i, w, t, T);
    phase(EXPERTS);
    // With many tokens the threads take an expert each; with few they share the rows of one
    // expert's matrices. (No `if` on the pragma: a parallel region inside another, even one of a
    // single thread, starts its threads anew each time.)
    if (one) {
        experts_of_one(c, s, i, w);
    } else if (T >= 16) {
        Work work = { .n = E };
        #pragma omp parallel
        for (size_t e; (e = next_piece(&work)) < E; ) expert_forward(s, i, w, e);
    } else {
        for (size_t e = 0; e < E; e++) expert_forward(s, i, w, e);
    }
    SHARED(T * K * d, for (size_t k = 0; k < T; k++) {
        for (size_t j = k * K; j < (k + 1) * K; j++) {  // in the order of choice: no thread decides
            const real *y = s->returned + (size_t)i->slot[j] * d, weight = i->weight[j];
            for (size_t e = 0; e < d; e++) i->ffn[k * d + e] += weight * y[e];
        }
    })
}

// out (T, d) = the chain of layer l on y_0 = rmsnorm(mid):
//     y_{t+1} = ffn_t(y_t) (+ y_t),   after the last (+ mid)
// In an upcycled model, from the second iteration on: y_{t+1} = y_t + coe_weights_t * ffn_t(y_t).
// kept: each iteration's x, 1 / rms of mid and, with KEEP_FFN, each ffn
static void chain_forward(const Model *m, State *s, size_t l, real *out, size_t T) {
    const Config *c = &m->config;
    const Layer *w = &m->w.layer[l];
    LayerState *a = &s->layer[l];
    const size_t d = c->hidden_size, C = is_moe(c, l) ? (size_t)c->inner_iter : 1;
    rmsnorm(a->iteration[0].x, d, a->inverse_mid, a->mid, d, &w->post_attention_layernorm, T,
            (real)c->rms_norm_eps);
    for (size_t t = 0; t < C; t++) {
        Iteration *i = &a->iteration[t];
        real *y = t + 1 < C ? a->iteration[t + 1].x : out;
        ffn_forward(m, s, i, l, t, T);
        const real *chain_weight = m->coe_weights && t > 0 ? at(&w->coe_weights, t - 1) : NULL;
        const int inner = !m->coe_weights && c->inner_residual;
        const int outer = t + 1 == C && c->outer_residual;
        SHARED(T * d, for (size_t k = 0; k < T; k++) {
            for (size_t e = k * d; e < (k + 1) * d; e++) {
                real v = chain_weight ? i->x[e] + chain_weight[e - k * d] * i->ffn[e]
                                      : i->ffn[e] + (inner ? i->x[e] : 0);
                y[e] = v + (outer ? a->mid[e] : 0);
            }
        })
    }
}

// ---- [11] forward -------------------------------------------------------------------------------

// Runs n tokens of each of B sequences, tokens (B, n), at positions pos .. pos + n - 1, and leaves
// in s->final (B n, d) what lm_head sees. Training runs whole sequences with pos = 0; generating
// has B = 1 and n = the prompt, then 1. Only the last `wanted` of all rows get into s->final, as
// its first rows: nobody reads what the last layer's experts make of the others.
static void forward(const Model *m, State *s, const int *tokens, size_t B, size_t n, size_t pos,
                    size_t wanted) {
    const Config *c = &m->config;
    const size_t d = c->hidden_size, L = c->num_hidden_layers, T = B * n;
    const Matrix embedding = matrix(m->w.embed_tokens, 0, 0);
    phase(EMBEDDING);
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < d; i++)
            s->layer[0].x[t * d + i] = weight(embedding, (size_t)tokens[t], i);
    for (size_t l = 0; l < L; l++) {
        const int last = l + 1 == L;
        phase(ATTENTION);
        attention_forward(m, s, l, B, n, pos);
        phase(EXPERTS);
        if (last && wanted < T)
            memmove(s->layer[l].mid, s->layer[l].mid + (T - wanted) * d, wanted * d * sizeof(real));
        chain_forward(m, s, l, last ? s->out : s->layer[l + 1].x, last ? wanted : T);
    }
    phase(HEAD);
    rmsnorm(s->final, d, s->inverse_out, s->out, d, m->w.norm, wanted, (real)c->rms_norm_eps);
}

// logits (rows, V) of the rows of s->final from `first` on.
static void logits_forward(const Model *m, const State *s, real *logits, size_t first,
                           size_t rows) {
    linear(logits, s->final + first * m->config.hidden_size, m->w.lm_head, 0, NULL, rows);
}

// -log softmax(logits)[target], in nats; logits (V) become probabilities.
static double cross_entropy(real *logits, size_t V, int target) {
    real chosen = logits[target], total;
    softmax(logits, V, 1, &total);
    return (double)(total - chosen);
}

// ---- [12] sampler -------------------------------------------------------------------------------
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

typedef struct { real p; int id; } Candidate;

// The order of candidates: more probable first, then the lower id.
static int before(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->id < y->id ? -1 : 1;
}

// Moves the k candidates that come before all others to the front, in any order (Hoare 1961).
static void select_first(Candidate *c, size_t n, size_t k) {
    while (0 < k && k < n) {
        const Candidate pivot = c[n / 2];
        size_t i = 0, j = n - 1;
        for (;; i++, j--) {
            while (before(&c[i], &pivot) < 0) i++;
            while (before(&pivot, &c[j]) < 0) j--;
            if (i >= j) break;
            const Candidate moved = c[i];
            c[i] = c[j];
            c[j] = moved;
        }
        if (k <= i) {               // c[0] .. c[i - 1] come before the others
            n = i;
        } else {
            c += i;
            n -= i;
            k -= i;
        }
    }
}

// The sum of n candidates' probabilities.
static double sum_candidates(const Candidate *candidate, size_t n) {
    double total = 0;
    for (size_t i = 0; i < n; i++) total += (double)candidate[i].p;
    return total;
}

// How many of the n candidates, which are sorted, pass the filters 4 and 5. `all` is the sum of the
// probabilities of all that passed filter 3.
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
    size_t best = 0, n = 0;
    for (size_t i = 0; i < V; i++) {
        if (!isfinite(logits[i]))
            fail(FAILED, "logit %zu is %g: the weights hold infinite numbers or NaN",
                 i, (double)logits[i]);
        if (seen && seen[i]) logits[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;
        if (logits[i] > logits[best]) best = i;
    }
    if (o->temperature < 1e-9) return (int)best;    // so little that nothing else has a chance
    softmax(logits, V, (real)(1 / o->temperature), NULL);
    // To sort a large vocabulary would take longer than some models do. Top-k selects. Without it,
    // those below (1 - x) / V add up to less than 1 - x, so that the others reach the sum x without
    // them, where x is top-p or, with no filter at all, the number drawn. (Half of it: sums round.)
    const double drawn = rng_uniform(&o->rng);
    const int top_k = o->top_k > 0 && (size_t)o->top_k < V;
    const int plain = !top_k && o->top_p >= 1 && o->min_p == 0;
    double all = 0, least = 0;
    for (size_t i = 0; i < V; i++) all += (double)logits[i];
    if (!top_k) {
        const double x = o->top_p < 1 ? o->top_p : plain ? drawn : 1;
        least = fmax((1 - x) * all / (double)(2 * V), o->min_p * (double)logits[best]);
    }
    for (size_t i = 0; i < V; i++)
        if ((double)logits[i] >= least) candidate[n++] = (Candidate){ logits[i], (int)i };
    if (top_k) {
        select_first(candidate, n, (size_t)o->top_k);
        n = (size_t)o->top_k;
    }
    qsort(candidate, n, sizeof *candidate, before);
    if (top_k) all = sum_candidates(candidate, n);
    const size_t kept = filter(o, candidate, n, all);
    double u = drawn * (plain ? all : sum_candidates(candidate, kept));
    for (size_t i = 0; i + 1 < kept; i++) {
        u -= (double)candidate[i].p;
        if (u < 0) return candidate[i].id;
    }
    return candidate[kept - 1].id;
}

// ---- [13] tokenizer -----------------------------------------------------------------------------
// Text becomes tokens in three steps:
//   1. Added tokens, such as the names of BOS and EOS, are found and taken out.
//   2. The text between them is cut into pieces, words roughly, by patterns.
//   3. Each piece starts as single bytes, and of all pairs of neighbours that may be merged the one
//      of the lowest rank is, again and again: byte-pair encoding.
// A pattern is what export.py makes of a regular expression in tokenizer.json: alternatives, each a
// sequence of items "least to most characters of this class", each class a list of ranges of code
// points. The first pattern cuts the text, the next one its pieces, and so on.
//
// The byte tokenizer is one without patterns and merges: ids 0..255 are bytes, 256 BOS, 257 EOS.

enum { IGNORE_MERGES = 1, NFC = 2 };                            // flags of a tokenizer
enum { SPECIAL = 1, LSTRIP = 2, RSTRIP = 4, NORMALIZED = 8 };   // of an added token
enum ItemKind { CHARACTERS, NOT_BEFORE, AT_END };
enum { BYTE_TOKENS = 258, MOST_ITEMS = 32 };
static const uint32_t NO_LIMIT = UINT32_MAX, NO_TOKEN = UINT32_MAX;
typedef struct { uint32_t left, right, rank, result; } Merge;
typedef struct { uint32_t kind, class, least, most; } Item;
typedef struct { uint32_t id, flags; } Added;

struct Tokenizer {              // the tokenizer's section in the file: first its head ...
    uint32_t n_tokens, text_bytes, n_order, n_merges, n_stages, n_alternatives, n_items, n_classes,
        n_ranges, n_added, n_normal, flags;
    const uint32_t *first;          // [n_tokens + 1]   ... then these: the bytes of token i are
    const char *text;               // [text_bytes]     text[first[i] .. first[i + 1] - 1]
    const uint32_t *byte_token;     // [256]            the token of each byte, or NO_TOKEN
    const uint32_t *order;          // [n_order]        tokens by their bytes, with IGNORE_MERGES
    const Merge *merges;            // [n_merges]       by left, then right
    const uint32_t *stages;         // [n_stages + 1]   the first alternative of each pattern
    const uint32_t *alternatives;   // [n_alternatives + 1]  the first item of each
    const Item *items;              // [n_items]
    const uint32_t (*classes)[2];   // [n_classes]      first range, how many
    const uint32_t (*ranges)[2];    // [n_ranges]       lowest and highest code point
    const Added *added;             // [n_added]        by their bytes
    const uint32_t (*normal)[3];    // [n_normal]       with NFC: lowest, highest, class or 255
    int kind;                   // BYTES or BPE
    size_t section_bytes;       // in the file; the byte tokenizer needs none
    unsigned char starts[256];  // whether an added token starts with this byte
    uint64_t ascii[128];        // bit c: whether the character is in class c < 64
};

// Places the arrays of a tokenizer, whose head is known, in its section.
static void tokenizer_layout(Tokenizer *t, Arena *arena) {
    const size_t u32 = sizeof(uint32_t);
    take(arena, 16, u32);                               // the head
    t->first        = take(arena, (size_t)t->n_tokens + 1, u32);
    t->text         = take(arena, t->text_bytes, 1);
    t->byte_token   = take(arena, 256, u32);
    t->order        = take(arena, t->n_order, u32);
    t->merges       = take(arena, t->n_merges, sizeof(Merge));
    t->stages       = take(arena, (size_t)t->n_stages + 1, u32);
    t->alternatives = take(arena, (size_t)t->n_alternatives + 1, u32);
    t->items        = take(arena, t->n_items, sizeof(Item));
    t->classes      = take(arena, t->n_classes, 2 * u32);
    t->ranges       = take(arena, t->n_ranges, 2 * u32);
    t->added        = take(arena, t->n_added, sizeof(Added));
    t->normal       = take(arena, t->n_normal, 3 * u32);
}

// The bytes of a token, which exists, and how many.
static const char *token_text(const Tokenizer *t, uint32_t id, size_t *length) {
    *length = t->first[id + 1] - t->first[id];
    return t->text + t->first[id];
}

// Compares two texts byte by byte: < 0, 0 or > 0. A text comes after its own beginnings.
static int compare_texts(const char *a, size_t na, const char *b, size_t nb) {
    const int c = memcmp(a, b, na < nb ? na : nb);
    return c ? c : (na > nb) - (na < nb);
}

// The same for the texts of two tokens.
static int compare_tokens(const Tokenizer *t, uint32_t a, uint32_t b) {
    size_t na, nb;
    const char *ta = token_text(t, a, &na), *tb = token_text(t, b, &nb);
    return compare_texts(ta, na, tb, nb);
}

// How many tokens of a sorted list do not come after a text. Token i is list[i * stride].
static size_t count_not_after(const Tokenizer *t, const uint32_t *list, size_t n, size_t stride,
                              const char *text, size_t bytes) {
    size_t low = 0, length;
    while (low < n) {
        const size_t middle = low + (n - low) / 2;
        const char *token = token_text(t, list[middle * stride], &length);
        if (compare_texts(token, length, text, bytes) <= 0) low = middle + 1; else n = middle;
    }
    return low;
}

// For bsearch: merges by left, then right.
static int compare_merges(const void *a, const void *b) {
    const Merge *x = a, *y = b;
    if (x->left != y->left) return x->left < y->left ? -1 : 1;
    return x->right < y->right ? -1 : x->right > y->right;
}

// Whether one token's text is that of two others.
static int is_joined(const Tokenizer *t, const Merge *m) {
    size_t n, nl, nr;
    const char *text = token_text(t, m->result, &n), *left = token_text(t, m->left, &nl),
               *right = token_text(t, m->right, &nr);
    return n == nl + nr && !memcmp(text, left, nl) && !memcmp(text + nl, right, nr);
}

// Whether `start` divides 0 .. all into n parts: part i goes from start[i] to start[i + 1].
static int divides(const uint32_t *start, size_t n, uint32_t all) {
    int ok = start[0] == 0 && start[n] == all;
    for (size_t i = 0; i < n; i++) ok &= start[i] <= start[i + 1];
    return ok;
}

// Whether n ranges (lowest, highest, ...) of `width` numbers are sorted and do not overlap.
static int in_order(const uint32_t *range, size_t n, size_t width) {
    int ok = 1;
    for (size_t i = 0; i < n; i++, range += width)
        ok &= range[0] <= range[1] && (i == 0 || range[1 - (ptrdiff_t)width] < range[0]);
    return ok;
}

// Ends the program unless all that encode() and decode() rely on is so.
static void tokenizer_check(const Tokenizer *t, const char *path) {
    const uint32_t n = t->n_tokens;
#define REQUIRE(condition, ...) \
    if (!(condition)) fail(FAILED, "%s: the tokenizer is damaged: " __VA_ARGS__)
    REQUIRE(t->flags < 4, "its flags are %u, must be below 4", path, t->flags);
    REQUIRE(divides(t->first, n, t->text_bytes), "its tokens do not divide its text", path);
    REQUIRE(divides(t->stages, t->n_stages, t->n_alternatives) &&
            divides(t->alternatives, t->n_alternatives, t->n_items), "its patterns overlap", path);
    for (uint32_t i = 0; i < 256; i++) {
        const uint32_t id = t->byte_token[i];
        const int not_utf8 = i == 0xC0 || i == 0xC1 || i >= 0xF5;   // no text needs these
        REQUIRE(id < n ? t->first[id + 1] - t->first[id] == 1 &&
                         (unsigned char)t->text[t->first[id]] == i : id == NO_TOKEN && not_utf8,
                "token %u is not byte %u", path, id, i);
    }
    for (uint32_t i = 0; i < t->n_order; i++)
        REQUIRE(t->order[i] < n && (!i || compare_tokens(t, t->order[i - 1], t->order[i]) < 0),
                "number %u of its tokens in order", path, i);
    for (uint32_t i = 0; i < t->n_merges; i++) {
        const Merge *m = &t->merges[i];
        REQUIRE(m->left < n && m->right < n && m->result < n && is_joined(t, m) &&
                (!i || compare_merges(m - 1, m) < 0), "merge %u", path, i);
    }
    for (uint32_t i = 0; i < t->n_alternatives; i++)
        REQUIRE(t->alternatives[i + 1] - t->alternatives[i] <= MOST_ITEMS,
                "alternative %u of its patterns has more than %d items", path, i, MOST_ITEMS);
    for (uint32_t i = 0; i < t->n_items; i++)
        REQUIRE(t->items[i].kind == AT_END ||
                (t->items[i].kind < AT_END && t->items[i].class < t->n_classes),
                "item %u of its patterns", path, i);
    for (uint32_t i = 0; i < t->n_classes; i++) {
        const uint32_t from = t->classes[i][0], count = t->classes[i][1];
        REQUIRE(from <= t->n_ranges && count <= t->n_ranges - from &&
                in_order(t->ranges[from], count, 2), "class %u", path, i);
    }
    for (uint32_t i = 0; i < t->n_added; i++)
        REQUIRE(t->added[i].id < n && t->first[t->added[i].id] < t->first[t->added[i].id + 1] &&
                (!i || compare_tokens(t, t->added[i - 1].id, t->added[i].id) < 0),
                "added token %u", path, i);
    REQUIRE(in_order(*t->normal, t->n_normal, 3), "its normal form", path);
#undef REQUIRE
}

// For bsearch: whether a code point is before a range (lowest, highest, ...), after it, or in it.
static int compare_range(const void *code, const void *range) {
    const uint32_t c = *(const uint32_t *)code, *r = range;
    return c < r[0] ? -1 : c > r[1];
}

// Whether a character is in a class of the tokenizer.
static int in_class(const Tokenizer *t, uint32_t class, uint32_t code) {
    if (code < 128 && class < 64) return (int)(t->ascii[code] >> class & 1);
    const uint32_t *c = t->classes[class];
    return bsearch(&code, t->ranges + c[0], c[1], sizeof *t->ranges, compare_range) != NULL;
}

// The byte tokenizer's tables.
static void fill_byte_tokenizer(Tokenizer *t) {
    static const char names[] = "<|beginoftext|>" "<|endoftext|>";
    static Added added[] = { { 256, SPECIAL }, { 257, SPECIAL } };
    static char text[256 + sizeof names];
    static uint32_t first[BYTE_TOKENS + 1], byte_token[256];
    for (uint32_t i = 0; i < 256; i++) {
        first[i] = byte_token[i] = i;
        text[i] = (char)i;
    }
    memcpy(text + 256, names, sizeof names);
    first[256] = 256;
    first[257] = 256 + sizeof "<|beginoftext|>" - 1;
    first[258] = 256 + sizeof names - 1;
    *t = (Tokenizer){ .kind = BYTES, .n_tokens = BYTE_TOKENS, .first = first, .text = text,
                      .byte_token = byte_token, .n_added = 2, .added = added };
}

// The tokenizer of this kind, or NULL for none. What its section, of so many bytes, says is
// believed only after a check; it must live as long as the tokenizer.
static Tokenizer *tokenizer_new(int64_t kind, char *section, size_t bytes, const char *path,
                                int64_t vocab_size) {
    if (kind == NO_TOKENIZER) return NULL;
    Tokenizer *t = allocate(sizeof *t, "the tokenizer");
    if (kind == BYTES) {
        fill_byte_tokenizer(t);
    } else {
        Arena measure = { 0 }, place = { section, 0 };
        memcpy(t, section, offsetof(Tokenizer, flags) + sizeof t->flags);
        tokenizer_layout(t, &measure);
        if (measure.used != bytes)
            fail(FAILED, "%s: the tokenizer takes %zu bytes, but its head adds up to %zu",
                 path, bytes, measure.used);
        tokenizer_layout(t, &place);
        tokenizer_check(t, path);
        t->kind = BPE;
        t->section_bytes = bytes;
    }
    if (t->n_tokens > vocab_size)
        fail(FAILED, "%s: vocab_size is %lld, must be at least %u, the tokens of the tokenizer",
             path, (long long)vocab_size, t->n_tokens);
    for (uint32_t i = 0; i < t->n_added; i++)
        t->starts[(unsigned char)t->text[t->first[t->added[i].id]]] = 1;
    for (uint32_t c = 0; c < t->n_classes && c < 64; c++)
        for (uint32_t i = 0; i < 128; i++)
            if (bsearch(&i, t->ranges + t->classes[c][0], t->classes[c][1], sizeof *t->ranges,
                        compare_range))
                t->ascii[i] |= (uint64_t)1 << c;
    return t;
}

// How many bytes the character that starts with these n bytes has: 0 if they start none.
static size_t utf8_length(const unsigned char *b, size_t n) {
    size_t length = b[0] < 0x80 ? 1 : b[0] < 0xC2 ? 0 : b[0] < 0xE0 ? 2 :
                    b[0] < 0xF0 ? 3 : b[0] < 0xF5 ? 4 : 0;
    if (n > 1 && ((b[0] == 0xE0 && b[1] < 0xA0) ||      // longer than it must be
                  (b[0] == 0xED && b[1] > 0x9F) ||      // half of a surrogate pair
                  (b[0] == 0xF0 && b[1] < 0x90) ||      // longer than it must be
                  (b[0] == 0xF4 && b[1] > 0x8F)))       // above U+10FFFF
        return 0;
    for (size_t i = 1; i < n && i < length; i++) if ((b[i] & 0xC0) != 0x80) return 0;
    return length;
}

// The length of the character that n > 0 bytes of text start with, and its code point. A byte that
// is not part of UTF-8 is a character of its own, and taken for U+FFFD.
static size_t next_char(const char *text, size_t n, uint32_t *code) {
    const unsigned char *b = (const unsigned char *)text;
    *code = b[0];
    if (b[0] < 0x80) return 1;
    const size_t length = utf8_length(b, n);
    if (length < 2 || length > n) {
        *code = 0xFFFD;
        return 1;
    }
    *code &= 0x7Fu >> length;
    for (size_t i = 1; i < length; i++) *code = *code << 6 | (b[i] & 0x3Fu);
    return length;
}

// Where the character that ends at text[at] starts; that is not before `low`. In UTF-8 no character
// ends within another, so it is the longest that fits.
static size_t previous_char(const char *text, size_t low, size_t at) {
    uint32_t code;
    for (size_t k = 4; k > 1; k--)
        if (at - low >= k && next_char(text + at - k, k, &code) == k) return at - k;
    return at - 1;
}

// Whether n > 0 bytes of text start with a character of a class, and that character's length.
static int next_in_class(const Tokenizer *t, uint32_t class, const char *text, size_t n,
                         size_t *length) {
    uint32_t code;
    *length = next_char(text, n, &code);
    return in_class(t, class, code);
}

// Whether an item matches at text[at] in a piece that ends at `end`. What it takes ends at *to, the
// least that it may take at *low.
static int take_item(const Tokenizer *t, const Item *item, const char *text, size_t at, size_t end,
                     size_t *low, size_t *to) {
    size_t length, n = 0;
    *low = *to = at;
    if (item->kind == AT_END) return at == end || text[at] == '\n';
    if (item->kind == NOT_BEFORE)
        return at == end || !next_in_class(t, item->class, text + at, end - at, &length);
    for (; *to < end && (n < item->most || item->most == NO_LIMIT); n++) {
        if (!next_in_class(t, item->class, text + *to, end - *to, &length)) break;
        *to += length;
        if (n + 1 == item->least) *low = *to;
    }
    return n >= item->least;
}

static const size_t NOWHERE = SIZE_MAX;

// Where the match of an alternative at text[at] ends, or NOWHERE. Every item takes as many
// characters as it can, and gives them back one by one while those after it do not match.
// *hopeless, 0 at first: the alternative does not match before that. If it starts with any number
// of characters, it tries to go on after each of them; where that fails, it need not start at any
// of them again. This keeps the work linear in a long run of white space.
static size_t match(const Tokenizer *t, uint32_t alternative, const char *text, size_t at,
                    size_t end, size_t *hopeless) {
    const Item *item = t->items + t->alternatives[alternative];
    const size_t n = t->alternatives[alternative + 1] - t->alternatives[alternative];
    size_t low[MOST_ITEMS], to[MOST_ITEMS], reach = 0;
    if (at < *hopeless) return NOWHERE;
    for (size_t i = 0; i < n; at = to[i++]) {
        int ok = take_item(t, &item[i], text, at, end, &low[i], &to[i]);
        if (i == 0 && item->most == NO_LIMIT) reach = to[0];
        while (!ok && i > 0) {          // back to the last item that can give a character back
            i--;
            ok = to[i] > low[i];
            if (ok) to[i] = previous_char(text, low[i], to[i]);
        }
        if (!ok) {
            *hopeless = reach;
            return NOWHERE;
        }
    }
    return at;
}

// What encode() works with.
typedef struct {
    const Tokenizer *t;
    int special;                // whether special tokens are looked for
    int *ids;
    size_t count;
    char *cut;                  // [n + 1]  whether a piece starts at this byte
    size_t *hopeless;           // [n_alternatives]  for match()
    struct Symbol *symbol;      // [room]   for merge_piece()
    struct Pair *heap;          // [2 room]
    size_t room;
} Encoder;

// Adds a token to the result. A byte that no UTF-8 has need not have one, and is left out then.
static void add_id(Encoder *e, uint32_t id) { if (id != NO_TOKEN) e->ids[e->count++] = (int)id; }

// Cuts every piece of the text (n bytes) into the matches of one pattern and what is between them.
static void cut_pieces(Encoder *e, uint32_t stage, const char *text, size_t n) {
    const Tokenizer *t = e->t;
    for (size_t at = 0, end; at < n; ) {
        end = (size_t)((char *)memchr(e->cut + at + 1, 1, n - at) - e->cut);
        while (at < end) {
            uint32_t a = t->stages[stage], code;
            size_t to = NOWHERE;
            for (; a < t->stages[stage + 1] && to == NOWHERE; a++)
                to = match(t, a, text, at, end, &e->hopeless[a]);
            if (to != NOWHERE) e->cut[at] = e->cut[to] = 1;
            if (to != NOWHERE && to > at) at = to;
            else at += next_char(text + at, end - at, &code);
        }
    }
}

// A piece while it is merged is a linked list of symbols, of which each stays where its first byte
// was, and a heap of pairs. A pair is not taken out of the heap when one of its symbols is merged
// otherwise: it is then no longer what the merge wants, and is passed over.
typedef struct Symbol { size_t previous, next; uint32_t id; } Symbol;
typedef struct Pair { size_t at; uint32_t rank, merge; } Pair;

// The order of the heap: the lowest rank first, then from the left.
static int pair_before(const Pair *a, const Pair *b) {
    return a->rank < b->rank || (a->rank == b->rank && a->at < b->at);
}

// Adds a pair to a heap of *n.
static void heap_push(Pair *heap, size_t *n, Pair p) {
    size_t i = (*n)++;
    for (; i && pair_before(&p, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = p;
}

// Takes the first pair out of a heap of *n.
static Pair heap_pop(Pair *heap, size_t *n) {
    const Pair first = heap[0], last = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && pair_before(&heap[child + 1], &heap[child])) child++;
        if (!pair_before(&heap[child], &last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return first;
}

// Adds the pair of symbol `at` and the next one to the heap, if there is a merge for it.
static void propose(const Encoder *e, size_t at, size_t n_symbols, size_t *n_heap) {
    const Symbol *left = &e->symbol[at];
    if (left->next == n_symbols) return;
    const Merge pair = { .left = left->id, .right = e->symbol[left->next].id };
    const Merge *m = bsearch(&pair, e->t->merges, e->t->n_merges, sizeof pair, compare_merges);
    if (m) heap_push(e->heap, n_heap, (Pair){ at, m->rank, (uint32_t)(m - e->t->merges) });
}

// The tokens of a piece, by merging.
static void merge_piece(Encoder *e, const char *text, size_t n) {
    const Tokenizer *t = e->t;
    size_t n_heap = 0;
    if (n > e->room) {
        release(e->symbol);
        release(e->heap);
        e->room = sum(n, n);
        e->symbol = allocate(product(e->room, sizeof(Symbol)), "the tokenizer");
        e->heap = allocate(product(e->room, 2 * sizeof(Pair)), "the tokenizer");
    }
    Symbol *s = e->symbol;
    for (size_t i = 0; i < n; i++)
        s[i] = (Symbol){ i - 1, i + 1, t->byte_token[(unsigned char)text[i]] };
    for (size_t i = 0; i < n; i++) propose(e, i, n, &n_heap);
    while (n_heap) {
        const Pair pair = heap_pop(e->heap, &n_heap);
        const Merge *m = &t->merges[pair.merge];
        const size_t at = pair.at, next = s[at].next;
        if (s[at].id != m->left || next == n || s[next].id != m->right) continue;
        s[at] = (Symbol){ s[at].previous, s[next].next, m->result };
        s[next].id = NO_TOKEN;
        if (s[at].next < n) s[s[at].next].previous = at;
        propose(e, at, n, &n_heap);
        if (at) propose(e, s[at].previous, n, &n_heap);
    }
    for (size_t i = 0; i < n; i = s[i].next) add_id(e, s[i].id);
}

// The tokens of a piece: the one that it is, where that comes before merges, else by merging.
static void encode_piece(Encoder *e, const char *text, size_t n) {
    const Tokenizer *t = e->t;
    if (t->flags & IGNORE_MERGES) {
        const size_t i = count_not_after(t, t->order, t->n_order, 1, text, n);
        size_t length;
        const char *token = i ? token_text(t, t->order[i - 1], &length) : NULL;
        if (i && !compare_texts(token, length, text, n)) {
            add_id(e, t->order[i - 1]);
            return;
        }
    }
    if (t->n_merges) { merge_piece(e, text, n); return; }
    for (size_t i = 0; i < n; i++) add_id(e, t->byte_token[(unsigned char)text[i]]);
}

// The tokens of a text without added tokens.
static void encode_text(Encoder *e, const char *text, size_t n) {
    memset(e->cut, 0, n);
    e->cut[n] = 1;
    for (uint32_t i = 0; i < e->t->n_alternatives; i++) e->hopeless[i] = 0;
    for (uint32_t i = 0; i < e->t->n_stages; i++) cut_pieces(e, i, text, n);
    for (size_t at = 0, end; at < n; at = end) {
        end = (size_t)((char *)memchr(e->cut + at + 1, 1, n - at) - e->cut);
        encode_piece(e, text + at, end - at);
    }
}

// The longest added token that n bytes of text start with, of those that are NORMALIZED or, with
// pass 0, of the others; NULL if there is none. The last token that does not come after the text is
// the one, unless it goes on otherwise: then what is looked for starts both, so it is within what
// they have in common.
static const Added *added_at(const Tokenizer *t, const char *text, size_t n, uint32_t pass) {
    for (size_t i, length, common; n; n = common) {
        i = count_not_after(t, &t->added->id, t->n_added, 2, text, n);
        if (i == 0) break;
        const Added *a = &t->added[i - 1];
        const char *token = token_text(t, a->id, &length);
        for (common = 0; common < length && common < n && token[common] == text[common]; common++) ;
        if (common == length && (a->flags & NORMALIZED) == pass) return a;
        common -= common == length;     // of the other pass: a shorter one may do
    }
    return NULL;
}

// Whether a character is white space (Unicode's property White_Space).
static int is_white(uint32_t code) {
    static const uint32_t white[][2] = {
        { 0x09, 0x0D }, { 0x20, 0x20 }, { 0x85, 0x85 }, { 0xA0, 0xA0 }, { 0x1680, 0x1680 },
        { 0x2000, 0x200A }, { 0x2028, 0x2029 }, { 0x202F, 0x202F }, { 0x205F, 0x205F },
        { 0x3000, 0x3000 },
    };
    return bsearch(&code, white, sizeof white / sizeof *white, sizeof *white,
                   compare_range) != NULL;
}

// Where the white space before text[at] starts, at `low` at the earliest.
static size_t white_before(const char *text, size_t low, size_t at) {
    uint32_t code;
    while (at > low) {
        const size_t from = previous_char(text, low, at);
        next_char(text + from, at - from, &code);
        if (!is_white(code)) break;
        at = from;
    }
    return at;
}

// Where the white space from text[at] on ends, at n at the latest.
static size_t white_after(const char *text, size_t at, size_t n) {
    uint32_t code;
    while (at < n) {
        const size_t length = next_char(text + at, n - at, &code);
        if (!is_white(code)) break;
        at += length;
    }
    return at;
}

// The next added token of a pass from text[*at] on, and where it is; NULL and n if there is none.
static const Added *next_added(const Encoder *e, const char *text, size_t n, uint32_t pass,
                               size_t *at) {
    const Tokenizer *t = e->t;
    for (size_t length; *at < n; *at += length) {
        const Added *a = NULL;
        length = 1;
        if (t->starts[(unsigned char)text[*at]]) a = added_at(t, text + *at, n - *at, pass);
        if (a && (e->special || !(a->flags & SPECIAL))) return a;
        if (a) token_text(t, a->id, &length);       // it is text, and so is all of it
    }
    return NULL;
}

// The tokens of a text. Pass 0 finds added tokens that are not NORMALIZED, from the left and the
// longest of those at one place. Between them a second pass finds the others.
static void encode_added(Encoder *e, const char *text, size_t n, uint32_t pass) {
    for (size_t done = 0, at = 0, from, length; done < n; at = done) {
        const Added *a = next_added(e, text, n, pass, &at);
        from = at;
        if (a) {
            token_text(e->t, a->id, &length);
            at += length;
            if (a->flags & LSTRIP) from = white_before(text, done, from);
            if (a->flags & RSTRIP) at = white_after(text, at, n);
        }
        if (from > done && pass == 0) encode_added(e, text + done, from - done, NORMALIZED);
        else if (from > done) encode_text(e, text + done, from - done);
        if (a) add_id(e, a->id);
        done = at;
    }
}

// Warns, once, of text that Unicode's normal form C may change: that is not done here. A character
// is fine if it may stand in NFC and its combining class is not below that of the one before.
static void warn_of_nfc(const Tokenizer *t, const char *text, size_t n) {
    static int warned;
    uint32_t code, last = 0;
    for (size_t at = 0; at < n && !warned; ) {
        at += next_char(text + at, n - at, &code);
        const uint32_t *range = bsearch(&code, t->normal, t->n_normal, sizeof *t->normal,
                                        compare_range);
        const uint32_t class = range ? range[2] : 0;
        if (class == 255 || (class && class < last)) {
            fprintf(stderr, "%s: the text may not be in Unicode's normal form C, which this "
                    "tokenizer expects: its ids may differ\n", program);
            warned = 1;
        }
        last = class;
    }
}

// Token ids of n bytes of text; there are never more than n, and `ids` has room for that. With
// `special`, the names of special tokens written in the text become their ids. Returns how many.
static size_t encode(const Tokenizer *t, int *ids, const char *text, size_t n, int special) {
    Encoder e = { .t = t, .ids = ids, .special = special };
    e.cut = allocate(sum(n, 1), "the tokenizer");
    e.hopeless = allocate(product(t->n_alternatives, sizeof *e.hopeless), "the tokenizer");
    if (t->flags & NFC) warn_of_nfc(t, text, n);
    encode_added(&e, text, n, 0);
    release(e.cut);
    release(e.hopeless);
    release(e.symbol);
    release(e.heap);
    return e.count;
}

// The bytes of a token, *length of them: none for special tokens and padding.
static const char *decode(const Tokenizer *t, int id, size_t *length) {
    *length = 0;
    if ((uint32_t)id >= t->n_tokens) return t->text;
    for (uint32_t i = 0; i < t->n_added; i++)
        if (t->added[i].id == (uint32_t)id && t->added[i].flags & SPECIAL) return t->text;
    return token_text(t, (uint32_t)id, length);
}

// Text on its way out, in whole characters: bytes wait until their UTF-8 character is complete, and
// what can no longer become one is printed as U+FFFD.
typedef struct { unsigned char waiting[4]; size_t n; FILE *to; } Utf8;

// Prints what is whole of the waiting bytes; with `end`, all of them.
static void utf8_flush(Utf8 *u, int end) {
    while (u->n) {
        size_t length = utf8_length(u->waiting, u->n), done = length;
        if (length > u->n) {
            if (!end) return;
            length = 0;
        }
        if (length) {
            fwrite(u->waiting, 1, length, u->to);
        } else {        // one U+FFFD for the longest beginning that could have become a character
            for (done = u->n; done > 1 && !utf8_length(u->waiting, done); done--) ;
            fputs("\xEF\xBF\xBD", u->to);
        }
        memmove(u->waiting, u->waiting + done, u->n -= done);
    }
}

// Adds n bytes to the output; what they complete is printed.
static void utf8_print(Utf8 *u, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        u->waiting[u->n++] = (unsigned char)bytes[i];
        utf8_flush(u, 0);
    }
}
#endif // COE_C
