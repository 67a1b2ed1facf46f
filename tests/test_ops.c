// Tests of the operations that coe.c is made of: each against the plain loop or formula that
// defines it, and the fast ones of lib/kernels.h against those that coe.c [4] prints.
//
//     cc -O3 -march=native -fopenmp -o build/test_ops tests/test_ops.c tests/plain_ops.c -lm &&
//     build/test_ops
//
// With -DREAL=double the same again in double, as the gradient check compiles it. The last line is
// "N passed, N failed". Numbers that must only be near have a bound that follows from the rounding
// of one operation, not from experience, so nothing here depends on the machine.
#include <float.h>
#include <setjmp.h>
#include <stdlib.h>
#define exit leave              // fail() ends the program: a test may catch that
static _Noreturn void leave(int code);
#include "../coe.c"
#undef exit
#include "plain_ops.h"
#include <sys/wait.h>

#ifdef REAL_IS_FLOAT
static const double EPS = FLT_EPSILON;
#else
static const double EPS = DBL_EPSILON;
#endif

static int passed, failed;
static uint64_t rng = 1;
static jmp_buf *caught;

static _Noreturn void leave(int code) {
    if (caught) longjmp(*caught, code);
    exit(code);
}

// Counts a test; what fails is printed.
static void check(int ok, const char *format, ...) {
    if (ok) { passed++; return; }
    va_list args;
    va_start(args, format);
    printf("FAILED: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    failed++;
}

// The larger of two errors, and infinity once there was a NaN.
static double larger(double worst, double error) {
    return error <= worst ? worst : isnan(error) ? INFINITY : error;
}

static size_t random_size(size_t least, size_t most) {
    return least + (size_t)(rng_next(&rng) % (most - least + 1));
}
static void fill(real *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (real)rng_normal(&rng);
}

// ---- sizes and random numbers -------------------------------------------------------------------

// The exit code of a child that multiplies or adds two sizes.
static int exit_code(size_t (*operation)(size_t, size_t), size_t a, size_t b) {
    int status;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(99);
        operation(a, b);
        _exit(0);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void test_sizes(void) {
    const size_t half = (size_t)1 << 32;
    check(exit_code(checked_mul, half, half - 1) == 0, "a product that fits");
    check(exit_code(checked_mul, half, half) == FAILED, "a product that does not fit");
    check(exit_code(checked_add, SIZE_MAX - 1, 1) == 0, "a sum that fits");
    check(exit_code(checked_add, SIZE_MAX, 1) == FAILED, "a sum that does not fit");
    for (size_t n = 0; n < 100; n += 33) {
        unsigned char *p = allocate(n, "a test");
        int zero = (uintptr_t)p % 64 == 0;
        for (size_t i = 0; i < n; i++) zero &= p[i] == 0;
        check(zero, "%zu bytes are zero and aligned", n);
        release(p);
    }
}

static void test_random(void) {
    // The published outputs of splitmix64 from the state 1234567.
    static const uint64_t expected[] = { 6457827717110365317u, 3203168211198807973u,
                                         9817491932198370423u, 4593380528125082431u,
                                         16408922859458223821u };
    uint64_t state = 1234567;
    for (size_t i = 0; i < 5; i++)
        check(rng_next(&state) == expected[i], "splitmix64, number %zu", i);
    double mean = 0, square = 0, low = 1, high = 0;
    enum { N = 100000 };
    for (int i = 0; i < N; i++) {
        double u = rng_uniform(&state), x = rng_normal(&state);
        low = fmin(low, u);
        high = fmax(high, u);
        mean += x / N;
        square += x * x / N;
    }
    check(low >= 0 && low < 1e-3 && high < 1 && high > 1 - 1e-3, "uniform in [%g, %g]", low, high);
    // 5 standard deviations of each
    check(fabs(mean) < 5 / sqrt(N) && fabs(square - 1) < 5 * sqrt(2.0 / N),
          "normal: mean %g, variance %g", mean, square);
}

// ---- matrix products ----------------------------------------------------------------------------

// Numbers (rows, cols) at stride ld in exactly the memory they need: the last row has no gap behind
// it, so the address sanitizer sees what goes beyond. Other gaps hold NaN: who reads there spoils
// the result, who writes there is found.
typedef struct { real *x; size_t rows, cols, ld; } Array;

// How many numbers an array takes, gaps included.
static size_t array_size(Array a) { return (a.rows - 1) * a.ld + a.cols; }

static Array random_array(size_t rows, size_t cols, size_t gap) {
    Array a = { NULL, rows, cols, cols + gap };
    a.x = malloc(array_size(a) * sizeof(real));
    for (size_t i = 0; i < array_size(a); i++)
        a.x[i] = i % a.ld < cols ? (real)rng_normal(&rng) : (real)NAN;
    return a;
}

// The same numbers in memory of their own.
static Array copy_of(Array a) {
    Array copy = a;
    copy.x = malloc(array_size(a) * sizeof(real));
    memcpy(copy.x, a.x, array_size(a) * sizeof(real));
    return copy;
}

static Matrix view_of(Array a) { return view(a.x, a.rows, a.cols, a.ld); }

// Whether nobody wrote into the gaps.
static int gaps_are_whole(Array a) {
    for (size_t i = 0; i < array_size(a); i++) if (i % a.ld >= a.cols && !isnan(a.x[i])) return 0;
    return 1;
}

// Compares c with c0 + a b (c0 only with `add`), where a is read at a[i * ai + k * ak] and b at b[k
// * bk + j * bj]. A sum of K products in any order is within (K + 1) eps / 2 times the sum of their
// sizes; twice that allows for a long double that is no longer than a double.
static double worst_error(Array c, const real *c0, const real *a, size_t ai, size_t ak,
                          const real *b, size_t bk, size_t bj, size_t K, int add) {
    double worst = gaps_are_whole(c) ? 0 : INFINITY;
    for (size_t i = 0; i < c.rows; i++)
        for (size_t j = 0; j < c.cols; j++) {
            long double total = add ? c0[i * c.ld + j] : 0, sizes = fabsl(total);
            for (size_t k = 0; k < K; k++) {
                long double term = (long double)a[i * ai + k * ak] * b[k * bk + j * bj];
                total += term;
                sizes += fabsl(term);
            }
            double error =
                (double)(fabsl(c.x[i * c.ld + j] - total) / ((long double)(K + 2) * EPS * sizes));
            worst = larger(worst, error);
        }
    return worst;
}

// The three forms, with matrices of these sizes: x (n, in), w (out, in), y (n, out).
static void test_products(size_t n, size_t in, size_t out, size_t gap, int add) {
    Array x = random_array(n, in, gap), w = random_array(out, in, gap ? gap + 1 : 0),
          y = random_array(n, out, gap ? gap + 2 : 0);
    for (int form = 0; form < 3; form++) {
        Array c = form == 0 ? y : form == 1 ? x : w, before = copy_of(c);
        double worst;
        if (form == 0) {
            matmul_nt(y.x, y.ld, view_of(x), view_of(w), add);
            worst = worst_error(y, before.x, x.x, x.ld, 1, w.x, 1, w.ld, in, add);
        } else if (form == 1) {
            matmul_nn(x.x, x.ld, view_of(y), view_of(w), add);
            worst = worst_error(x, before.x, y.x, y.ld, 1, w.x, w.ld, 1, out, add);
        } else {
            matmul_tn(w.x, w.ld, view_of(y), view_of(x), add);
            worst = worst_error(w, before.x, y.x, 1, y.ld, x.x, x.ld, 1, n, add);
        }
        check(worst <= 1, "matmul_%s, n %zu, in %zu, out %zu, gap %zu, add %d: %g times the bound",
              form == 0 ? "nt" : form == 1 ? "nn" : "tn", n, in, out, gap, add, worst);
        memcpy(c.x, before.x, array_size(c) * sizeof(real));
        free(before.x);
    }
    free(x.x); free(w.x); free(y.x);
}

static void test_matmul(void) {
    // Edges of the kernel: tiles of 6 rows, vectors of 4 to 16, panels 256 deep, blocks of 192
    // rows, slices of CACHE_NUMBERS / (rows + columns), here some 7,000 deep.
    static const size_t sizes[][3] = { { 1, 1, 1 },     { 3, 600, 5 },  { 4, 257, 16 },
                                       { 6, 64, 64 },   { 7, 300, 33 }, { 13, 513, 70 },
                                       { 193, 31, 65 }, { 400, 17, 3 }, { 5, 256, 129 },
                                       { 257, 260, 66 }, { 7300, 33, 40 }, { 33, 7300, 40 },
                                       { 33, 40, 7300 } };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int kind = 0; kind < 4; kind++)
            test_products(sizes[i][0], sizes[i][1], sizes[i][2], kind % 2 ? 3 : 0, kind / 2);
    for (int i = 0; i < 60; i++)
        test_products(random_size(1, 70), random_size(1, 70), random_size(1, 70),
                      random_size(0, 1) * random_size(1, 9), i % 2);
    for (size_t n = 1; n <= FEW + 1; n++)               // few rows take another way
        for (size_t in = 1; in < 40; in += 6)
            for (size_t out = 1; out < 8; out++) test_products(n, in, out, 0, out % 2);
}

// c is summed in one fixed order: the same bits with any number of threads, and in a product of
// fewer rows or columns.
static void test_same_bits(void) {
    enum { M = 300, N = 210, K = 301 };
    Array a = random_array(M, K, 0), b = random_array(N, K, 0), c = random_array(M, N, 0),
          other = random_array(M, N, 0);
    set_threads(1);
    matmul_nt(c.x, N, view_of(a), view_of(b), 0);
    for (size_t threads = 2; threads < 8; threads += threads == 3 ? 4 : 1) {
        set_threads(threads);
        memset(other.x, 0, M * N * sizeof(real));
        matmul_nt(other.x, N, view_of(a), view_of(b), 0);
        check(!memcmp(other.x, c.x, M * N * sizeof(real)),
              "a product with %zu threads has other bits", threads);
        real few[FEW * N], one[FEW * N];
        matmul_nt(few, N, slice(view_of(a), 0, FEW), view_of(b), 0);
        set_threads(1);
        for (size_t t = 0; t < FEW; t++)
            matmul_nt(one + t * N, N, slice(view_of(a), t, 1), view_of(b), 0);
        check(!memcmp(few, one, sizeof few),
              "a product of few rows with %zu threads has other bits than one of each", threads);
    }
    set_threads(1);
    for (int i = 0; i < 40; i++) {
        const size_t row = random_size(0, M - 20), rows = random_size(FEW + 1, 20),
                     col = random_size(0, N - 90), cols = random_size(1, 90);
        matmul_nt(other.x, cols, slice(view_of(a), row, rows), slice(view_of(b), col, cols), 0);
        int same = 1;
        for (size_t j = 0; j < rows; j++)
            same &= !memcmp(other.x + j * cols, c.x + (row + j) * N + col, cols * sizeof(real));
        check(same, "%zu x %zu of a product, computed alone, have other bits", rows, cols);
    }
    free(a.x); free(b.x); free(c.x); free(other.x);
}

// Products with matrices of the types that a file may have, in a stack of 3 copies that has exactly
// the memory it needs. What the numbers stand for is worked out here a second time.
static void test_type(enum Type type, size_t n, size_t in, size_t out, int add) {
    Tensor t = { .name = "w", .copies = 3, .rows = out + 1, .cols = in, .type = type };
    const size_t copy = copy_bytes(&t), e = random_size(0, 2), groups = (in + 63) / 64;
    const size_t int8_bytes = (t.rows * in + 63) / 64 * 64;
    check(copy == (type == BF16 ? 2 * t.rows * in
                                : int8_bytes + (4 * t.rows * groups + 63) / 64 * 64),
          "a copy of type %d, %zu x %zu, has %zu bytes", type, t.rows, in, copy);
    unsigned char *memory = malloc(3 * copy);
    Array w = random_array(t.rows, in, 0);
    for (size_t i = 0; i < 3 * copy; i++) memory[i] = 0xFF;     // NaN in either type
    for (size_t row = 0; row < t.rows; row++)
        for (size_t i = 0; i < in; i++) {
            float x = (float)rng_normal(&rng), scale = (float)(1 + row + i / 64) / 64;
            if (type == BF16) {
                uint32_t bits;
                memcpy(&bits, &x, 4);
                uint16_t half = (uint16_t)(bits >> 16);
                memcpy(memory + e * copy + 2 * (row * in + i), &half, 2);
                bits &= 0xFFFF0000u;
                memcpy(&x, &bits, 4);
            } else {
                int8_t q = (int8_t)(rng_next(&rng) % 127 + 1) * (i % 2 ? 1 : -1);
                memcpy(memory + e * copy + row * in + i, &q, 1);
                memcpy(memory + e * copy + int8_bytes + 4 * (row * groups + i / 64), &scale, 4);
                x = q * scale;
            }
            w.x[row * in + i] = x;
        }
    t.data = (real *)(void *)memory;
    Array x = random_array(n, in, 2), y = random_array(n, out, 3), x0 = copy_of(x), y0 = copy_of(y);
    const Matrix rows = slice(matrix(&t, e), 1, out);
    matmul_nt(y.x, y.ld, view_of(x), rows, add);
    double worst = worst_error(y, y0.x, x.x, x.ld, 1, w.x + in, 1, in, in, add);
    check(worst <= 1, "matmul_nt of type %d, n %zu, in %zu, out %zu: %g times the bound",
          type, n, in, out, worst);
    matmul_nn(x.x, x.ld, view_of(y0), rows, add);
    worst = worst_error(x, x0.x, y0.x, y.ld, 1, w.x + in, in, 1, out, add);
    check(worst <= 1, "matmul_nn of type %d, n %zu, in %zu, out %zu: %g times the bound",
          type, n, in, out, worst);
    free(memory); free(w.x); free(x.x); free(y.x); free(x0.x); free(y0.x);
}

static void test_types(void) {
    for (int i = 0; i < 80; i++)
        test_type(i % 2 ? BF16 : Q8, i < 40 ? random_size(1, 3) : random_size(4, 70),
                  random_size(1, 300), random_size(1, 140), i % 4 > 1);
    test_type(Q8, 1, 64, 1, 0);
    test_type(BF16, 300, 257, 65, 1);
    test_type(Q8, 300, 257, 65, 1);
}

static void test_linear(void) {
    enum { n = 9, in = 21, out = 13, copies = 3 };
    real x[n * in], y[n * out], w[copies * out * in], bias[out];
    fill(x, n * in);
    fill(w, copies * out * in);
    fill(bias, out);
    Tensor tw = { .name = "w", .copies = copies, .rows = out, .cols = in, .data = w },
           tb = { .name = "b", .copies = 1, .rows = 1, .cols = out };
    for (int with_bias = 0; with_bias < 2; with_bias++) {
        tb.data = with_bias ? bias : NULL;
        linear(y, x, &tw, 2, &tb, n);
        double worst = 0;
        for (size_t t = 0; t < n; t++)
            for (size_t i = 0; i < out; i++) {
                double total = with_bias ? (double)bias[i] : 0;
                for (size_t k = 0; k < in; k++)
                    total += (double)x[t * in + k] * (double)w[(2 * out + i) * in + k];
                worst = larger(worst, fabs(y[t * out + i] - total));
            }
        // sums of size 5, with some 20 roundings
        check(worst < 100 * EPS, "linear %s bias: off by %g", with_bias ? "with" : "without",
              worst);
    }
}

// ---- numbers of every type ----------------------------------------------------------------------

static const size_t type_bytes[] = { [F32] = sizeof(real), [BF16] = 2, [Q8] = 1 };

// A matrix of any type in exactly the memory it needs, for free_matrix(), with NaN or what is far
// off in its gaps. The product of a scale and an int8 is rounded in float. In double it is not, for
// number() would round it to a float, and the fast products do not.
static Matrix random_matrix(enum Type type, size_t rows, size_t cols, size_t gap) {
    const size_t ld = cols + gap, groups = groups_of(ld), size = (rows - 1) * ld + cols;
    const size_t scales = (rows - 1) * groups + groups_of(cols);
    if (type == F32) return view_of(random_array(rows, cols, gap));
    unsigned char *data = malloc(size * type_bytes[type]);
    float *scale = type == Q8 ? malloc(scales * sizeof(float)) : NULL;
    for (size_t i = 0; i < size; i++) {
        const float x = i % ld < cols ? (float)rng_normal(&rng) : NAN;
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        const uint16_t half = (uint16_t)(bits >> 16);
        if (type == BF16) memcpy(data + 2 * i, &half, 2);
        else data[i] = i % ld < cols ? (unsigned char)random_size(0, 255) : 0x80;
    }
    for (size_t i = 0; type == Q8 && i < scales; i++) {
        uint32_t bits;
        scale[i] = (float)((0.5 + rng_uniform(&rng)) / 64);
        memcpy(&bits, &scale[i], sizeof bits);
        if (sizeof(real) == sizeof(double)) bits &= 0xFFFFFF00u;
        memcpy(&scale[i], &bits, sizeof bits);
        if (i % groups >= groups_of(cols)) scale[i] = NAN;
    }
    return (Matrix){ data, scale, rows, cols, ld, type };
}

static void free_matrix(Matrix w) {
    free((void *)w.data);
    free((void *)w.scale);
}

static void test_number(void) {
    static uint16_t halves[1 << 16];
    static int8_t bytes[3][260];
    float scale[3][5];
    int right = 1;
    for (size_t i = 0; i < 1 << 16; i++) halves[i] = (uint16_t)i;
    const Matrix bf16 = { halves, NULL, 256, 256, 256, BF16 };
    for (uint32_t i = 0; i < 1 << 16; i++) {
        const float x = (float)number(bf16, i / 256, i % 256);
        const uint32_t bits = i << 16;
        right &= (bits & 0x7FFFFFFFu) > 0x7F800000u ? isnan(x) : !memcmp(&x, &bits, sizeof x);
    }
    check(right, "all numbers of type BF16");
    for (size_t row = 0; row < 3; row++)
        for (size_t i = 0; i < 260; i++) {
            bytes[row][i] = (int8_t)(i + 100 * row);
            scale[row][i / 64] = (float)rng_normal(&rng);
        }
    const Matrix q8 = { bytes, scale[0], 3, 200, 260, Q8 };     // from column 200 on there is a gap
    for (size_t row = 0; row < 3; row++)
        for (size_t i = 0; i < 200; i++)
            right &= number(q8, row, i) == (real)(bytes[row][i] * scale[row][i / 64]);
    check(right, "numbers of type Q8");
    Array a = random_array(7, 5, 4);
    for (size_t row = 0; row < 7; row++)
        for (size_t i = 0; i < 5; i++) right &= number(view_of(a), row, i) == a.x[row * 9 + i];
    check(right, "numbers of type F32");
    free(a.x);
}

// Some rows of a matrix, and of these some.
static void test_slice(void) {
    for (int i = 0; i < 60; i++) {
        const size_t rows = random_size(1, 20), cols = random_size(1, 200);
        const size_t gap = i % 2 ? random_size(1, 90) : 0;
        const Matrix w = random_matrix((enum Type)(i % 3), rows, cols, gap);
        const size_t first = random_size(0, rows - 1), n = random_size(1, rows - first);
        const size_t second = random_size(0, n - 1), m = random_size(1, n - second);
        const Matrix some = slice(w, first, n), fewer = slice(some, second, m);
        int right = some.rows == n && some.cols == cols && some.ld == w.ld && some.type == w.type &&
            fewer.rows == m;
        for (size_t row = 0; row < n; row++)
            for (size_t j = 0; j < cols; j++)
                right &= number(some, row, j) == number(w, first + row, j);
        for (size_t row = 0; row < m; row++)
            for (size_t j = 0; j < cols; j++)
                right &= number(fewer, row, j) == number(w, first + second + row, j);
        check(right, "rows %zu to %zu of %zu x %zu numbers of type %d", first, first + n, rows,
              cols, w.type);
        free_matrix(w);
    }
}

// ---- exponentials and norms ---------------------------------------------------------------------

static void test_exp(void) {
    double worst = 0, at_worst = 0;
    const uint32_t end = 0x42AE0000;                    // the bits of 87.0f
    for (uint32_t sign = 0; sign < 2; sign++)
        for (uint32_t i = 0; i <= end; i += 997) {      // a prime: all kinds of low bits
            uint32_t bits = i | sign << 31;
            float x;
            memcpy(&x, &bits, sizeof x);
            double exact = exp((double)x), ulp = ldexp(EPS, ilogb(exact));
            double error = fabs((double)real_exp((real)x) - exact) / ulp;
            if (!(error <= worst)) { worst = larger(worst, error); at_worst = (double)x; }
        }
    check(worst <= 3, "real_exp(%.9g) is off by %.2f units in the last place", at_worst, worst);
    check(real_exp(0) == 1, "real_exp(0) is %.9g", (double)real_exp(0));
    check(isnan(real_exp((real)NAN)) && isnan(sigmoid((real)NAN)), "real_exp loses a NaN");
#ifdef REAL_IS_FLOAT                                    // in double it is libm's
    const float far[] = { 87.5f, 89, 1000, FLT_MAX, INFINITY };
    for (int i = 0; i < 5; i++) {
        check(isfinite(real_exp(far[i])) && real_exp(far[i]) >= real_exp(86.9f),
              "real_exp(%g) is %g", far[i], real_exp(far[i]));
        check(real_exp(-far[i]) > 0 && real_exp(-far[i]) <= real_exp(-86.9f), "real_exp(%g) is %g",
              -far[i], real_exp(-far[i]));
    }
#endif
    worst = 0;
    for (double x = -80; x <= 80; x += 0.37) {
        const real z = (real)x, two = 2;
        real act;
        double exact = 1 / (1 + exp(-(double)z)), product = 2 * (double)z * exact;
        worst = larger(worst, fabs((double)sigmoid(z) - exact) / exact);
        swiglu(&act, &z, &two, 1);
        worst = larger(worst, fabs((double)act - product) / fabs(product));
    }
    // real_exp 3, then at most 4 roundings of half a unit
    check(worst < 6 * EPS, "sigmoid and swiglu are off by %.2g", worst);
    check(sigmoid(1000) == 1 && sigmoid(-1000) >= 0 && sigmoid(-1000) < (real)1e-37,
          "sigmoid far out");
}

static void test_softmax(void) {
    for (size_t n = 1; n <= 100; n += n < 20 ? 1 : 13)
        for (int kind = 0; kind < 4; kind++) {
            const real scale = kind == 0 ? 1 : (real)(0.1 + 3 * rng_uniform(&rng)),
                       offset = kind == 2 ? (real)1e4 : 0;
            real x[100], y[100];
            fill(x, n);
            for (size_t i = 0; i < n; i++) y[i] = x[i] = kind == 3 ? 5 : 4 * x[i] + offset;
            real log_sum;
            softmax(y, n, scale, &log_sum);
            double total = 0, max = -INFINITY, worst = 0, sum_y = 0;
            for (size_t i = 0; i < n; i++) max = fmax(max, (double)scale * (double)x[i]);
            for (size_t i = 0; i < n; i++) total += exp((double)scale * (double)x[i] - max);
            for (size_t i = 0; i < n; i++) {
                // real_exp 3, the rounding of its argument at most |argument|, the sum and the
                // division n + 1
                double exact = exp((double)scale * (double)x[i] - max) / total;
                double bound = EPS * (3 + 100 + (double)n + 1);
                worst = larger(worst, fabs((double)y[i] - exact) / (exact * bound + 1e-37));
                sum_y += (double)y[i];
            }
            check(worst <= 1 && fabs(sum_y - 1) < EPS * (double)(n + 4),
                  "softmax of %zu, kind %d: %g times the bound, sum %.9g", n, kind, worst, sum_y);
            check(fabs((double)log_sum - max - log(total)) <= EPS * (fabs(max) + (double)n + 10),
                  "log sum of %zu, kind %d: %.9g", n, kind, (double)log_sum);
            int equal = 1;
            for (size_t i = 1; i < n; i++) equal &= y[i] == y[0];
            check(kind != 3 || equal, "softmax of %zu equal numbers is not equal", n);
        }
    real x[3] = { (real)-1e30, 0, (real)1e30 };
    softmax(x, 3, 1, NULL);
    check(x[2] == 1 && x[0] >= 0 && x[0] < (real)1e-37 && x[1] < (real)1e-37,
          "softmax of far numbers is %g %g %g", (double)x[0], (double)x[1], (double)x[2]);
}

static void test_rmsnorm(void) {
    for (size_t d = 1; d < 80; d += 7)
        for (int kept = 0; kept < 2; kept++) {
            enum { n = 5 };
            const double eps = d % 2 ? 1e-6 : 0.3;
            real w[80], inverse[n];
            fill(w, d);
            Array x = random_array(n, d, 3), y = random_array(n, d, 3);
            Tensor t = { .name = "w", .copies = 1, .rows = 1, .cols = d, .data = w };
            rmsnorm(y.x, kept ? inverse : NULL, x.x, x.ld, &t, n, eps);
            double worst = gaps_are_whole(y) ? 0 : INFINITY;
            for (size_t i = 0; i < n; i++) {
                double square = 0;
                for (size_t k = 0; k < d; k++)
                    square += (double)x.x[i * x.ld + k] * (double)x.x[i * x.ld + k];
                double scale = 1 / sqrt(square / (double)d + eps);
                if (kept) worst = larger(worst, fabs(inverse[i] / scale - 1));
                for (size_t k = 0; k < d; k++) {
                    double exact = (double)w[k] * (double)x.x[i * x.ld + k] * scale;
                    worst = larger(worst, fabs(y.x[i * y.ld + k] / exact - 1));
                }
            }
            check(worst < EPS * (double)(d + 8) / 2, "rmsnorm of %zu is off by %g", d, worst);
            free(x.x); free(y.x);
        }
    for (size_t n = 0; n < 70; n++) {
        real x[70], y[70], z[70];
        fill(x, n);
        fill(y, n);
        fill(z, n);
        double exact = 0, sizes = 0, exact3 = 0, sizes3 = 0;
        for (size_t i = 0; i < n; i++) {
            const double two = (double)x[i] * (double)y[i], three = two * (double)z[i];
            exact += two, sizes += fabs(two);
            exact3 += three, sizes3 += fabs(three);
        }
        check(fabs((double)dot(x, y, n) - exact) <= EPS * (double)(n + 2) * sizes, "dot of %zu", n);
        check(fabs((double)dot3(x, y, z, n) - exact3) <= EPS * (double)(n + 3) * sizes3,
              "dot3 of %zu", n);
    }
}

// ---- fast against plain -------------------------------------------------------------------------
// A sum of K terms is within (K + 6) eps / 2 times the sum of their sizes, in any order: K
// roundings to add them up, and at most 6 for a product of three, a scale, or what it is added to.
// Two such sums are within twice that of each other.

static double sum_bound(size_t K, double sizes) { return (double)(K + 6) * EPS * sizes; }

enum Form { NT, NN, TN };
static const char *const form_names[] = { "nt", "nn", "tn" };
static const char *const type_names[] = { "f32", "bf16", "q8" };

// Term k of number (i, j) of a product.
static double term(enum Form form, Matrix a, Matrix b, size_t i, size_t j, size_t k) {
    switch (form) {
    case NT: return (double)number(a, i, k) * (double)number(b, j, k);
    case NN: return (double)number(a, i, k) * (double)number(b, k, j);
    default: return (double)number(a, k, i) * (double)number(b, k, j);
    }
}

// Both forms of c = a b, or += with `add`, where the sums have K terms. c comes out as it was.
static void compare_product(enum Form form, Array c, Matrix a, Matrix b, size_t K, int add) {
    static void (*const both[][2])(real *, size_t, Matrix, Matrix, int) = {
        [NT] = { matmul_nt, plain_matmul_nt }, [NN] = { matmul_nn, plain_matmul_nn },
        [TN] = { matmul_tn, plain_matmul_tn } };
    Array fast = copy_of(c), plain = copy_of(c);
    both[form][0](fast.x, c.ld, a, b, add);
    both[form][1](plain.x, c.ld, a, b, add);
    double worst = gaps_are_whole(fast) && gaps_are_whole(plain) ? 0 : INFINITY;
    for (size_t i = 0; i < c.rows; i++)
        for (size_t j = 0; j < c.cols; j++) {
            const size_t at = i * c.ld + j;
            double sizes = add ? fabs((double)c.x[at]) : 0;
            for (size_t k = 0; k < K; k++) sizes += fabs(term(form, a, b, i, j, k));
            const double off = fabs((double)fast.x[at] - (double)plain.x[at]);
            worst = larger(worst, off <= 0 ? 0 : off / sum_bound(K, sizes));
        }
    check(worst <= 1, "matmul_%s, %zu x %zu and %s %zu x %zu, at strides %zu, %zu, %zu, add %d: "
          "fast and plain are %g times the bound apart", form_names[form], a.rows, a.cols,
          type_names[b.type], b.rows, b.cols, c.ld, a.ld, b.ld, add, worst);
    free(fast.x); free(plain.x);
}

// All forms with x (n, in), w (out, in) and y (n, out), each at a stride of its own.
static void compare_products(enum Type type, size_t n, size_t in, size_t out, int add) {
    size_t gap[4] = { 0 };
    for (int i = 0; i < 4; i++) if (random_size(0, 1)) gap[i] = random_size(1, 80);
    Array x = random_array(n, in, gap[0]), y = random_array(n, out, gap[1]),
          dw = random_array(out, in, gap[2]);
    const Matrix w = random_matrix(type, out, in, gap[3]);
    compare_product(NT, y, view_of(x), w, in, add);
    compare_product(NN, x, view_of(y), w, out, add);
    if (type == F32) compare_product(TN, dw, view_of(y), view_of(x), n, add);
    free(x.x); free(y.x); free(dw.x);
    free_matrix(w);
}

static void test_plain_products(void) {
    static const size_t sizes[][3] = { { 1, 1, 1 },    { 193, 300, 65 }, { 2, 5000, 9 },
                                       { 1, 9000, 5 }, { 7, 64, 64 },    { 6, 128, 33 },
                                       { 5, 33, 2000 } };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int type = F32; type <= Q8; type++)
            for (int add = 0; add < 2; add++)
                compare_products((enum Type)type, sizes[i][0], sizes[i][1], sizes[i][2], add);
    for (int i = 0; i < 240; i++)
        compare_products((enum Type)(i % 3), i % 2 ? random_size(1, 8) : random_size(1, 70),
                         random_size(1, i % 5 ? 70 : 400), random_size(1, 70), i / 3 % 2);
}

