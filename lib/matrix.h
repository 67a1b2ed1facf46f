// lib/matrix.h - matrices to be read, whatever the type of their numbers and wherever their rows
// lie.
//
// A file may hold its matrices in fewer bits than a float32. BF16 (bfloat16) is the upper half of
// one. Q8 is an int8 times a scale that GROUP neighbours in a row share. Computing widens them on
// the way.
#ifndef MATRIX_H
#define MATRIX_H

enum { GROUP = 64 };

// One matrix to be read, of any type, its rows `ld` numbers apart.
typedef struct {
    const void *data;
    const float *scale;         // Q8: (rows, groups_of(ld))
    size_t rows, cols, ld;
    enum Type type;
} Matrix;

typedef struct { real *y; const real *x; Matrix w; } Matvec;    // y (w.rows) = w x, x (w.cols)

// Numbers in memory as a matrix (rows, cols) at stride ld.
static Matrix view(const real *x, size_t rows, size_t cols, size_t ld) {
    return (Matrix){ x, NULL, rows, cols, ld, F32 };
}

// How many scales a row of n numbers has in Q8.
static size_t groups_of(size_t n) { return (n + GROUP - 1) / GROUP; }

// The bytes from one copy of a tensor to the next. In Q8 a copy is its int8, then its scales, both
// starting at a multiple of 64.
static size_t copy_bytes(const Tensor *t) {
    const size_t size = checked_mul(t->rows, t->cols);
    if (t->type == F32) return checked_mul(size, sizeof(float));
    if (t->type == BF16) return checked_mul(size, sizeof(uint16_t));
    const size_t scales = checked_mul(t->rows, groups_of(t->cols));
    return checked_add(whole_lines(size), whole_lines(checked_mul(scales, sizeof(float))));
}

// Copy e of a tensor.
static Matrix matrix(const Tensor *t, size_t e) {
    if (t->type == F32) return view(data_of(t, e), t->rows, t->cols, t->cols);
    const char *copy = (const char *)t->data + e * copy_bytes(t);
    const void *scale = copy + whole_lines(t->rows * t->cols);
    return (Matrix){ copy, t->type == Q8 ? scale : NULL, t->rows, t->cols, t->cols, t->type };
}

// `rows` rows of a matrix, from row `first` on.
static Matrix slice(Matrix w, size_t first, size_t rows) {
    const size_t bytes = w.type == F32 ? sizeof(real) : w.type == BF16 ? 2 : 1;
    w.data = (const char *)w.data + first * w.ld * bytes;
    if (w.type == Q8) w.scale += first * groups_of(w.ld);
    w.rows = rows;
    return w;
}

// Number i of a row of a matrix.
static real number(Matrix w, size_t row, size_t i) {
    const size_t at = row * w.ld + i;
    if (w.type == F32) return ((const real *)w.data)[at];
    if (w.type == Q8)
        return (real)(w.scale[row * groups_of(w.ld) + i / GROUP] * ((const int8_t *)w.data)[at]);
    const uint32_t bits = (uint32_t)((const uint16_t *)w.data)[at] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return (real)x;
}
// A row of a matrix as numbers: where they lie or, where they are of a narrow type, a copy that is
// good until the same thread's next call.
static const real *row_of(Matrix w, size_t row) {
    static _Thread_local real *copy;
    static _Thread_local size_t room;
    if (w.type == F32) return (const real *)w.data + row * w.ld;
    if (room < w.cols) {
        release(copy);
        copy = allocate((room = w.cols) * sizeof(real), "a row of weights");
    }
    for (size_t i = 0; i < w.cols; i++) copy[i] = number(w, row, i);
    return copy;
}

#endif // MATRIX_H
