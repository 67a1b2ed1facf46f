// lib/kernels.h - the operations of coe.c [4], written for speed: the same functions as its plain
// ones, with the same meaning.
//
// A compiler may not reorder a sum of floats, so a plain loop over one adds one number at a time.
// Where a sum matters for speed it is written with vectors here, the widest that the machine has
// registers for. They are a language extension of gcc and clang, not instructions of one processor.
//
// In the text of products c = a b, i counts the rows of c, j its columns and k the terms of a sum,
// as is usual for them.
//
// Contents: vectors, sums and exponentials, tiles, narrow weights, panels, blocks and threads, few
// rows, a single row, the three products.
#ifndef KERNELS_H
#define KERNELS_H

// ---- vectors ------------------------------------------------------------------------------------

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define PANEL_VECTORS 4         // 32 registers of 64 bytes: tile() says why 4
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
// A vec at any address.
typedef real uvec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
// As many 32-bit words of a file as a vec has numbers, and the floats that are made of them.
typedef uint32_t vec_u32  __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec_u32 __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef float vec_f32     __attribute__((vector_size(4 * LANES)));

// ---- sums and exponentials ----------------------------------------------------------------------

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
INLINE real real_exp(real x) {
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
INLINE real sigmoid(real x) { return 1 / (1 + real_exp(-x)); }

// sum_i x_i y_i z_i
WIDE static real dot3(const real *x, const real *y, const real *z, size_t n) {
    vec lanes = { 0 };
    real tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) lanes += load(x + i) * load(y + i) * load(z + i);
    for (; i < n; i++) tail += x[i] * y[i] * z[i];
    return tail + add_lanes(&lanes);
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

// The sum of n numbers, LANES of them at a time.
WIDE static real sum_of(const real *x, size_t n) {
    vec lanes = { 0 };
    real tail = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES) lanes += load(x + i);
    for (; i < n; i++) tail += x[i];
    return add_lanes(&lanes) + tail;
}

// x_i = e^(scale (x_i - max)) / sum, in place; x (n). *log_sum, if wanted, is the logarithm of
// sum_i e^(scale x_i).
WIDE static void softmax(real *x, size_t n, real scale, real *log_sum) {
    const real max = max_of(x, n);
    for (size_t i = 0; i < n; i++) x[i] = real_exp(scale * (x[i] - max));
    const real all = sum_of(x, n), inverse = 1 / all;
    for (size_t i = 0; i < n; i++) x[i] *= inverse;
    if (log_sum) *log_sum = scale * max + (real)log(all);
}

// ---- tiles --------------------------------------------------------------------------------------

// All of training is one product, c = a b, met in three forms: y = x w^T forward, dx = dy w and
// dw = dy^T x backward. They differ in strides only, so there is one kernel.
//
// At its heart tile() computes 6 rows by PANEL_VECTORS vectors of c. These 24 sums (with 32
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

// A tile of `rows` rows and cols <= TILE_COLS columns of c; b has room for whole vectors. If the
// columns are not whole vectors of c, the tile is computed beside it and copied.
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

// ---- narrow weights -----------------------------------------------------------------------------

// Two vectors a and b interleaved make two vectors: RIFFLE_LOW is a0 b0 a1 b1 ... of their first
// halves, RIFFLE_HIGH the same of their second halves.
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

// Weights of a narrow type are read as 32-bit words, each of which holds per_word() = P of them. A
// shift and a mask, which any processor can do to a whole vector, take one weight out of each word.
// Part k of LANES words that start at column i are the columns i + k, i + P + k, i + 2 P + k, ...
//
// A BF16 is the upper half of a float, so it only has to be moved there. The byte of a Q8 is put
// into the lowest bits of a float, whose upper bits are chosen so that one unit of the byte counts
// 1. With the byte's sign bit flipped, that float is 2^23 + 128 + byte, and subtracting 2^23 + 128
// leaves the byte. The second byte of a word stays where it is: there the upper bits are those of a
// float 256 times smaller, which saves a shift.
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

// Part k of the LANES words of a row that start at column i, as weights: in Q8 with their scale.
INLINE vec load_scaled(Matrix w, size_t row, size_t i, size_t k, enum Type type) {
    const vec x = load_part(w, row, i, k, type);
    return type == Q8 ? x * w.scale[row * groups_of(w.ld) + i / GROUP] : x;
}

// ---- panels -------------------------------------------------------------------------------------

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
            for (; j < whole; j++) to[j] = j < cols ? number(b, k0 + k, j0 + j) : 0;
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
                panel[k * TILE_COLS + i] = i < cols ? number(b, j0 + i, k0 + k) : 0;
    }
}

