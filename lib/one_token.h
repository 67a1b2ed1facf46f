// lib/one_token.h - the experts of a single token, in fewer steps. Included by coe.c [5].
#ifndef ONE_TOKEN_H
#define ONE_TOKEN_H

#ifdef PLAIN
// y = w x for each of a list. The fast form has the threads meet once for all of them, and needs
// scratch, with room for every x.
static void matvecs(const Matvec *list, size_t n, real *scratch) {
    (void)scratch;
    for (size_t j = 0; j < n; j++)
        matmul_nt(list[j].y, list[j].w.rows, view(list[j].x, 1, list[j].w.cols, list[j].w.cols),
                  list[j].w, 0);
}
#endif

enum { MOST_AT_ONCE = 64 };     // feed-forwards that experts_of_one() can take

// All experts that a single token chose, and it->ffn = its shared expert. With so little work it
// matters how often the threads meet: here twice, for all gate and up projections and for all down
// projections, where expert_forward() would have them meet three times an expert. Nothing is kept:
// g and u lie by choice instead of by slot, and swiglu() puts act in the place of g.
static void experts_of_one(const Config *config, State *s, Iteration *it, Layer *w) {
    LETTERS(config);
    Matvec in[2 * MOST_AT_ONCE], out[MOST_AT_ONCE];
    const size_t mlps = K + (S > 0);                    // the last is the shared one
    in[0] = (Matvec){ 0 };                              // no warning where K may be 0
    for (size_t k = 0; k < mlps; k++) {
        const Mlp mlp = k < K ? expert(w, (size_t)it->expert[k]) : shared_mlp(w, 1);
        real *g = k < K ? it->g + k * f : it->shared_g, *u = k < K ? it->u + k * f : it->shared_u;
        real *to = k < K ? s->returned + (size_t)it->slot[k] * d : it->ffn;
        in[2 * k]     = (Matvec){ g, it->y, matrix(mlp.gate_proj, mlp.e) };
        in[2 * k + 1] = (Matvec){ u, it->y, matrix(mlp.up_proj, mlp.e) };
        out[k]        = (Matvec){ to, g, matrix(mlp.down_proj, mlp.e) };
    }
    matvecs(in, 2 * mlps, s->act);
    for (size_t k = 0; k < mlps; k++)
        swiglu(in[2 * k].y, in[2 * k].y, in[2 * k + 1].y, in[2 * k].w.rows);
    matvecs(out, mlps, s->act);
}
#endif // ONE_TOKEN_H