// n products of one row each, of up to `most` rows and columns. Every other one has the x and the
// type of the one before; the others are of this type or, where it is 3, of any.
static void compare_matvecs(size_t n, int type, size_t most) {
    Matvec fast[MOST_MATVECS], plain[MOST_MATVECS];
    real *first[MOST_MATVECS];
    size_t scratch_size = 0;
    for (size_t j = 0; j < n; j++) {
        const Matvec *before = j && random_size(0, 1) ? &fast[j - 1] : NULL;
        const enum Type own = type < 3 ? (enum Type)type : (enum Type)random_size(F32, Q8);
        const size_t rows = random_size(1, most), gap = random_size(0, 1) * random_size(1, 80);
        const size_t cols = before ? before->w.cols : random_size(1, most);
        const Matrix w = random_matrix(before ? before->w.type : own, rows, cols, gap);
        const real *x = before ? before->x : random_array(1, cols, 0).x;
        if (!before && w.type != F32) scratch_size += cols;
        fast[j] = (Matvec){ malloc(rows * sizeof(real)), x, w };
        plain[j] = (Matvec){ malloc(rows * sizeof(real)), x, w };
        first[j] = malloc(rows * sizeof(real));
    }
    real *scratch = malloc((scratch_size + 1) * sizeof(real));
    plain_matvecs(plain, n, NULL);
    double worst = 0;
    int same = 1;
    for (size_t threads = 1; threads <= 3; threads++) {
        set_threads(threads);
        matvecs(fast, n, scratch);
        for (size_t j = 0; j < n; j++) {
            const size_t bytes = fast[j].w.rows * sizeof(real);
            if (threads == 1) memcpy(first[j], fast[j].y, bytes);
            same &= !memcmp(first[j], fast[j].y, bytes);
        }
    }
    set_threads(1);
    for (size_t j = 0; j < n; j++) {
        const Matrix w = fast[j].w;
        for (size_t row = 0; row < w.rows; row++) {
            double sizes = 0;
            for (size_t i = 0; i < w.cols; i++)
                sizes += fabs((double)number(w, row, i) * (double)fast[j].x[i]);
            const double off = fabs((double)fast[j].y[row] - (double)plain[j].y[row]);
            worst = larger(worst, off <= 0 ? 0 : off / sum_bound(w.cols, sizes));
        }
    }
    check(worst <= 1, "%zu products of one row, type %d, up to %zu: %g times the bound", n, type,
          most, worst);
    check(same, "%zu products of one row, type %d: other bits with other threads", n, type);
    for (size_t j = n; j-- > 0; ) {
        if (!j || fast[j].x != fast[j - 1].x) free((void *)fast[j].x);
        free(fast[j].y); free(plain[j].y); free(first[j]);
        free_matrix(fast[j].w);
    }
    free(scratch);
}