// pack_of() for a type that is known only now.
WIDE static void pack(real *panel, Matrix b, int transposed, size_t k0, size_t j0, size_t depth,
                      size_t cols) {
    if (b.type == F32) pack_of(panel, b, transposed, k0, j0, depth, cols, F32);
    else if (b.type == BF16) pack_of(panel, b, transposed, k0, j0, depth, cols, BF16);
    else pack_of(panel, b, transposed, k0, j0, depth, cols, Q8);
}

// ---- blocks and threads -------------------------------------------------------------------------

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
        TASKS(shared ? SIZE_MAX : 0, block, blocks, { gemm_block(&g, block); })
    }
}

// ---- few rows -----------------------------------------------------------------------------------

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

// y[k] = the lanes of s[k] added up, and the columns from `whole` on, where column i of w is first
// + i; or += with `add`. For the rows j + k of w that there are, k < 4.
INLINE void finish_four(real *y, const vec s[4], const real *x, Matrix w, size_t j, size_t first,
                        size_t whole, size_t in, size_t out, int add) {
    real total[4];
    add_lanes_of_four(total, s);
    for (size_t k = 0; k < 4 && j + k < out; k++) {
        for (size_t i = whole; i < in; i++) total[k] += x[i] * number(w, j + k, first + i);
        y[k] = (add ? y[k] : 0) + total[k];
    }
}

// The most rows of x whose sums with four rows of w fit registers, beside 4 for w and 1 for x.
enum { FEW = PANEL_VECTORS == 4 ? 6 : 3 };

// y[t][j .. j + 3] (of the `out` that there are) = rows j .. of w times row t of x, or += with
// `add`, for 2 to FEW rows of x and w in F32. Four rows of w at once make each load of x serve four
// times, and the next four are asked for early: the processor guesses by itself what is read next
// only within a page of 4 KB.
INLINE void four_rows(real *y, size_t ldy, const real *x, size_t ldx, Matrix w, size_t j,
                      size_t in, size_t out, size_t n, int add) {
    const size_t whole = in / LANES * LANES;
    size_t row[4];
    for (size_t k = 0; k < 4; k++) row[k] = j + k < out ? j + k : out - 1;
    vec s[FEW][4], sums[FEW][4];
    for (size_t t = 0; t < n; t++)
        for (size_t k = 0; k < 4; k++) s[t][k] = (vec){ 0 };
    for (size_t i = 0; i < whole; i += LANES) {
        vec wi[4];
        for (size_t k = 0; k < 4; k++) {
            __builtin_prefetch(place(w, row[k] + 4, i, F32));
            wi[k] = load_part(w, row[k], i, 0, F32);
        }
        for (size_t t = 0; t < n; t++)
            for (size_t k = 0; k < 4; k++) s[t][k] += load(x + t * ldx + i) * wi[k];
    }
    for (size_t t = 0; t < n; t++)      // clang would not keep s in registers if it were used below
        for (size_t k = 0; k < 4; k++) sums[t][k] = s[t][k];
    for (size_t t = 0; t < n; t++)
        finish_four(y + t * ldy + j, sums[t], x + t * ldx, w, j, 0, whole, in, out, add);
}

// The lanes of row `row` of w times x, for the columns from begin to end, of which column `first`
// of w is the 0th; in Q8 without the scale. What comes STREAM bytes later, often in the next row,
// is asked for already.
enum { STREAM = 2048 };
INLINE vec row_times(const real *x, Matrix w, size_t row, size_t first, size_t begin, size_t end,
                     enum Type type) {
    const size_t P = per_word(type);
    vec s = { 0 };
    for (size_t i = begin; i < end; i += P * LANES) {
        __builtin_prefetch((const char *)place(w, row, first + i, type) + STREAM);
        for (size_t part = 0; part < P; part++)
            s += load(x + i + part * LANES) * load_part(w, row, first + i, part, type);
    }
    return s;
}

// y[j .. j + 3] (of the `out` that there are) = rows j .. of w times x, or += with `add`, for `in`
// columns of w from `first` on; x is in the order of spread(). Every number of w is used once, so
// that reading w is all that counts, and memory is fastest where each thread reads on and on in one
// direction: row by row. In Q8 the sum over a group is scaled.
INLINE void single_rows(real *y, const real *x, Matrix w, size_t j, size_t first, size_t in,
                        size_t out, int add, enum Type type) {
    const size_t words = per_word(type) * LANES, whole = in / words * words;
    vec sums[4];
    for (size_t k = 0; k < 4; k++) {
        const size_t row = j + k < out ? j + k : out - 1;
        const float *scale = type == Q8 ? w.scale + row * groups_of(w.ld) + first / GROUP : NULL;
        vec s = { 0 };
        size_t i = 0;               // with Q8 a group at a time, in a loop that a compiler unrolls
        for (; type == Q8 && i + GROUP <= whole; i += GROUP)
            s += row_times(x, w, row, first, i, i + GROUP, type) * *scale++;
        if (i < whole)
            s += row_times(x, w, row, first, i, whole, type) * (type == Q8 ? *scale : 1);
        sums[k] = s;
    }
    finish_four(y + j, sums, x, w, j, first, whole, in, out, add);
}

