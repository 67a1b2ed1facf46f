// What tests/plain_ops.c exports: the plain operations of coe.c [4], for test_ops.c to compare with
// the fast ones. Included behind coe.c, whose types these are.
#ifndef PLAIN_OPS_H
#define PLAIN_OPS_H
real plain_real_exp(real x);
real plain_sigmoid(real x);
real plain_dot(const real *x, const real *y, size_t n);
real plain_dot3(const real *x, const real *y, const real *z, size_t n);
void plain_softmax(real *x, size_t n, real scale, real *log_sum);
void plain_matmul_nt(real *y, size_t ldy, Matrix x, Matrix w, int add);
void plain_matmul_nn(real *x, size_t ldx, Matrix y, Matrix w, int add);
void plain_matmul_tn(real *w, size_t ldw, Matrix y, Matrix x, int add);
void plain_matvecs(const Matvec *list, size_t n, real *scratch);
#endif // PLAIN_OPS_H
