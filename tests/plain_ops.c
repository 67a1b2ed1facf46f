// The operations that coe.c [4] prints under #ifdef PLAIN, under names of their own: a part of
// test_ops, which computes with both forms and compares.
#define PLAIN
#include "../coe.c"
#include "plain_ops.h"

real plain_real_exp(real x) { return real_exp(x); }
real plain_sigmoid(real x) { return sigmoid(x); }
real plain_dot(const real *x, const real *y, size_t n) { return dot(x, y, n); }
real plain_dot3(const real *x, const real *y, const real *z, size_t n) { return dot3(x, y, z, n); }
void plain_softmax(real *x, size_t n, real scale, real *log_sum) { softmax(x, n, scale, log_sum); }
void plain_matmul_nt(real *y, size_t ldy, Matrix x, Matrix w, int add) {
    matmul_nt(y, ldy, x, w, add);
}
void plain_matmul_nn(real *x, size_t ldx, Matrix y, Matrix w, int add) {
    matmul_nn(x, ldx, y, w, add);
}
void plain_matmul_tn(real *w, size_t ldw, Matrix y, Matrix x, int add) {
    matmul_tn(w, ldw, y, x, add);
}
void plain_matvecs(const Matvec *list, size_t n, real *scratch) { matvecs(list, n, scratch); }