// single_rows() for a type known only now.
WIDE static void rows_of(real *y, const real *x, Matrix w, size_t j, size_t first, size_t in,
                         size_t out, int add) {
    if (w.type == F32) single_rows(y, x, w, j, first, in, out, add, F32);
    else if (w.type == BF16) single_rows(y, x, w, j, first, in, out, add, BF16);
    else single_rows(y, x, w, j, first, in, out, add, Q8);
}

// Rows 4 four .. of w in y = x w^T, which is what g says, for 2 to FEW rows of x at once.
WIDE static void rows_at_once(const Gemm *g, size_t four) {
#define ROWS(m) case m: \
    four_rows(g->c, g->ldc, g->a, g->ai, g->b, 4 * four, g->K, g->N, m, g->add); break;
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
enum { FEW_COLS = 1024 };
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
        for (size_t k = 0; k < out; k++) total += y[k] * number(w, k, i);
        x[i] = total;
    }
}

// ---- a single row -------------------------------------------------------------------------------

// Four rows of several products: end[j] says how many fours there are up to the end of product j.
static void matvec_rows(const Matvec *list, const size_t *end, size_t four) {
    size_t j = 0;
    while (four >= end[j]) j++;
    rows_of(list[j].y, list[j].x, list[j].w, 4 * (four - (j ? end[j - 1] : 0)), 0, list[j].w.cols,
            list[j].w.rows, 0);
}

enum { MOST_MATVECS = 128 };

// n <= MOST_MATVECS products of one row each, whose rows the threads share as if they were one:
// where matrices are small, meeting once for each would take longer than the work. scratch has room
// for every x, in the order of spread(); neighbours in the list with one x, and one type of w,
// share it.
static void matvecs(const Matvec *list, size_t n, real *scratch) {
    Matvec ready[MOST_MATVECS];
    size_t end[MOST_MATVECS], all = 0, work = 0;
    for (size_t j = 0; j < n; j++) {
        const size_t cols = list[j].w.cols, P = per_word(list[j].w.type);
        ready[j] = list[j];
        if (j && list[j].x == list[j - 1].x) {
            ready[j].x = ready[j - 1].x;
        } else if (P > 1) {
            spread(scratch, list[j].x, cols, P);
            ready[j].x = scratch;
            scratch += cols;
        }
        end[j] = all += (list[j].w.rows + 3) / 4;
        work += cols * list[j].w.rows;
    }
    SHARED(work, for (size_t four = 0; four < all; four++) matvec_rows(ready, end, four);)
}

// ---- the three products -------------------------------------------------------------------------
// Their definitions are the plain loops of coe.c [4].

// y (n, out) = x (n, in) w (out, in)^T, or += with `add`; y at stride ldy
static void matmul_nt(real *y, size_t ldy, Matrix x, Matrix w, int add) {
    const size_t n = x.rows, in = w.cols, out = w.rows;
    const Gemm g = { y, ldy, x.data, x.ld, 1, w, 1, n, out, in, add, 0, 0, 0, 0 };
    const size_t fours = (out + 3) / 4;
    if (n > FEW) {
        gemm(g);
    } else if (n > 1 && w.type == F32) {
        SHARED(in * out, for (size_t four = 0; four < fours; four++) rows_at_once(&g, four);)
    } else {
        few_rows(y, ldy, x.data, x.ld, w, n, in, out, add);
    }
}

// x (n, in) = y (n, out) w (out, in), or += with `add`; x at stride ldx
WIDE static void matmul_nn(real *x, size_t ldx, Matrix y, Matrix w, int add) {
    const size_t n = y.rows, in = w.cols, out = w.rows;
    if (n > FEW || w.type == F32) {
        gemm((Gemm){ x, ldx, y.data, y.ld, 1, w, 0, n, in, out, add, 0, 0, 0, 0 });
        return;
    }
    for (size_t t = 0; t < n; t++) {
        const real *row = (const real *)y.data + t * y.ld;
        if (w.type == BF16) sum_rows(x + t * ldx, row, w, in, out, add, BF16);
        else sum_rows(x + t * ldx, row, w, in, out, add, Q8);
    }
}

// w (out, in) = y (n, out)^T x (n, in), or += with `add`; w at stride ldw
static void matmul_tn(real *w, size_t ldw, Matrix y, Matrix x, int add) {
    gemm((Gemm){ w, ldw, y.data, 1, y.ld, x, 0, y.cols, x.cols, y.rows, add, 0, 0, 0, 0 });
}
#endif // KERNELS_H