static void test_matvecs(void) {
    for (int type = 0; type <= 3; type++) {         // 3: a mixture
        for (size_t n = 1; n < 10; n++) compare_matvecs(n, type, 150);
        compare_matvecs(MOST_MATVECS, type, 40);
        compare_matvecs(6, type, 600);
    }
}

static void test_plain_exp(void) {
    double worst = 0, worst_sigmoid = 0;
    for (double at = -86.9; at <= 86.9; at += 0.0137) {
        const real x = (real)at;
        const double exact = (double)plain_real_exp(x), s = (double)plain_sigmoid(x);
        worst = larger(worst, fabs((double)real_exp(x) / exact - 1));
        if (fabs(at) < 80) worst_sigmoid = larger(worst_sigmoid, fabs((double)sigmoid(x) / s - 1));
    }
    // 3 units in the last place and half of one; 6, as above, and 2
    check(worst <= 4 * EPS, "real_exp, fast and plain, are %g apart", worst);
    check(worst_sigmoid <= 8 * EPS, "sigmoid, fast and plain, are %g apart", worst_sigmoid);
    check(isnan(plain_real_exp((real)NAN)) && isnan(plain_sigmoid((real)NAN)) &&
          plain_sigmoid(1000) == 1 && plain_sigmoid(-1000) >= 0, "plain sigmoid far out");
}

static void test_plain_sums(void) {
    enum { MOST_N = 300 };
    real x[MOST_N], y[MOST_N], z[MOST_N];
    for (size_t n = 0; n <= MOST_N; n += n < 70 ? 1 : 23) {
        fill(x, n);
        fill(y, n);
        fill(z, n);
        double sizes = 0, sizes3 = 0;
        for (size_t i = 0; i < n; i++) {
            sizes += fabs((double)x[i] * (double)y[i]);
            sizes3 += fabs((double)x[i] * (double)y[i] * (double)z[i]);
        }
        check(fabs((double)dot(x, y, n) - (double)plain_dot(x, y, n)) <= sum_bound(n, sizes),
              "dot of %zu, fast and plain", n);
        check(fabs((double)dot3(x, y, z, n) - (double)plain_dot3(x, y, z, n)) <=
              sum_bound(n, sizes3), "dot3 of %zu, fast and plain", n);
        if (!n) continue;
        const real scale = (real)(0.1 + 2 * rng_uniform(&rng));
        real fast_log, plain_log, max = x[0];
        for (size_t i = 0; i < n; i++) {
            x[i] *= 4;
            max = x[i] > max || i == 0 ? x[i] : max;
        }
        memcpy(y, x, n * sizeof(real));
        memcpy(z, x, n * sizeof(real));
        softmax(x, n, scale, &fast_log);
        plain_softmax(y, n, scale, &plain_log);
        plain_softmax(z, n, scale, NULL);
        double worst = 0;
        for (size_t i = 0; i < n; i++) {
            // 4 between the exponentials above and below, n for the sums, 2 to divide
            const double bound = EPS * (double)(n + 10) * (double)y[i] + 1e-37;
            worst = larger(worst, fabs((double)x[i] - (double)y[i]) / bound);
        }
        check(worst <= 1 && !memcmp(y, z, n * sizeof(real)),
              "softmax of %zu, fast and plain: %g times the bound", n, worst);
        check(fabs((double)fast_log - (double)plain_log) <=
              EPS * (2 * fabs((double)(scale * max)) + (double)n + 20),
              "log sum of %zu: %.9g and %.9g", n, (double)fast_log, (double)plain_log);
    }
}

// ---- rotations ----------------------------------------------------------------------------------

// A small config; what the tests do not name keeps the table's value.
static Config small_config(void) {
    Config c;
    keys_init(config_keys, CONFIG_KEYS, &c);
    c.vocab_size = c.hidden_size = 16;
    c.generation.bos_token_id = c.generation.eos_token_id[0] = -1;
    c.num_hidden_layers = c.num_attention_heads = 1;
    return c;
}

static const double PI = 3.14159265358979324;

// g(m) of YaRN: a temperature that grows with the logarithm of the stretching.
static double temperature(double factor, double m) {
    return factor > 1 ? 0.1 * m * log(factor) + 1 : 1;
}

static void test_rope(void) {
    // type, factor, original context, beta_fast, beta_slow, mscale, mscale_all_dim, theta
    static const double cases[][8] = { { 0, 1, 4096, 32, 1, 1, 0, 10000 },
                                       { 1, 3.5, 4096, 32, 1, 1, 0, 10000 },
                                       { 2, 40, 4096, 32, 1, 0.707, 0.707, 10000 },
                                       { 2, 40, 4096, 32, 1, 1, 0, 10000 },
                                       { 2, 4, 100, 8, 2, 0.707, 1, 500 },
                                       { 2, 1, 16, 32, 1, 1, 0.707, 1e6 },
                                       { 2, 8, 8, 2, 2, 1, 0, 500 },
                                       { 2, 4, 4096, 32, 1, 1, 0, 10 } };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        const double *o = cases[k], dim = 24, factor = o[1];
        Config c = small_config();
        c.qk_rope_head_dim = 24;
        c.rope_scaling_type = (int[]){ NO_SCALING, LINEAR, YARN }[(int)o[0]];
        c.rope_scaling_factor = factor;
        c.rope_scaling_original = (size_t)o[2];
        c.rope_scaling_beta_fast = o[3];
        c.rope_scaling_beta_slow = o[4];
        c.rope_scaling_mscale = o[5];
        c.rope_scaling_mscale_all = o[6];
        c.rope_theta = o[7];
        State s = state_new(&c, 1, 65, KEEP_NOTHING);
        double low = floor(dim * log(o[2] / (2 * PI * o[3])) / (2 * log(o[7])));
        double high = ceil(dim * log(o[2] / (2 * PI * o[4])) / (2 * log(o[7])));
        low = fmax(low, 0);
        high = fmin(high, dim - 1);
        if (high == low) high += 0.001;
        double worst = 0;
        const double magnitude =
            o[0] == 2 ? temperature(factor, o[5]) / temperature(factor, o[6]) : 1;
        for (size_t p = 0; p < 65; p++)
            for (size_t i = 0; i < 12; i++) {
                double omega = pow(o[7], -2.0 * (double)i / dim);
                double position = o[0] == 1 ? (double)p / factor : (double)p;
                double ramp = fmin(fmax(((double)i - low) / (high - low), 0), 1);
                if (o[0] == 2) omega = omega / factor * ramp + omega * (1 - ramp);
                double angle = position * omega;
                double bound = magnitude * 2 * FLT_EPSILON * (angle + 1);       // angles are floats
                double c_off = fabs((double)s.cos[p * 12 + i] - magnitude * cos(angle));
                double s_off = fabs((double)s.sin[p * 12 + i] - magnitude * sin(angle));
                worst = larger(larger(worst, c_off / bound), s_off / bound);
            }
        check(worst <= 1, "rotation table, case %zu: %g times the bound", k, worst);
        double scale = pow(temperature(factor, o[6]), 2) / sqrt((double)c.qk_nope_head_dim + dim);
        check(fabs((double)attention_scale(&c) / scale - 1) < 2 * EPS,
              "attention scale, case %zu: %.9g", k, (double)attention_scale(&c));

        real x[24], y[24];
        fill(x, 24);
        memcpy(y, x, sizeof x);
        rope(y, &s, 40, 24, 1);
        worst = 0;
        for (size_t i = 0; i < 12; i++) {       // neighbours are the parts of a complex number
            double a = (double)x[2 * i], b = (double)x[2 * i + 1];
            double co = (double)s.cos[40 * 12 + i], si = (double)s.sin[40 * 12 + i];
            worst = larger(worst, fabs((double)y[2 * i] - (a * co - b * si)));
            worst = larger(worst, fabs((double)y[2 * i + 1] - (a * si + b * co)));
        }
        rope(y, &s, 40, 24, -1);                // back, but for the magnitude, which is there twice
        for (size_t i = 0; i < 24; i++)
            worst = larger(worst, fabs((double)y[i] - (double)x[i] * magnitude * magnitude));
        check(worst < 20 * EPS, "rope, case %zu: off by %g", k, worst);
        state_free(&s);
    }
}

// ---- the choice of experts ----------------------------------------------------------------------

// How many of x (n) come before number i: larger ones, and equal ones with a lower index.
static size_t rank(const real *x, size_t n, size_t i) {
    size_t before_i = 0;
    for (size_t k = 0; k < n; k++) before_i += x[k] > x[i] || (x[k] == x[i] && k < i);
    return before_i;
}

