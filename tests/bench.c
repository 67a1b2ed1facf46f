// What the machine can do and what the kernels reach of it: the part of `make bench` that must be
// compiled like the programs. tests/bench.py says what to measure and makes a table of it.
//
//     bench fma THREADS                                fused multiply-adds in registers
//     bench read THREADS                               reading memory
//     bench forward|dx|dw THREADS N IN OUT COPIES      matrix products of N tokens
//     bench f32|bf16|q8 THREADS 1 IN OUT COPIES        of one token, with weights of a type
//     bench model FILE [--vocab_size ...]              a model file with random weights
//
// A measurement prints the median of 5 in operations or bytes per second, and (most - least) /
// median of the 5.
#define main train_main
#include "../train.c"
#undef main

enum { REPEATS = 5 };

// Whatever was computed ends up here, for a compiler leaves out what nobody looks at.
static volatile real sink;

// For qsort: the smallest first.
static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// Runs work(of), which does `amount` operations or reads so many bytes, often enough for the clock,
// and prints how many of them it does per second.
static void measure_rate(void (*work)(const void *of), const void *of, double amount) {
    double rate[REPEATS], start = seconds();
    int times = 0;
    do work(of), times++; while (seconds() - start < 0.05);     // and warms up
    for (int k = 0; k < REPEATS; k++) {
        start = seconds();
        for (int i = 0; i < times; i++) work(of);
        rate[k] = amount * times / (seconds() - start);
    }
    qsort(rate, REPEATS, sizeof *rate, ascending);
    printf("%.6g %.6f\n", rate[REPEATS / 2], (rate[REPEATS - 1] - rate[0]) / rate[REPEATS / 2]);
}

// ---- what the machine can do --------------------------------------------------------------------

enum { ROUNDS = 1 << 20 };

// ROUNDS fused multiply-adds on each of as many numbers as tile() in lib/kernels.h holds in
// registers, which is enough to hide that each waits for itself.
WIDE static real multiply_add_rounds(real factor) {
    vec s[TILE_ROWS][PANEL_VECTORS], a = { 0 }, b = { 0 }, all = { 0 };
    a += factor, b += 1 - factor;
    for (int i = 0; i < TILE_ROWS; i++)
        for (int j = 0; j < PANEL_VECTORS; j++) s[i][j] = a + (real)(i + j);
    for (int k = 0; k < ROUNDS; k++)
        for (int i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < PANEL_VECTORS; j++) s[i][j] = s[i][j] * a + b;
    for (int i = 0; i < TILE_ROWS; i++)
        for (int j = 0; j < PANEL_VECTORS; j++) all += s[i][j];
    return add_lanes(&all);
}

// The same in every thread.
static void multiply_add(const void *of) {
    real total = 0;
    #pragma omp parallel reduction(+:total)
    total += multiply_add_rounds(*(const real *)of);
    sink = total;
}

typedef struct { real *x; size_t n; } Numbers;

// Reads all of the numbers once, a part in each thread.
WIDE static void read_numbers(const void *of) {
    const Numbers *all = of;
    enum { PIECE = 1 << 16 };                   // numbers
    real total = 0;
    #pragma omp parallel for schedule(static) reduction(+:total)
    for (size_t from = 0; from < all->n; from += PIECE) {
        const real *x = all->x + from;
        vec s[4] = { { 0 } };
        for (size_t i = 0; i < PIECE; i += 4 * LANES)
            for (size_t j = 0; j < 4; j++) s[j] += load(x + i + j * LANES);
        s[0] += s[1] + s[2] + s[3];
        total += add_lanes(&s[0]);
    }
    sink = total;
}

// ---- matrix products ----------------------------------------------------------------------------

// n numbers, uniform in (-size, size): pages that were never written would all be one in memory.
static void fill(real *x, size_t n, double size, uint64_t seed) {
    enum { PIECE = 1 << 16 };
    #pragma omp parallel for schedule(static)
    for (size_t from = 0; from < n; from += PIECE) {
        uint64_t rng = seed + from;
        for (size_t i = from; i < n && i < from + PIECE; i++)
            x[i] = (real)(size * (2 * rng_uniform(&rng) - 1));
    }
}

static real *random_numbers(size_t n) {
    real *x = allocate(checked_mul(n, sizeof(real)), "random numbers");
    fill(x, n, 1, n);
    return x;
}

enum { PASS_Y, PASS_DX, PASS_DW };

typedef struct {
    int pass;
    size_t n, in, out, copies;      // each of the copies of w is multiplied with n rows of its own
    Tensor w;                       // (copies, out, in)
    real *x, *y;                    // (copies n, in), (copies n, out)
} Products;

// The product of lib/kernels.h with copy e.
static void multiply_copy(const Products *p, size_t e) {
    const size_t n = p->n, in = p->in, out = p->out;
    real *x = p->x + e * n * in, *y = p->y + e * n * out;
    switch (p->pass) {
    case PASS_Y:  linear(y, x, &p->w, e, NULL, n); break;
    case PASS_DX: matmul_nn(x, in, view(y, n, out, out), matrix(&p->w, e), 0); break;
    case PASS_DW: matmul_tn(grad_of(&p->w, e), in, view(y, n, out, out), view(x, n, in, in), 1);
    }
}