// Compares choose() with what the ranks say, of s (E) and a bias (E) or NULL.
static void compare_choice(const real *s, const real *bias, const Config *c, const char *what) {
    const size_t E = c->n_routed_experts, K = c->num_experts_per_tok;
    const size_t groups = c->topk_method == GREEDY ? 1 : c->n_group, size = E / groups;
    const bool v3 = c->topk_method == NOAUX_TC;
    real z[64], allowed[64], best[64], weight[64], left[64];
    int expert[64];
    double total = 1e-20;
    for (size_t e = 0; e < E; e++) z[e] = s[e] + (bias ? bias[e] : 0);
    for (size_t g = 0; g < groups; g++) {
        best[g] = 0;
        for (size_t i = 0; i < size; i++)
            if (rank(z + g * size, size, i) < (v3 ? 2 : 1)) best[g] += z[g * size + i];
    }
    for (size_t e = 0; e < E; e++)
        allowed[e] = c->topk_method == GREEDY || rank(best, groups, e / size) < c->topk_group
                         ? z[e] : v3 ? -INFINITY : 0;
    for (size_t e = 0; e < E; e++)
        if (rank(allowed, E, e) < K) total += (double)(bias ? s[e] : allowed[e]);
    choose(expert, weight, left, s, bias, c);
    int same = 1;
    for (size_t k = 0; k < K; k++) {
        same &= expert[k] >= 0 && (size_t)expert[k] < E;
        for (size_t j = 0; j < k; j++) same &= expert[j] != expert[k];
        const size_t place = rank(allowed, E, (size_t)expert[k]);
        same &= bias ? place < K && (k == 0 || weight[k] <= weight[k - 1]) : place == k;
        double exact = (double)(bias ? s[expert[k]] : allowed[expert[k]]);
        const bool shares = c->norm_topk_prob && (K > 1 || v3);
        if (shares) exact /= total;
        if (!shares || v3) exact *= c->routed_scaling_factor;
        same &= fabs((double)weight[k] - exact) <= (double)(K + 4) * EPS * exact;
    }
    check(same, "choose: %s, E %zu, K %zu, groups %zu of %zu", what, E, K, c->topk_group, groups);
}

static void test_argmax(void) {
    real x[64] = { 1, 3, 3, 2, 3 };
    size_t order[4];
    x[1] = -INFINITY;                       // is taken, as choose() marks it
    for (int i = 0; i < 4; i++) {
        order[i] = argmax(x, 5);
        x[order[i]] = -INFINITY;
    }
    check(order[0] == 2 && order[1] == 4 && order[2] == 3 && order[3] == 0,
          "the largest of 5 numbers, one after the other: %zu %zu %zu %zu", order[0], order[1],
          order[2], order[3]);
    check(argmax(x, 5) == 0, "the largest of 5 that are taken is number %zu", argmax(x, 5));
    for (int i = 0; i < 300; i++) {         // every other time with many that are equal
        const size_t n = random_size(1, 64);
        for (size_t j = 0; j < n; j++)
            x[j] = i % 2 ? (real)rng_normal(&rng) : (real)random_size(0, 4) - 2;
        check(rank(x, n, argmax(x, n)) == 0, "the largest of %zu is number %zu", n, argmax(x, n));
    }
}

static void test_choose(void) {
    Config c = small_config();
    real s[64], bias[64];
    for (int i = 0; i < 900; i++) {
        const bool v3 = i >= 400;
        const size_t groups = random_size(1, 6), size = random_size(v3 ? 2 : 1, 6),
            E = groups * size;
        c.topk_method = v3 ? NOAUX_TC : i % 2 ? GROUP_LIMITED_GREEDY : GREEDY;
        c.scoring_func = v3 ? SIGMOID : SOFTMAX;
        c.n_routed_experts = E;
        c.n_group = i % 2 || v3 ? groups : 1;
        c.topk_group = i % 2 || v3 ? random_size(1, groups) : 1;
        c.num_experts_per_tok = random_size(1, c.topk_group * (E / c.n_group));
        c.norm_topk_prob = i / 2 % 2;
        c.routed_scaling_factor = i % 3 ? 1 : 2.5;
        // Every third time scores have ties; a group that may be chosen always scores something.
        for (size_t e = 0; e < E; e++)
            s[e] = i % 3 ? (real)rng_uniform(&rng) : (real)random_size(1, 3) / 8;
        for (size_t e = 0; e < E; e++) bias[e] = (real)random_size(0, 16) / 4 - 2;
        compare_choice(s, v3 ? bias : NULL, &c, i % 3 ? "random scores" : "ties");
        if (i % 50 < 2 && !v3) {
            for (size_t e = 0; e < E; e++) s[e] = 0;
            compare_choice(s, NULL, &c, "all scores 0");
            for (size_t e = 0; e < E; e++) s[e] = 1 / (real)E;
            compare_choice(s, NULL, &c, "all scores equal");
        }
    }
}

// ---- sampler ------------------------------------------------------------------------------------

enum { V = 14 };
static const real some_logits[V] = {
    1, 2, 1.5, 1, -1, 1, -0.5, 0.25, 1, -3, 0.375, -2, 1.75, -0.125
};

// The distribution that the comment in coe.c [8] describes, said with ranks instead of sorting.
static void distribution(double *p, const Sampler *o, const unsigned char *seen) {
    real z[V];
    double total = 0, largest, ahead, part = 0;
    size_t place[V];
    for (size_t i = 0; i < V; i++) {
        const real penalty = seen && seen[i] ? (real)o->repetition_penalty : 1;
        z[i] = some_logits[i] > 0 ? some_logits[i] / penalty : some_logits[i] * penalty;
    }
    for (size_t i = 0; i < V; i++) {
        place[i] = rank(z, V, i);
        p[i] = exp((double)z[i] / o->temperature);
        if (o->top_k && place[i] >= (size_t)o->top_k) p[i] = 0;
        total += p[i];
    }
    double q[V];
    memcpy(q, p, sizeof q);
    largest = 0;
    for (size_t i = 0; i < V; i++) largest = fmax(largest, q[i]);
    for (size_t i = 0; i < V; i++) {
        ahead = 0;
        for (size_t k = 0; k < V; k++) if (place[k] < place[i]) ahead += q[k];
        if (place[i] && o->top_p < 1 && ahead >= o->top_p * total) p[i] = 0;
        if (q[i] < o->min_p * largest) p[i] = 0;
        part += p[i];
    }
    for (size_t i = 0; i < V; i++) p[i] /= part;
}

// Draws `draws` times and compares with the distribution by chi-square; a correct sampler fails
// once in a million.
static void test_frequencies(Sampler o, int draws, int use_seen) {
    static const unsigned char occurred[V] = { 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1 };
    const unsigned char *seen = use_seen ? occurred : NULL;
    double p[V], chi = 0, freedom = -1, rest = 0;
    int count[V] = { 0 }, counted_rest = 0, wrong = 0;
    Candidate candidate[V];
    distribution(p, &o, seen);
    for (int i = 0; i < draws; i++) {
        real logits[V];
        memcpy(logits, some_logits, sizeof logits);
        count[sample(&o, logits, candidate, seen, V)]++;
    }
    for (int i = 0; i < V; i++) {
        const double expected = p[i] * draws;
        wrong += p[i] == 0 && count[i];
        if (expected < 8) {
            rest += expected;
            counted_rest += count[i];
            continue;
        } // too few for the formula: all together
        chi += (count[i] - expected) * (count[i] - expected) / expected;
        freedom++;
    }
    if (rest >= 8) { chi += (counted_rest - rest) * (counted_rest - rest) / rest; freedom++; }
    // Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly
    // normal. 4.75 is one in a million.
    const double limit =
        freedom > 0 ? freedom * pow(1 - 2 / (9 * freedom) + 4.75 * sqrt(2 / (9 * freedom)), 3)
                    : 1e-9;
    check(!wrong && chi <= limit,
          "sampler: temperature %g, top-k %d, top-p %g, min-p %g, penalty %g: chi-square %.1f of "
          "%.0f, limit %.1f, %d filtered tokens drawn",
          o.temperature, (int)o.top_k, o.top_p, o.min_p, seen ? o.repetition_penalty : 1, chi,
          freedom, limit, wrong);
}

static int draw_one(Sampler o, const real *some, size_t n, const unsigned char *seen) {
    real logits[300];
    Candidate candidate[300];
    memcpy(logits, some, n * sizeof(real));
    return sample(&o, logits, candidate, seen, n);
}

static void test_sampler(void) {
    const Sampler plain = { .temperature = 1, .top_p = 1, .repetition_penalty = 1, .rng = 7 };
    for (int i = 0; i < 15; i++) {                      // one setting at a time
        Sampler o = plain;
        if (i < 3) o.temperature = i == 0 ? 1 : i == 1 ? 0.4 : 3;
        else if (i < 6) o.top_k = i == 3 ? 1 : i == 4 ? 4 : 1000; // 4 cuts through the equal ones
        else if (i < 9) o.top_p = i == 6 ? 0 : i == 7 ? 0.5 : 0.9;
        else if (i < 12) o.min_p = i == 9 ? 0.1 : i == 10 ? 0.45 : 1;
        else o.repetition_penalty = i == 12 ? 1.5 : i == 13 ? 0.7 : 1;
        test_frequencies(o, 40000, i >= 12);
    }
    for (int i = 0; i < 2 * 3 * 3 * 3 * 2; i++) {       // and together
        Sampler o = plain;
        o.temperature = i % 2 ? 0.7 : 1.9;
        o.top_k = (int64_t[]){ 0, 5, 9 }[i / 2 % 3];
        o.top_p = (double[]){ 1, 0.8, 0.55 }[i / 6 % 3];
        o.min_p = (double[]){ 0, 0.2, 0.6 }[i / 18 % 3];
        o.repetition_penalty = 1.3;
        o.rng = (uint64_t)i;
        test_frequencies(o, 5000, i / 54 % 2);
    }
    const real ties[4] = { -1, 2, 2, -1 };
    const unsigned char seen[4] = { 0, 1, 0, 0 };
    const double cold[] = { 0, 1e-40, 1e-12 };
    for (int i = 0; i < 3; i++) {
        Sampler o = plain;
        o.temperature = cold[i];
        check(draw_one(o, ties, 4, NULL) == 1, "temperature %g: among equals the lower id",
              cold[i]);
        o.repetition_penalty = 2;
        check(draw_one(o, ties, 4, seen) == 2, "temperature %g with a penalty", cold[i]);
    }
    real many[300];
    for (size_t i = 0; i < 300; i++) many[i] = (real)(i * 7 % 300);
    Sampler o = plain;
    o.temperature = 0.01;                               // e^-100 for the second
    check(draw_one(o, many, 300, NULL) == 257,
          "a low temperature takes the largest"); // 257 * 7 = 299 modulo 300
    int first = -1, other = 0;
    for (uint64_t seed = 0; seed < 20; seed++) {
        o = plain;
        o.rng = seed;
        int id = draw_one(o, some_logits, V, NULL);
        check(draw_one(o, some_logits, V, NULL) == id, "the same seed draws the same");
        if (first < 0) first = id;
        other |= id != first;
    }
    check(other, "the seed makes no difference");
}

// sample() as the comment in coe.c [8] says it: everything is sorted.
static int sample_by_sorting(Sampler *o, real *logits, Candidate *candidate, size_t V) {
    double all = 0, part = 0, total = 0;
    size_t kept = 0;
    softmax(logits, V, (real)(1 / o->temperature), NULL);
    for (size_t i = 0; i < V; i++) candidate[i] = (Candidate){ logits[i], (int)i };
    qsort(candidate, V, sizeof *candidate, before);
    const size_t most = o->top_k && (size_t)o->top_k < V ? (size_t)o->top_k : V;
    for (size_t i = 0; i < most; i++) all += (double)candidate[i].p;
    while (kept < most && (kept == 0 || o->top_p == 1 || part < o->top_p * all))
        part += (double)candidate[kept++].p;
    while (kept > 1 && (double)candidate[kept - 1].p < o->min_p * (double)candidate[0].p) kept--;
    for (size_t i = 0; i < kept; i++) total += (double)candidate[i].p;
    double u = rng_uniform(&o->rng) * total;
    for (size_t i = 0; i + 1 < kept; i++) {
        u -= (double)candidate[i].p;
        if (u < 0) return candidate[i].id;
    }
    return candidate[kept - 1].id;
}

static void test_selection(void) {
    enum { MANY = 3000 };
    static real logits[MANY], copy[MANY];
    static Candidate candidate[MANY];
    for (int i = 0; i < 4000; i++) {
        const size_t n = random_size(1, i % 8 ? 60 : MANY), kinds = random_size(1, 40);
        const double spread = pow(10, -2 + 3 * rng_uniform(&rng));
        for (size_t k = 0; k < n; k++)          // every third time with many that are equal
            logits[k] = (real)(spread * (i % 3 ? rng_normal(&rng) : (double)random_size(1, kinds)));
        Sampler o = { .temperature = 0.1 + 2 * rng_uniform(&rng), .repetition_penalty = 1,
                      .top_k = i / 2 % 2 ? (int64_t)random_size(1, n + 2) : 0,
                      .top_p = i / 4 % 2 ? rng_uniform(&rng) : 1,
                      .min_p = i / 8 % 2 ? rng_uniform(&rng) : 0, .rng = (uint64_t)i }, same = o;
        memcpy(copy, logits, sizeof copy);
        const int id = sample(&o, logits, candidate, NULL, n);
        const int expected = sample_by_sorting(&same, copy, candidate, n);
        check(id == expected && o.rng == same.rng,
              "%zu logits, top-k %d, top-p %g, min-p %g: %d is drawn, sorting draws %d",
              n, (int)o.top_k, o.top_p, o.min_p, id, expected);
        const size_t k = random_size(0, n);
        double least = INFINITY, most = 0;      // of the k first, of the others
        for (size_t j = 0; j < n; j++) candidate[j] = (Candidate){ copy[j], (int)j };
        select_first(candidate, n, k);
        qsort(candidate, k, sizeof *candidate, before);
        qsort(candidate + k, n - k, sizeof *candidate, before);
        if (k && k < n && before(&candidate[k - 1], &candidate[k]) > 0) least = most + 1;
        check(least == INFINITY, "select_first: %zu of %zu", k, n);
    }
}

// ---- text ---------------------------------------------------------------------------------------

// The well-formed byte sequences, table 3-7 of the Unicode standard: first byte, second byte,
// length. Others are 80..BF.
static const struct { unsigned char first[2], second[2]; size_t length;
} unicode[] = { { { 0x00, 0x7F }, { 0, 0 }, 1 },       { { 0xC2, 0xDF }, { 0x80, 0xBF }, 2 },
                { { 0xE0, 0xE0 }, { 0xA0, 0xBF }, 3 }, { { 0xE1, 0xEC }, { 0x80, 0xBF }, 3 },
                { { 0xED, 0xED }, { 0x80, 0x9F }, 3 }, { { 0xEE, 0xEF }, { 0x80, 0xBF }, 3 },
                { { 0xF0, 0xF0 }, { 0x90, 0xBF }, 4 }, { { 0xF1, 0xF3 }, { 0x80, 0xBF }, 4 },
                { { 0xF4, 0xF4 }, { 0x80, 0x8F }, 4 } };

// How many of the n bytes could begin a character, and in *whole whether they are all of it.
static size_t beginning(const unsigned char *b, size_t n, int *whole) {
    *whole = 0;
    for (size_t i = 0; i < sizeof unicode / sizeof *unicode; i++) {
        if (b[0] < unicode[i].first[0] || b[0] > unicode[i].first[1]) continue;
        size_t k = 1;
        for (; k < unicode[i].length && k < n; k++)
            if (k == 1 ? b[1] < unicode[i].second[0] || b[1] > unicode[i].second[1]
                       : b[k] < 0x80 || b[k] > 0xBF)
                return k;
        *whole = k == unicode[i].length;
        return k;
    }
    return 0;
}

// What should be printed of these bytes, with U+FFFD for every longest beginning that is not a
// character. Without `end`, a beginning at the end waits.
static size_t expected_text(char *out, const unsigned char *b, size_t n, int end) {
    size_t length = 0;
    for (size_t i = 0; i < n; ) {
        int whole;
        size_t k = beginning(b + i, n - i, &whole);
        if (!whole && k && i + k == n && !end) break;
        if (whole) memcpy(out + length, b + i, k);
        else memcpy(out + length, "\xEF\xBF\xBD", 3);
        length += whole ? k : 3;
        i += k ? k : 1;
    }
    return length;
}

static void test_utf8(void) {
    // Bytes around every limit of the table, so that all kinds of mistakes come up.
    static const unsigned char bytes[] = { 'a',  0,    0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF,
                                           0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE,
                                           0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF };
    int right = 1;
    for (int i = 0; i < 30000; i++) {
        unsigned char text[12];
        char expected[40], *printed;
        size_t n = random_size(1, 12), length, size;
        for (size_t k = 0; k < n; k++)
            text[k] = random_size(0, 2) ? bytes[random_size(0, sizeof bytes - 1)]
                                        : (unsigned char)random_size(0x80, 0xBF);
        Utf8 u = { .to = open_memstream(&printed, &size) };
        for (size_t k = 1; k <= n && right;
             k++) { // after every byte all that is whole is out, and nothing else
            utf8_print(&u, (const char *)text + k - 1, 1);
            fflush(u.to);
            length = expected_text(expected, text, k, 0);
            right = size == length && !memcmp(printed, expected, length);
        }
        utf8_flush(&u, 1);
        fclose(u.to);
        length = expected_text(expected, text, n, 1);
        right &= size == length && !memcmp(printed, expected, length) && u.n == 0;
        free(printed);
        if (!right) {
            printf("bytes:");
            for (size_t k = 0; k < n; k++) printf(" %02x", text[k]);
            printf("\n");
            break;
        }
    }
    check(right, "UTF-8: what is printed of these bytes");
}

// ---- tokenizer ----------------------------------------------------------------------------------
// A tokenizer for tests is written down here, or drawn at random, made a section of a model file,
// and read from that. encode() is compared with the plainest code that does what it should.

enum { MOST = 64, TEXT_MOST = 64 };             // of everything in a Plan; bytes of a text

typedef struct { uint32_t low, high; } Range;
typedef struct {                                // a tokenizer, before it becomes a section
    size_t n_tokens, n_merges, n_stages, n_alternatives, n_items, n_classes, n_added;
    struct { char bytes[32]; size_t n; } token[256 + 2 * MOST];     // the first 256 are the bytes
    uint32_t merge[MOST][2];                    // by rank; token 256 + i is the result
    uint32_t stage[MOST + 1], alternative[MOST + 1];
    Item item[MOST];
    Range range[MOST][2];                       // every class has two ranges
    uint32_t added_flags[MOST];                 // of token 256 + n_merges + i
    uint32_t flags;
} Plan;

static size_t plan_token(Plan *p, const char *bytes, size_t n) {
    memcpy(p->token[p->n_tokens].bytes, bytes, n);
    p->token[p->n_tokens].n = n;
    return p->n_tokens++;
}

// A plan with all bytes and nothing else.
static void plan_bytes(Plan *p) {
    memset(p, 0, sizeof *p);
    for (int i = 0; i < 256; i++) {
        const char byte = (char)i;
        plan_token(p, &byte, 1);
    }
}

// Adds the token that two tokens merge to, the next in rank. Merges come before added tokens.
static uint32_t plan_merge(Plan *p, uint32_t left, uint32_t right) {
    char both[64];
    memcpy(both, p->token[left].bytes, p->token[left].n);
    memcpy(both + p->token[left].n, p->token[right].bytes, p->token[right].n);
    p->merge[p->n_merges][0] = left;
    p->merge[p->n_merges++][1] = right;
    return (uint32_t)plan_token(p, both, p->token[left].n + p->token[right].n);
}
static void plan_added(Plan *p, const char *text, uint32_t flags) {
    plan_token(p, text, strlen(text));
    p->added_flags[p->n_added++] = flags;
}

// A class of two ranges; then an item, the end of an alternative and the end of a stage.
static uint32_t plan_class(Plan *p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    p->range[p->n_classes][0] = (Range){ a, b };
    p->range[p->n_classes][1] = (Range){ c, d };
    return (uint32_t)p->n_classes++;
}
static void plan_item(Plan *p, uint32_t kind, uint32_t class, uint32_t least, uint32_t most) {
    p->item[p->n_items++] = (Item){ kind, class, least, most };
}
static void end_alternative(Plan *p) { p->alternative[++p->n_alternatives] = (uint32_t)p->n_items; }
static void end_stage(Plan *p) { p->stage[++p->n_stages] = (uint32_t)p->n_alternatives; }

// Compares two tokens of a plan by their bytes, for sorting; the plan is a global for qsort's sake.
static const Plan *sorted_plan;
static int by_bytes(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    const size_t nx = sorted_plan->token[x].n, ny = sorted_plan->token[y].n;
    int c = memcmp(sorted_plan->token[x].bytes, sorted_plan->token[y].bytes, nx < ny ? nx : ny);
    return c ? c : nx < ny ? -1 : nx > ny;
}

// Adds an array to a section: `bytes` from the last multiple of 64 on.
static void put(char *section, size_t *used, const void *from, size_t bytes) {
    memcpy(section + *used, from, bytes);
    *used = (*used + bytes + 63) / 64 * 64;
}

// The section of a plan, in the order of the README; the caller frees it.
static char *plan_section(const Plan *p, size_t *bytes) {
    char *section = aligned_alloc(64, 1 << 16), text[8192];
    uint32_t first[256 + 2 * MOST + 1] = { 0 }, order[256 + 2 * MOST], added[MOST][2];
    uint32_t byte_token[256], classes[MOST][2], head[16] = { 0 };
    Merge merges[MOST];
    memset(section, 0, 1 << 16);
    for (size_t i = 0; i < p->n_tokens; i++) {
        memcpy(text + first[i], p->token[i].bytes, p->token[i].n);
        first[i + 1] = first[i] + (uint32_t)p->token[i].n;
    }
    sorted_plan = p;
    const size_t n_order = p->flags & IGNORE_MERGES ? 256 + p->n_merges : 0;
    for (uint32_t i = 0; i < 256; i++) byte_token[i] = i;
    for (uint32_t i = 0; i < n_order; i++) order[i] = i;
    qsort(order, n_order, sizeof *order, by_bytes);
    for (uint32_t i = 0; i < p->n_merges; i++)
        merges[i] = (Merge){ p->merge[i][0], p->merge[i][1], i, 256 + i };
    qsort(merges, p->n_merges, sizeof *merges, compare_merges);
    for (uint32_t i = 0; i < p->n_classes; i++) {
        classes[i][0] = 2 * i;
        classes[i][1] = 2;
    }
    for (uint32_t i = 0; i < p->n_added; i++) {
        added[i][0] = 256 + (uint32_t)p->n_merges + i;
        added[i][1] = p->added_flags[i];
    }
    qsort(added, p->n_added, sizeof *added, by_bytes);
    const size_t counts[12] = { p->n_tokens, first[p->n_tokens], n_order, p->n_merges, p->n_stages,
                                p->n_alternatives, p->n_items, p->n_classes, 2 * p->n_classes,
                                p->n_added, 0, p->flags };
    for (int i = 0; i < 12; i++) head[i] = (uint32_t)counts[i];
    *bytes = 0;
    put(section, bytes, head, sizeof head);
    put(section, bytes, first, (p->n_tokens + 1) * 4);
    put(section, bytes, text, first[p->n_tokens]);
    put(section, bytes, byte_token, sizeof byte_token);
    put(section, bytes, order, n_order * 4);
    put(section, bytes, merges, p->n_merges * sizeof *merges);
    put(section, bytes, p->stage, (p->n_stages + 1) * 4);
    put(section, bytes, p->alternative, (p->n_alternatives + 1) * 4);
    put(section, bytes, p->item, p->n_items * sizeof *p->item);
    put(section, bytes, classes, p->n_classes * sizeof *classes);
    put(section, bytes, p->range, p->n_classes * sizeof *p->range);
    put(section, bytes, added, p->n_added * sizeof *added);
    return section;
}

// The code point at text[at], and its length: a byte that is no UTF-8 is U+FFFD.
static uint32_t char_at(const char *text, size_t at, size_t end, size_t *length) {
    const unsigned char *b = (const unsigned char *)text + at;
    int whole;
    const size_t k = beginning(b, end - at, &whole);
    *length = whole ? k : 1;
    if (!whole) return 0xFFFD;
    return k == 1 ? b[0] : k == 2 ? (b[0] & 31u) << 6 | (b[1] & 63u) :
           k == 3 ? (b[0] & 15u) << 12 | (b[1] & 63u) << 6 | (b[2] & 63u) :
           (b[0] & 7u) << 18 | (b[1] & 63u) << 12 | (b[2] & 63u) << 6 | (b[3] & 63u);
}
static int plain_in_class(const Plan *p, uint32_t class, uint32_t code) {
    const Range *r = p->range[class];
    return (code >= r[0].low && code <= r[0].high) || (code >= r[1].low && code <= r[1].high);
}

// Where items i to n - 1 match, by recursion; -1 if they do not.
static long plain_match(const Plan *p, size_t i, size_t n, const char *text, size_t at,
                        size_t end) {
    size_t length, stops[TEXT_MOST + 1], count = 0;
    if (i == n) return (long)at;
    const Item *item = &p->item[i];
    if (item->kind == AT_END)
        return at == end || text[at] == '\n' ? plain_match(p, i + 1, n, text, at, end) : -1;
    if (item->kind == NOT_BEFORE)
        return at < end && plain_in_class(p, item->class, char_at(text, at, end, &length)) ? -1
             : plain_match(p, i + 1, n, text, at, end);
    for (stops[0] = at; stops[count] < end && count < item->most; count++) {
        if (!plain_in_class(p, item->class, char_at(text, stops[count], end, &length))) break;
        stops[count + 1] = stops[count] + length;
    }
    for (size_t k = count + 1; k-- > item->least; ) {
        const long to = plain_match(p, i + 1, n, text, stops[k], end);
        if (to >= 0) return to;
    }
    return -1;
}

// Cuts text[0..n) at every start and end of a match of a stage; recursion does the next stages.
// The last cut's pieces are merged: of all pairs the lowest rank, the first of them.
static size_t plain_pieces(const Plan *p, size_t stage, int *ids, const char *text, size_t n) {
    size_t count = 0, length;
    if (stage < p->n_stages) {
        size_t from = 0;
        for (size_t at = 0; at <= n; ) {
            long to = -1;
            for (size_t a = p->stage[stage]; a < p->stage[stage + 1] && to < 0 && at < n; a++)
                to = plain_match(p, p->alternative[a], p->alternative[a + 1], text, at, n);
            if (to >= 0 || at == n) {
                if (at > from)
                    count += plain_pieces(p, stage + 1, ids + count, text + from, at - from);
                if (to > (long)at)
                    count += plain_pieces(p, stage + 1, ids + count, text + at, (size_t)to - at);
                from = to > (long)at ? (size_t)to : at;
            }
            if (at == n) break;
            if (to > (long)at) at = (size_t)to;
            else { char_at(text, at, n, &length); at += length; }
        }
        return count;
    }
    for (size_t i = 0; p->flags & IGNORE_MERGES && i < 256 + p->n_merges; i++)
        if (p->token[i].n == n && !memcmp(p->token[i].bytes, text, n)) {
            ids[0] = (int)i;
            return 1;
        }
    for (; count < n; count++) ids[count] = (unsigned char)text[count];
    for (size_t best = 0, where = 0; best < p->n_merges; ) {
        best = p->n_merges;
        for (size_t i = 0; i + 1 < count; i++)
            for (size_t m = 0; m < best; m++)
                if (p->merge[m][0] == (uint32_t)ids[i] && p->merge[m][1] == (uint32_t)ids[i + 1]) {
                    best = m;
                    where = i;
                }
        if (best == p->n_merges) break;
        ids[where] = (int)(256 + best);
        memmove(ids + where + 1, ids + where + 2, (--count - where - 1) * sizeof *ids);
    }
    return count;
}