// All of them. Several copies are experts: each is a thread's own, as in ffn_forward. For a single
// token they come one after another, and the threads share each.
static void multiply(const void *of) {
    const Products *p = of;
    if (p->copies > 1 && p->n > 1) {
        #pragma omp parallel for schedule(dynamic, 1)
        for (size_t e = 0; e < p->copies; e++) multiply_copy(p, e);
    } else {
        for (size_t e = 0; e < p->copies; e++) multiply_copy(p, e);
    }
}

// Measures the products that argv names, in operations per second, or for one token in bytes.
static void measure_products(const char *what, char **argv) {
    static const char *const names[] = { "forward", "dx", "dw", "f32", "bf16", "q8" };
    int name = 0;
    while (name < 6 && strcmp(what, names[name])) name++;
    if (name == 6) fail(WRONG_USAGE, "%s: unknown, see tests/bench.c", what);
    Products p = { .pass = name < 3 ? name : PASS_Y };
    size_t *const sizes[] = { &p.n, &p.in, &p.out, &p.copies };
    for (int i = 0; i < 4; i++)
        if ((*sizes[i] = strtoul(argv[i], NULL, 10)) == 0)
            fail(WRONG_USAGE, "size %d is \"%s\", must be at least 1", i + 1, argv[i]);
    const size_t weights = checked_mul(checked_mul(p.copies, p.in), p.out);
    p.w = (Tensor){ .name = "w", .copies = p.copies, .rows = p.out, .cols = p.in,
                    .type = name < 3 ? F32 : (enum Type)(name - 3) };
    const size_t bytes = checked_mul(p.copies, copy_bytes(&p.w));
    p.w.data = p.w.type == F32 ? random_numbers(weights) : allocate(bytes, "weights");
    if (p.w.type != F32) memset(p.w.data, 0x3C, bytes);     // 60, or as bfloat16 and scale 0.0115
    p.w.grad = p.pass == PASS_DW ? random_numbers(weights) : NULL;
    p.x = random_numbers(checked_mul(checked_mul(p.copies, p.n), p.in));
    p.y = random_numbers(checked_mul(checked_mul(p.copies, p.n), p.out));
    measure_rate(multiply, &p, p.n == 1 ? (double)bytes : 2.0 * (double)weights * (double)p.n);
}

// ---- models -------------------------------------------------------------------------------------

// Writes a model file without tokenizer; options are config keys. Its weights have the deviation of
// fresh ones but are uniform, and drawn by all threads: a large model takes seconds, not a minute.
static void write_model(const char *path, int argc, char **argv) {
    Model m = { 0 };
    const Options table = { config_keys, CONFIG_KEYS, &m.config, NULL };
    keys_init(config_keys, CONFIG_KEYS, &m.config);
    m.config.generation.bos_token_id = m.config.generation.eos_token_id[0] = -1;
    parse_options(&table, 1, argc, argv, 0, "name");
    config_check(&m.config, "options", WRONG_USAGE);
    m.w = weights_layout(&m.config, false, F32);
    m.weights = allocate(checked_mul(m.w.size, sizeof(real)), "the weights");
    weights_bind(&m.w, m.weights);
    for (size_t i = 0; i < m.w.n_tensors; i++) {
        const Tensor *t = &m.w.tensor[i];
        fill(t->data, tensor_size(t), m.config.initializer_range * sqrt(3), i << 32);
        for (size_t j = 0; t->init == ONES && j < tensor_size(t); j++) t->data[j] = 1;
    }
    Output output;
    output_open(&output, path, false);
    ModelWriter to = { .file = output.file, .path = path };
    write_header(&to, &m, 0);
    write_floats(&to, m.weights, m.w.size);
    write_checksum(&to);
    output_close(&output);
}

int main(int argc, char **argv) {
    program = "bench";
    if (argc < 3) fail(WRONG_USAGE, "usage: bench WHAT THREADS [sizes], see tests/bench.c");
    const char *what = argv[1];
    if (!strcmp(what, "model")) {
        set_threads(0);
        write_model(argv[2], argc - 3, argv + 3);
        return 0;
    }
    set_threads(strtoul(argv[2], NULL, 10));
    if (!strcmp(what, "fma")) {
        const real factor = (real)0.999;
        const int numbers = TILE_ROWS * TILE_COLS * thread_count();
        measure_rate(multiply_add, &factor, 2.0 * numbers * ROUNDS);
    } else if (!strcmp(what, "read")) {
        const size_t n = (size_t)1 << 27;       // 0.5 GB of floats, more than a cache holds
        const Numbers numbers = { random_numbers(n), n };
        measure_rate(read_numbers, &numbers, (double)(n * sizeof(real)));
    } else {
        if (argc != 7) fail(WRONG_USAGE, "%s: takes four sizes, see tests/bench.c", what);
        measure_products(what, argv + 3);
    }
    return 0;
}