// The same for a whole text: added tokens of a pass, from the left and the longest first.
static size_t plain_encode(const Plan *p, uint32_t pass, int *ids, const char *text, size_t n,
                           int special) {
    static const char *const white[] = { " ", "\n", "\t", "\xC2\xA0", "\xE3\x80\x80" };
    const size_t kinds = sizeof white / sizeof *white;
    size_t count = 0, done = 0;
    for (size_t at = 0; at <= n; at++) {
        size_t longest = 0, which = 0;
        for (size_t i = 0; i < p->n_added; i++) {
            const size_t id = 256 + p->n_merges + i, k = p->token[id].n;
            if ((p->added_flags[i] & NORMALIZED) == pass && k > longest && k <= n - at &&
                !memcmp(p->token[id].bytes, text + at, k)) {
                longest = k;
                which = i;
            }
        }
        if (!longest && at < n) continue;
        const uint32_t flags = longest ? p->added_flags[which] : 0;
        size_t from = at, to = at + longest;
        if (flags & SPECIAL && !special) {
            at = to - 1;
            continue;
        }
        for (size_t i = 0; flags & LSTRIP && i < kinds; i++) {
            const size_t k = strlen(white[i]);
            if (from < done + k || memcmp(text + from - k, white[i], k)) continue;
            from -= k;
            i = SIZE_MAX;       // and once more
        }
        for (size_t i = 0; flags & RSTRIP && i < kinds; i++) {
            const size_t k = strlen(white[i]);
            if (n - to < k || memcmp(text + to, white[i], k)) continue;
            to += k;
            i = SIZE_MAX;
        }
        at = to - (longest > 0);
        if (from > done && !pass)
            count += plain_encode(p, NORMALIZED, ids + count, text + done, from - done, special);
        else if (from > done)
            count += plain_pieces(p, 0, ids + count, text + done, from - done);
        if (longest) ids[count++] = (int)(256 + p->n_merges + which);
        done = to;
    }
    return count;
}

// A text of parts that patterns, merges and added tokens are about, and of bytes that are no text.
static size_t random_text(char *text) {
    static const char *const parts[] = { "a", "a", "b", "b", "c", "1", "2", " ", " ", "\n", "\t",
                                         "\xC3\xA9", "\xE4\xBD\xA0", "\xC2\xA0", "\xE3\x80\x80",
                                         "\xF0\x9F\x99\x82", "<a>", "<ab>", "<b", "\xC3", "\xFF",
                                         "\x80", "\xE4\xBD" };
    const size_t kinds = sizeof parts / sizeof *parts, want = random_size(0, TEXT_MOST - 4);
    size_t n = 0;
    while (n < want) {
        const char *part = parts[random_size(0, kinds - 1)];
        memcpy(text + n, part, strlen(part));
        n += strlen(part);
    }
    return n;
}

// Any tokenizer at all: merges of tokens that there are, patterns of one to three stages.
static void random_plan(Plan *p) {
    static const uint32_t some[] = { 'a', 'b', 'c', ' ', '1', 0xC3, 0xA9 };
    static const char *const names[] = { "<a>", "<ab>", "<b", "<", "a", "b1", "\xE4\xBD\xA0" };
    plan_bytes(p);
    for (size_t i = random_size(0, 30); i; i--) {
        uint32_t pair[2], is_new = 1;
        for (int k = 0; k < 2; k++)
            pair[k] = p->n_merges && random_size(0, 1)
                ? 256 + (uint32_t)random_size(0, p->n_merges - 1) : some[random_size(0, 6)];
        for (size_t m = 0; m < p->n_merges; m++)
            is_new &= p->merge[m][0] != pair[0] || p->merge[m][1] != pair[1];
        if (is_new && p->token[pair[0]].n + p->token[pair[1]].n < 16)
            plan_merge(p, pair[0], pair[1]);
    }
    // The same text may come from two merges; in order it may be there only once.
    p->flags = IGNORE_MERGES * (uint32_t)random_size(0, 1);
    for (size_t i = 0; i < p->n_merges; i++)
        for (size_t k = 0; k < i; k++)
            if (p->token[256 + i].n == p->token[256 + k].n &&
                !memcmp(p->token[256 + i].bytes, p->token[256 + k].bytes, p->token[256 + k].n))
                p->flags = 0;
    plan_class(p, 'a', 'b', 0xE9, 0x4FFF);
    plan_class(p, '\t', '\n', ' ', ' ');
    plan_class(p, '1', '2', 'b', 'c');
    plan_class(p, 0, 'a', 'c', 0x10FFFF);
    for (size_t stages = random_size(0, 3); stages; stages--) {
        for (size_t alternatives = random_size(1, 4); alternatives; alternatives--) {
            for (size_t items = random_size(1, 4); items; items--) {
                const uint32_t kind = random_size(0, 3) ? CHARACTERS : (uint32_t)random_size(1, 2);
                const uint32_t least = (uint32_t)random_size(0, 2);
                plan_item(p, kind, (uint32_t)random_size(0, 3), least,
                          random_size(0, 2) ? NO_LIMIT : least + (uint32_t)random_size(0, 2));
            }
            end_alternative(p);
        }
        end_stage(p);
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!random_size(0, 2)) plan_added(p, names[i], (uint32_t)random_size(0, 15));
}

static void test_random_tokenizers(void) {
    static Plan p;
    int right = 1;
    for (int i = 0; i < 1500 && right; i++) {
        size_t bytes;
        random_plan(&p);
        char *section = plan_section(&p, &bytes);
        Tokenizer *t = tokenizer_new(BPE, section, bytes, "test", p.n_tokens);
        for (int k = 0; k < 10 && right; k++) {
            char text[TEXT_MOST + 4];
            int ids[TEXT_MOST + 4], expected[TEXT_MOST + 4], special = k % 2;
            const size_t n = random_text(text);
            const size_t count = encode(t, ids, NULL, text, n, special);
            const size_t wanted = plain_encode(&p, 0, expected, text, n, special);
            right = count == wanted && count <= n && !memcmp(ids, expected, count * sizeof *ids);
            if (right) continue;
            printf("text:");
            for (size_t b = 0; b < n; b++) printf(" %02x", (unsigned char)text[b]);
            printf("\nids:");
            for (size_t b = 0; b < count; b++) printf(" %d", ids[b]);
            printf("\nexpected:");
            for (size_t b = 0; b < wanted; b++) printf(" %d", expected[b]);
            printf("\n");
        }
        release(t);
        free(section);
    }
    check(right, "random tokenizers: what they make of this text");
}

// A tokenizer of the kind that language models have: white space at the end of a line, numbers of
// up to three digits, words with the blank before them, other white space but for that blank.
static void usual_plan(Plan *p) {
    plan_bytes(p);
    const uint32_t aa = plan_merge(p, 'a', 'a'), hi = plan_merge(p, 'h', 'i');
    plan_merge(p, aa, aa);
    plan_merge(p, ' ', hi);
    plan_merge(p, ' ', ' ');
    plan_merge(p, '1', '2');
    plan_merge(p, 0xC3, 0xA9);
    const uint32_t digit = plan_class(p, '0', '9', 0x660, 0x669),
        letter = plan_class(p, 'a', 'z', 0xC0, 0x24F), blank = plan_class(p, ' ', ' ', 0xA0, 0xA0),
        white = plan_class(p, '\t', '\r', ' ', ' '), dark = plan_class(p, 0, 8, '!', 0x10FFFF);
    plan_item(p, CHARACTERS, white, 1, NO_LIMIT);
    plan_item(p, AT_END, 0, 0, 0);
    end_alternative(p);
    end_stage(p);
    plan_item(p, CHARACTERS, digit, 1, 3);
    end_alternative(p);
    end_stage(p);
    plan_item(p, CHARACTERS, blank, 0, 1);
    plan_item(p, CHARACTERS, letter, 1, NO_LIMIT);
    end_alternative(p);
    plan_item(p, CHARACTERS, white, 1, NO_LIMIT);
    plan_item(p, NOT_BEFORE, dark, 0, 0);
    end_alternative(p);
    plan_item(p, CHARACTERS, white, 1, NO_LIMIT);
    end_alternative(p);
    end_stage(p);
    plan_added(p, "<end>", SPECIAL);                // 263
    plan_added(p, "<pad>", LSTRIP | RSTRIP);        // 264
    plan_added(p, "hihi", NORMALIZED);              // 265
    plan_added(p, "<endhi>", NORMALIZED);           // 266
}

static void test_usual_tokenizer(void) {
    static Plan p;
    static const struct { const char *text; int special; int ids[12]; } cases[] = {
        { "hi hi  hi", 0, { 257, 259, ' ', 259 } },
        { "aaaaa", 0, { 258, 'a' } },
        { "1212121", 0, { 261, '1', '2', 261, '1' } },
        { "  \n", 0, { 260, '\n' } },
        { "hi<end> hi", 1, { 257, 263, 259 } },
        { "<end>", 0, { '<', 'e', 'n', 'd', '>' } },
        { "hi \n<pad>  hi", 0, { 257, 264, 257 } },
        { "hihihi <endhi", 0, { 265, 257, ' ', '<', 'e', 'n', 'd', 257 } },
        { "<end><endhi>", 1, { 263, 266 } },
        { "<endhi>", 1, { 266 } },
        { "\xC3\xA9\xC3", 0, { 262, 0xC3 } },
    };
    size_t bytes, length;
    usual_plan(&p);
    char *section = plan_section(&p, &bytes);
    Tokenizer *t = tokenizer_new(BPE, section, bytes, "test", 300);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *text = cases[i].text;
        int ids[32];
        size_t n = encode(t, ids, NULL, text, strlen(text), cases[i].special), wanted = 0;
        while (wanted < 12 && cases[i].ids[wanted]) wanted++;
        check(n == wanted && !memcmp(ids, cases[i].ids, n * sizeof *ids),
              "\"%s\" has %zu tokens, the first is %d", text, n, ids[0]);
    }
    decode(t, 263, &length);
    check(length == 0, "a special token is shown as nothing");
    check(!memcmp(decode(t, 264, &length), "<pad>", 5) && length == 5,
          "another added token is shown");
    decode(t, 267, &length);
    check(length == 0, "a padding id is shown as nothing");
    int same = 1;
    for (int i = 0; i < 2000 && same; i++) {        // what is no added token comes back
        char text[40], back[160];
        int ids[40];
        const size_t n = random_size(0, 40);
        for (size_t k = 0; k < n; k++)
            text[k] = i % 2 ? (char)random_size(0, 255) : "ahi 1\xC3\xA9"[random_size(0, 6)];
        size_t count = encode(t, ids, NULL, text, n, 1), all = 0;
        for (size_t k = 0; k < count; k++) {
            const char *token = decode(t, ids[k], &length);
            memcpy(back + all, token, length);
            all += length;
        }
        same = all == n && !memcmp(text, back, n);
    }
    check(same, "bytes, encoded and decoded, are the same");
    release(t);
    free(section);
}

// How many bytes go to stderr when a child encodes some texts with a tokenizer that expects NFC.
static long nfc_warning(const char *const *texts, size_t n) {
    FILE *file = tmpfile();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        static const uint32_t normal[][3] = { { 0x300, 0x314, 230 }, { 0x323, 0x326, 220 },
                                              { 0x340, 0x341, 255 } };
        Tokenizer *t = tokenizer_new(BYTES, NULL, 0, "test", 258);
        int ids[100];
        t->flags = NFC;
        t->normal = normal;
        t->n_normal = 3;
        dup2(fileno(file), 2);
        for (size_t i = 0; i < n; i++) encode(t, ids, NULL, texts[i], strlen(texts[i]), 0);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    fseek(file, 0, SEEK_END);
    const long bytes = ftell(file);
    fclose(file);
    return bytes;
}

static void test_nfc(void) {
    const char *const fine[] = { "plain", "\xC3\xA9", "e\xCC\xA3\xCC\x81", "\xCC\x81\xCC\x81",
                                 "\xCC\x81 \xCC\xA3" };
    const char *const doubtful[] = { "e\xCC\x81\xCC\xA3", "a\xCD\x80" };
    check(nfc_warning(fine, 5) == 0, "text in NFC makes no warning");
    const long once = nfc_warning(doubtful, 1);
    check(once > 0, "marks in another order than NFC's make a warning");
    check(nfc_warning(doubtful + 1, 1) == once, "a character that NFC has not makes a warning");
    check(nfc_warning(doubtful, 2) == once, "one warning is enough");
}

// Runs of a megabyte: of one letter, of white space that goes on otherwise, of newlines. To be
// quadratic in any of them would take an hour.
static void test_long_runs(void) {
    static Plan p;
    enum { MEGABYTE = 1000000 };
    size_t bytes;
    usual_plan(&p);
    char *section = plan_section(&p, &bytes), *text = malloc(MEGABYTE);
    int *ids = malloc(MEGABYTE * sizeof *ids);
    Tokenizer *t = tokenizer_new(BPE, section, bytes, "test", 300);
    for (int i = 0; i < 4; i++) {
        memset(text, i == 0 ? 'a' : i == 2 ? '\n' : ' ', MEGABYTE);
        for (size_t k = 0; i == 3 && k < MEGABYTE; k += 2) text[k] = '\t';
        text[MEGABYTE - 1] = i == 0 ? 'a' : 'x';
        const double start = seconds();
        const size_t n = encode(t, ids, NULL, text, MEGABYTE, 1);
        check(seconds() - start < 20, "1 MB of kind %d takes %.0f s", i, seconds() - start);
        check(i == 0 ? n == MEGABYTE / 4 && ids[n - 1] == 258 : ids[n - 1] == 'x',
              "1 MB of kind %d: %zu tokens, the last is %d", i, n, ids[n - 1]);
    }
    release(t);
    free(section);
    free(ids);
    free(text);
}

// Opens a section and uses it. Returns the exit code, and in `error` what went to stderr.
static int use_section(char *section, size_t bytes, char *error, size_t size) {
    static FILE *file;
    jmp_buf here;
    if (!file) file = tmpfile();
    const int stderr_was = dup(2);
    dup2(fileno(file), 2);
    int code = setjmp(here);
    if (code == 0) {
        caught = &here;
        Tokenizer *t = tokenizer_new(BPE, section, bytes, "file", 300);
        const char *text = "hi hi  <end>\n <pad> aaaaa 12121 <endhi>hihi \xC3\xA9\xC3\xFF  ";
        const char *plain = "aaaaaahihihi1212\xC3\xA9\xC3<enhih";
        char back[1000];
        int ids[100];
        size_t count = encode(t, ids, NULL, text, strlen(text), 1), length, n = 0;
        if (count > strlen(text)) code = 99;
        count = encode(t, ids, NULL, plain, strlen(plain), 0);
        for (size_t i = 0; i < count && code == 0; i++) {
            const char *token = token_text(t, (uint32_t)ids[i], &length);
            if (n + length > sizeof back) code = 98; else memcpy(back + n, token, length);
            n += length;
        }
        if (n != strlen(plain) || memcmp(back, plain, n)) code = 97;
        release(t);
    }
    caught = NULL;
    const ssize_t n = pread(2, error, size - 1, 0);
    error[n > 0 ? n : 0] = 0;
    if (ftruncate(2, 0)) code = 96;
    lseek(2, 0, SEEK_SET);
    dup2(stderr_was, 2);
    close(stderr_was);
    return code;
}

// A damaged section works, or ends in one line that names the file; it never does anything else.
static void test_damaged_sections(void) {
    static Plan p;
    size_t bytes, refused = 0;
    char error[2000];
    usual_plan(&p);
    char *good = plan_section(&p, &bytes), *bad = aligned_alloc(64, bytes);
    check(use_section(good, bytes, error, sizeof error) == 0 && !*error, "it works: %s", error);
    int well = 1;
    for (int i = 0; i < 20000 && well; i++) {
        static const uint32_t nasty[] = { 0, 1, 255, 256, 300, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF };
        memcpy(bad, good, bytes);
        for (size_t k = random_size(1, 3); k; k--) {
            // The head is more often hit than its size would have it, the tokens' text less so.
            const size_t where = random_size(0, i % 3 ? bytes / 4 - 1 : 15);
            uint32_t value = nasty[random_size(0, 7)];
            if (i % 2) { memcpy(&value, bad + 4 * where, 4); value ^= 1u << random_size(0, 31); }
            memcpy(bad + 4 * where, &value, 4);
        }
        const int code = use_section(bad, bytes, error, sizeof error);
        const char *newline = strchr(error, '\n');
        well = code == 0 ? !*error : code == FAILED && newline && !newline[1] &&
               !strncmp(error, "test_ops: file: ", 16);
        refused += code == FAILED;
        if (!well) printf("case %d: exit code %d, %s\n", i, code, error);
    }
    check(well, "a damaged section ends well");
    check(refused > 5000 && refused < 19000, "only %zu damaged sections are refused", refused);
    for (size_t cut = 64; cut < bytes; cut += 64)
        check(use_section(good, cut, error, sizeof error) == FAILED, "a section that is cut off");
    usual_plan(&p);
    p.flags = IGNORE_MERGES;
    free(good);
    good = plan_section(&p, &bytes);
    Tokenizer *t = tokenizer_new(BPE, good, bytes, "file", 300);
    const struct { const char *what; const void *where; size_t size; } swaps[] = {
        { "order", t->order, sizeof *t->order }, { "merges", t->merges, sizeof *t->merges },
        { "added tokens", t->added, sizeof *t->added }, { "ranges", t->ranges, 8 },
        { "single bytes", t->byte_token, 4 }, { "the two of a merge", &t->merges[1].left, 4 },
    };
    for (size_t i = 0; i < sizeof swaps / sizeof *swaps; i++)
        for (int back = 0; back < 2; back++) {          // two of them change places, and back
            char one[16], *first = (char *)swaps[i].where, *second = first + swaps[i].size;
            memcpy(one, first, swaps[i].size);
            memcpy(first, second, swaps[i].size);
            memcpy(second, one, swaps[i].size);
            const int code = use_section(good, bytes, error, sizeof error);
            check(code == (back ? 0 : FAILED), "%s change places: exit code %d, %s", swaps[i].what,
                  code, error);
        }
    release(t);
    for (size_t most = MOST_ITEMS; most <= MOST_ITEMS + 1; most++) {
        usual_plan(&p);
        for (size_t i = 0; i < most; i++) plan_item(&p, AT_END, 0, 0, 0);
        end_alternative(&p);
        end_stage(&p);
        free(good);
        good = plan_section(&p, &bytes);
        check(use_section(good, bytes, error, sizeof error) == (most > MOST_ITEMS ? FAILED : 0),
              "%zu items: %s", most, error);
    }
    free(good);
    free(bad);
}

static void test_byte_tokenizer(void) {
    char text[64], back[64];
    int ids[128], same = 1;
    size_t length;
    Tokenizer *t = tokenizer_new(BYTES, NULL, 0, "test", 258);
    for (int i = 0; i < 2000; i++) {                    // any bytes at all
        size_t n = random_size(0, 40), all = 0;
        for (size_t k = 0; k < n; k++) text[k] = (char)random_size(0, 255);
        size_t count = encode(t, ids, NULL, text, n, i % 2);
        for (size_t k = 0; k < count; k++) {
            const char *token = decode(t, ids[k], &length);
            memcpy(back + all, token, length);
            all += length;
        }
        same &= count == n && all == n && !memcmp(text, back, n);
    }
    check(same, "bytes, encoded and decoded, are the same");
    const char *special = "<|endoftext|>x<|beginoftext|><|endoftext|<|endoftext|>";
    const size_t n = strlen(special);
    const int expected[] = { 257, 'x', 256, '<', '|', 'e', 'n', 'd',
                             'o', 'f', 't', 'e', 'x', 't', '|', 257 };
    check(encode(t, ids, NULL, special, n, 1) == 16 && !memcmp(ids, expected, sizeof expected),
          "names of special tokens become their ids");
    check(encode(t, ids, NULL, special, n, 0) == n && ids[0] == '<', "without `special` they are text");
    check(encode(t, ids, NULL, special, n - 1, 1) == 15 + 12 && ids[26] == '|',
          "a name that is cut short is text");
    for (int id = 256; id < 100000; id = id < 258 ? id + 1 : id * 2) {
        decode(t, id, &length);
        check(length == 0, "special tokens and padding have no bytes");
    }
    release(t);
}

// ---- keys and numbers as text -------------------------------------------------------------------

static const Key *key(const char *name) {
    for (int i = 0; i < CONFIG_KEYS; i++)
        if (!strcmp(config_keys[i].name, name)) return &config_keys[i];
    check(0, "there is a key %s", name);
    return &config_keys[0];
}

static void test_keys(void) {
    static const char *const wrong[][2] = { { "hidden_size", "" },
                                            { "hidden_size", " 8" },
                                            { "hidden_size", "8 " },
                                            { "hidden_size", "8x" },
                                            { "hidden_size", "0x10" },
                                            { "hidden_size", "1e2" },
                                            { "hidden_size", "8.0" },
                                            { "hidden_size", "0" },
                                            { "hidden_size", "-8" },
                                            { "hidden_size", "65537" },
                                            { "hidden_size", "99999999999999999999" },
                                            { "hidden_size", "null" },
                                            { "hidden_size", "nan" },
                                            { "q_lora_rank", "none" },
                                            { "q_lora_rank", "Null" },
                                            { "rope_theta", "nan" },
                                            { "rope_theta", "inf" },
                                            { "rope_theta", "-1" },
                                            { "rope_theta", "0" },
                                            { "rope_theta", "1,5" },
                                            { "rope_theta", "1.5.2" },
                                            { "rope_theta", "1e400" },
                                            { "rope_theta", "" },
                                            { "rope_theta", "\t1" },
                                            { "rope_theta", "true" },
                                            { "use_igate", "True" },
                                            { "use_igate", "1" },
                                            { "use_igate", "" },
                                            { "use_igate", "truee" },
                                            { "topk_method", "gready" },
                                            { "topk_method", "greed" },
                                            { "topk_method", "" },
                                            { "topk_method", "greedy|" },
                                            { "topk_method", "greedy|group_limited_greedy" },
                                            { "rope_scaling.type", "dynamic" } };
    static const char *const right[][3] = {
        // the third is how it is shown, where that differs
        { "hidden_size", "1" },          { "hidden_size", "65536" },
        { "hidden_size", "007", "7" },   { "q_lora_rank", "null" },
        { "q_lora_rank", "5" },          { "q_lora_rank", "0", "null" },
        { "n_group", "null", "1" },      { "bos_token_id", "null" },
        { "bos_token_id", "0" },         { "rope_theta", "1e6", "1000000" },
        { "rope_theta", "0.5" },         { "use_igate", "false" },
        { "use_igate", "true" },         { "topk_method", "group_limited_greedy" },
        { "rope_scaling.type", "null" }, { "rope_scaling.type", "yarn" }
    };
    Config c = { 0 }, before;
    keys_init(config_keys, CONFIG_KEYS, &c);
    memcpy(&before, &c, sizeof c);              // and so the bytes between fields are the same
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check(!key_parse(key(wrong[i][0]), &c, wrong[i][1]), "%s takes \"%s\"", wrong[i][0],
              wrong[i][1]);
    check(!memcmp(&c, &before, sizeof c), "a value that is refused changes nothing");
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        const char *shown = right[i][2] ? right[i][2] : right[i][1];
        int ok = key_parse(key(right[i][0]), &c, right[i][1]);
        check(ok && !strcmp(key_text(key(right[i][0]), &c), shown), "%s is \"%s\" after \"%s\"",
              right[i][0], key_text(key(right[i][0]), &c), right[i][1]);
    }
    for (int i = 0; i < CONFIG_KEYS; i++) {         // what is shown can be given again
        Config again;
        char text[64];
        memcpy(&again, &before, sizeof before);
        snprintf(text, sizeof text, "%s", key_text(&config_keys[i], &before));
        const int taken = key_parse(&config_keys[i], &again, text);
        int same = 1;
        for (int j = 0; j < CONFIG_KEYS; j++) same &= key_equal(&config_keys[j], &again, &before);
        check(taken && same, "%s: \"%s\" and back", config_keys[i].name, text);
    }
}

// The bytes of a key's field.
static size_t field_bytes(const Key *k) {
    return k->kind == BOOL ? sizeof(bool) : k->kind == WORD ? sizeof(int)
           : k->kind == IDS ? IDS_BYTES : 8;
}

// In the order of their places, a field lies at the first multiple of its size behind the one
// before: so the rows of the table are all of Config, and none is there twice.
static void test_key_offsets(void) {
    size_t end = 0;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = NULL;            // the next one
        for (int j = 0; j < CONFIG_KEYS; j++)
            if (config_keys[j].offset >= end && (!k || config_keys[j].offset < k->offset))
                k = &config_keys[j];
        if (!k) break;
        const size_t bytes = field_bytes(k), align = bytes < 8 ? bytes : 8;
        const bool begins = k->offset == offsetof(Config, generation);  // a struct in it
        const size_t at = begins ? (end + 7) / 8 * 8 : (end + align - 1) / align * align;
        check(k->offset == at, "%s is at byte %zu of Config, not %zu", k->name, k->offset, at);
        end = at + bytes;
    }
    check((end + 7) / 8 * 8 == sizeof(Config), "Config has %zu bytes, its rows %zu", sizeof(Config),
          end);
}

// How many words a key has.
static int words_of(const Key *k) {
    int n = 0;
    size_t length;
    while (word(k->words, n, &length)) n++;
    return n;
}

// Whether key k takes x, by key_set or, as text, by key_parse. Then its value is x; if not, nothing
// has changed.
static int takes(const Key *k, double x, int parsed) {
    static Config c, before;            // static: the bytes between fields are 0
    char text[400];
    keys_init(config_keys, CONFIG_KEYS, &c);
    memcpy(&before, &c, sizeof c);
    snprintf(text, sizeof text, k->kind == NUM ? "%.17g" : "%.0f", x);
    const int taken = parsed ? key_parse(k, &c, text) : key_set(k, &c, x);
    check(taken ? key_number(k, &c) == x : !memcmp(&c, &before, sizeof c),
          "%s is %.17g after %.17g", k->name, key_number(k, &c), x);
    for (int i = 0; i < CONFIG_KEYS; i++)
        if (&config_keys[i] != k && !key_equal(&config_keys[i], &c, &before))
            check(0, "%s = %.17g changes %s", k->name, x, config_keys[i].name);
    return taken;
}

static void test_key_ranges(void) {
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        if (k->kind == TEXT) continue;              // any text will do
        const int number = k->kind == NUM, named = k->kind == BOOL || k->kind == WORD;
        const double least = named ? 0 : k->least,
            most = k->kind == BOOL ? 1 : k->kind == WORD ? words_of(k) - 1 : k->most;
        for (int parsed = 0; parsed < (named ? 1 : 2); parsed++) {
            check(takes(k, least, parsed) && takes(k, most, parsed), "%s takes %g and %g", k->name,
                  least, most);
            check(!takes(k, number ? nextafter(least, -INFINITY) : least - 1, parsed),
                  "%s takes less than %g", k->name, least);
            check(!takes(k, number ? nextafter(most, INFINITY) : most + 1, parsed),
                  "%s takes more than %g", k->name, most);
            check(!takes(k, NAN, parsed) && !takes(k, INFINITY, parsed) &&
                  !takes(k, -INFINITY, parsed), "%s takes what is no number", k->name);
        }
        const double half = floor(least) + 0.5;
        check(takes(k, half, 0) == number, "%s takes %g", k->name, half);
        for (int j = 0; k->kind == WORD && j < words_of(k); j++) {
            Config c = { 0 };
            char text[64];
            size_t length;
            const char *name = word(k->words, j, &length);
            snprintf(text, sizeof text, "%.*s", (int)length, name);
            const int taken = key_parse(k, &c, text);
            check(taken && key_number(k, &c) == j && !strcmp(key_text(k, &c), text),
                  "%s is %s after %s", k->name, key_text(k, &c), text);
        }
    }
}

// Every key gets another value, which is copied, compared, shown and read.
static void test_key_equal(void) {
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        static Config a, b, copy;
        keys_init(config_keys, CONFIG_KEYS, &a);
        keys_init(config_keys, CONFIG_KEYS, &b);
        keys_init(config_keys, CONFIG_KEYS, &copy);
        check(key_equal(k, &a, &b), "%s is equal to itself", k->name);
        const double most = k->kind == BOOL || k->kind == WORD ? 1 : k->most;
        const double other = key_number(k, &a) == most ? k->least : most;
        const int set = k->kind == TEXT ? key_parse(k, &b, "another") : key_set(k, &b, other);
        check(set && !key_equal(k, &a, &b), "%s is another", k->name);
        key_copy(k, &copy, &b);
        check(key_equal(k, &copy, &b) && (k->kind == TEXT || key_number(k, &copy) == other),
              "%s is copied", k->name);
        check(key_parse(k, &a, key_text(k, &b)) && key_equal(k, &a, &b), "%s: \"%s\" and back",
              k->name, key_text(k, &b));
    }
    const Key *theta = key("rope_theta");
    Config c = { 0 }, again = { 0 };
    int right = 1;
    for (int i = 0; i < 5000; i++) {            // any number comes back as it was
        c.rope_theta = pow(10, -29.9 + 59.8 * rng_uniform(&rng));
        right &= key_parse(theta, &again, key_text(theta, &c)) && again.rope_theta == c.rope_theta;
    }
    check(right, "numbers, shown and read");
    c.rope_theta = 0.1;
    check(!strcmp(key_text(theta, &c), "0.1"), "0.1 is shown as %s", key_text(theta, &c));
}

// A table with what Config does not have: texts, letters, flags, a name with a dash.
typedef struct { const char *text; bool flag; int64_t whole; } Some;
static const Key some_keys[] = {
    { KEY(Some, text), .letter = 't', .init = "what it is" },
    { KEY_AS(Some, flag, "a-flag"), .flag = true, .init = "false" },
    { KEY(Some, whole), .letter = 'w', RANGE(-5, 5), .init = "-3" },
};

static const Key *some_key(const char *name) { return key_named(some_keys, 3, name, strlen(name)); }

static void test_key_named(void) {
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        const size_t n = strlen(k->name);
        char dashed[80], longer[80];
        snprintf(dashed, sizeof dashed, "%s=5", k->name);
        snprintf(longer, sizeof longer, "%ss", k->name);
        for (char *c = dashed; *c; c++) if (*c == '_') *c = '-';
        check(key_named(config_keys, CONFIG_KEYS, k->name, n) == k &&
              key_named(config_keys, CONFIG_KEYS, dashed, n) == k, "the key %s", k->name);
        check(key_named(config_keys, CONFIG_KEYS, k->name, n - 1) != k &&
              !key_named(config_keys, CONFIG_KEYS, longer, n + 1) &&
              !key_named(config_keys, CONFIG_KEYS, dashed, n + 2), "the key %s, nearly", k->name);
    }
    check(some_key("a-flag") == &some_keys[1] && some_key("a_flag") == &some_keys[1],
          "- and _ are the same");
    check(!some_key("aflag") && !some_key("a flag") && !some_key("a-") && !some_key("A-flag") &&
          !some_key(""), "other names are none");
    check(some_key("t") == &some_keys[0] && some_key("w") == &some_keys[2], "letters");
    check(!some_key("a") && !some_key("x") && !some_key("-"), "other letters are none");
    Some a, b = { 0 };
    keys_init(some_keys, 3, &a);
    check(!strcmp(a.text, "what it is") && !a.flag && a.whole == -3, "a table with a text");
    check(!key_equal(some_keys, &a, &b) && key_equal(some_keys, &b, &b), "no text is no text");
    char same[] = "what it is";
    b.text = same;
    check(key_equal(some_keys, &a, &b), "two texts are equal by what they say");
    check(key_parse(some_keys, &b, "") && !strcmp(key_text(some_keys, &b), ""), "an empty text");
    check(!key_equal(some_keys, &a, &b), "two texts differ");
    key_copy(some_keys, &b, &a);
    check(b.text == a.text, "a text is copied");
    check(!key_set(some_keys, &b, 0) && b.text == a.text, "a text is no number");
}

static void test_decimal(void) {
    char text[DECIMAL_TEXT];
    int right = 1;
    double x = 0;
    for (int i = 0; i < 20000 && right; i++) {
        x = (i % 2 ? -1 : 1) * pow(10, -45 + 90 * rng_uniform(&rng));
        decimal(text, x);
        right = !strpbrk(text, "eEn,") && fabs(strtod(text, NULL) / x - 1) < 1e-8;
    }
    check(right, "decimal(%.17g) is %s", x, decimal(text, x));
    check(!strcmp(decimal(text, 0), "0.00000000") && !strcmp(decimal(text, 1), "1.00000000"),
          "decimal(1) is %s", text);
    check(!strcmp(decimal(text, 123456789), "123456789") &&
              !strcmp(decimal(text, 0.001), "0.00100000000"),
          "decimal(0.001) is %s", text);
    check(strstr(decimal(text, NAN), "nan") && strstr(decimal(text, INFINITY), "inf"),
          "decimal(inf) is %s", text);
    check(strlen(decimal(text, -DBL_MAX)) == 310 && strlen(decimal(text, DBL_MIN)) < DECIMAL_TEXT,
          "decimal of the largest and smallest numbers");
}

// ---- checksums and texts of a model file --------------------------------------------------------

static void test_crc32(void) {
    static unsigned char bytes[1000];
    const uint32_t known = crc32(0, "123456789", 9);
    check(known == 0xCBF43926u, "crc32 of \"123456789\" is %08x", known);
    check(crc32(0, bytes, 0) == 0 && crc32(known, bytes, 0) == known,
          "nothing does not change a CRC");
    for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)rng_next(&rng);
    for (int i = 0; i < 200; i++) {
        const size_t first = random_size(0, 20), n = random_size(0, sizeof bytes - first);
        uint32_t slow = 0xFFFFFFFFu, pieces = 0;
        for (size_t j = 0; j < 8 * n; j++) {            // a bit at a time
            slow ^= j % 8 ? 0 : bytes[first + j / 8];
            slow = slow >> 1 ^ (slow & 1 ? 0xEDB88320u : 0);
        }
        for (size_t j = 0, part; j < n; j += part) {
            part = random_size(0, n - j);
            pieces = crc32(pieces, bytes + first + j, part);
        }
        const uint32_t whole = crc32(0, bytes + first, n);
        check(whole == ~slow && pieces == whole,
              "crc32 of %zu bytes: %08x, in pieces %08x, not %08x", n, whole, pieces, ~slow);
    }
}

// A text as JSON and back.
static void check_json(const char *text) {
    Lines lines = { 0 };
    add_bytes(&lines, "x ", 2);
    add_json_string(&lines, text);
    int right = lines.padded % 64 == 0 && lines.padded >= lines.bytes;
    for (size_t i = lines.bytes; i < lines.padded; i++) right &= lines.text[i] == 0;
    char *json = calloc(lines.bytes - 1, 1);            // with a NUL, and not a byte more
    memcpy(json, lines.text + 2, lines.bytes - 2);
    for (const char *c = json; *c; c++) right &= (unsigned char)*c >= 0x20;
    check(right && strlen(json) == lines.bytes - 2, "JSON of a text: %s", json);
    const char *back = json_string(json);
    check(back && !strcmp(back, text), "a text is \"%s\" after JSON, was \"%s\"",
          back ? back : "none", text);
    free(json);
    release(lines.text);
}

static void test_json(void) {
    static const char *const texts[] = {
        "", "\"", "\\", "\\\"", "a\"b\\c/d", "\\u0041", "\n\t\r\b\f", "\x01\x1F\x7F",
        "\xC3\xA9\xF0\x9F\x99\x82", "{\"a\": 1}",
    };
    static const char *const good[][2] = {
        { "\"\"", "" }, { "\"a b\"", "a b" }, { "\"\xC3\xA9\"", "\xC3\xA9" },
        { "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t" },
        { "\"\\u001f\\u007f\"", "\x1F\x7F" },
        { "\"\\u0041\\u00e9\\u00E9\"", "A\xC3\xA9\xC3\xA9" },
        { "\"\\u07ff\\u0800\"", "\xDF\xBF\xE0\xA0\x80" },
        { "\"\\u20ac\\uFFFF\"", "\xE2\x82\xAC\xEF\xBF\xBF" },
        { "\"x\\ud83d\\ude42y\"", "x\xF0\x9F\x99\x82y" },
        { "\"\\uD800\\uDC00\"", "\xF0\x90\x80\x80" }, { "\"\\udbff\\udfff\"", "\xF4\x8F\xBF\xBF" },
    };
    static const char *const bad[] = {
        // no string, or more than one
        "", "a", "\"", "\"a", "a\"", "'a'", "\"a\"b", "\"a\" ",
        // control characters, and escapes that there are not
        "\"a\nb\"", "\"a\tb\"", "\"\x01\"", "\"\\\"", "\"\\", "\"\\a\"", "\"\\x41\"", "\"\\U0041\"",
        // numbers
        "\"\\u\"", "\"\\u", "\"\\u004\"", "\"\\u004", "\"\\u00g1\"", "\"\\u 041\"", "\"\\u-041\"",
        "\"\\u0000\"",
        // halves of pairs
        "\"\\ud83d\"", "\"\\ud83d", "\"\\ud83dx\"", "\"\\ud83d\\n\"", "\"\\ud83d\\u\"",
        "\"\\ud83d\\u0041\"", "\"\\ud83d\\ud83d\"", "\"\\ude42\"", "\"\\ude42\\ud83d\"",
        "\"\\ud83d\\", "\"\\ud83d\\ude4\"", "\"\\ud83d \\ude42\"", "\"\\ud83d\\ue000\"",
        "\"\\ude42\\ude42\"", "\"\\ud83d\\udbff\"",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) check_json(texts[i]);
    for (int i = 0; i < 300; i++) {                     // any bytes, but for the NUL
        char text[200];
        const size_t n = random_size(0, sizeof text - 1);
        for (size_t j = 0; j < n; j++)
            text[j] = i % 2 ? (char)random_size(1, 255) : "\"\\\n\x01u0"[random_size(0, 5)];
        text[n] = 0;
        check_json(text);
    }
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        char *json = strdup(good[i][0]);
        const char *text = json_string(json);
        check(text && !strcmp(text, good[i][1]), "%s is read as \"%s\"", good[i][0],
              text ? text : "none");
        free(json);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *json = strdup(bad[i]);
        check(!json_string(json), "%s is taken for a JSON string", bad[i]);
        free(json);
    }
    int right = 1;
    for (uint32_t code = 1; code < 0x110000 && right; code += code < 0x3000 ? 1 : 37) {
        char json[16], utf8[5] = { 0 };
        size_t length;
        if (code >= 0xD800 && code < 0xE000) continue;
        const uint32_t high = 0xD800 + ((code - 0x10000) >> 10), low = 0xDC00 + (code & 0x3FF);
        if (code < 0x10000) snprintf(json, sizeof json, "\"\\u%04x\"", code);
        else snprintf(json, sizeof json, "\"\\u%04X\\u%04x\"", high & 0xFFFF, low & 0xFFFF);
        const char *text = json_string(json);
        right = text && char_at(text, 0, strlen(text), &length) == code && length == strlen(text) &&
            put_utf8(utf8, code) == length && !strcmp(utf8, text);
        if (!right) printf("code point U+%04X\n", code);
    }
    check(right, "code points in JSON");
}

// What add_lines() writes read_lines() reads, whatever the values are.
static void test_lines(void) {
    for (int i = 0; i < 50; i++) {
        Config c, again;
        const char *text = i % 2 ? "two \"words\"\nand \\" : "";
        Some some = { .text = text, .flag = i % 2, .whole = i % 11 - 5 }, some_again;
        unsigned char given[CONFIG_KEYS + 3] = { 0 };
        Lines lines = { 0 };
        keys_init(config_keys, CONFIG_KEYS, &c);
        for (int j = 0; j < CONFIG_KEYS; j++) {
            const Key *k = &config_keys[j];
            const double part = rng_uniform(&rng), x = k->least + part * (k->most - k->least);
            key_set(k, &c, k->kind == NUM ? x : k->kind == BOOL ? part < 0.5
                         : k->kind == WORD ? floor(part * words_of(k)) : floor(x));
        }
        const Options from[2] = { { config_keys, CONFIG_KEYS, &c, NULL },
                                  { some_keys, 3, &some, NULL } };
        const Options to[2] = { { config_keys, CONFIG_KEYS, &again, given },
                                { some_keys, 3, &some_again, given + CONFIG_KEYS } };
        add_lines(&lines, &from[i % 3 > 0]);            // in any order
        add_lines(&lines, &from[i % 3 == 0]);
        read_lines(to, 2, lines.text, lines.padded, "lines");
        int right = 1;
        for (int j = 0; j < CONFIG_KEYS; j++) right &= key_equal(&config_keys[j], &c, &again);
        for (int j = 0; j < 3; j++) right &= key_equal(&some_keys[j], &some, &some_again);
        check(right, "lines, written and read");
        release(lines.text);
    }
}

int main(void) {
    program = "test_ops";
    test_sizes();
    test_random();
    test_matmul();
    test_same_bits();
    test_types();
    test_linear();
    test_number();
    test_slice();
    test_exp();
    test_softmax();
    test_rmsnorm();
    test_plain_products();
    test_matvecs();
    test_plain_exp();
    test_plain_sums();
    test_rope();
    test_argmax();
    test_choose();
    test_sampler();
    test_selection();
    test_utf8();
    test_byte_tokenizer();
    test_usual_tokenizer();
    test_random_tokenizers();
    test_nfc();
    test_damaged_sections();
    test_long_runs();
    test_keys();
    test_key_offsets();
    test_key_ranges();
    test_key_equal();
    test_key_named();
    test_decimal();
    test_crc32();
    test_json();
    test_lines();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
