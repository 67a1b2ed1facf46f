// lib/edits.h - what a chain does when a part of it is changed, without training it anew.
//
// run --silence, --parallel, --swap_gates and --gate_input say what to change; coe.c [5] and [6]
// call the functions below at the places where that is possible, and these do nothing where nobody
// asked. Nothing of this is for training.
//
// A rule is a list of conditions, "layer=3,iteration=1": all of them must hold. A condition that is
// not there always holds. Several rules of a kind: one of them must hold.
#ifndef EDITS_H
#define EDITS_H

enum EditKind { SILENCE, PARALLEL, SWAP_GATES, GATE_INPUT, EDIT_KINDS };
enum { LAYER, ITERATION_KEY, EXPERT, HEAD, SHARED_KEY, CONDITIONS };

typedef struct {
    enum EditKind kind;
    int64_t value[CONDITIONS];      // -1: not given; of `shared` 1: given
} Edit;

enum { MOST_EDITS = 64 };
typedef struct Edits {
    Edit edit[MOST_EDITS];
    size_t n;
    real *y_0, *y_c;                // (T, d)  the start of a chain; y_c while --parallel shows y_0
    // Told of each y: of the chain's start (c = 0), and with c iterations done. it->ffn is what the
    // last one added; at the start it is not set yet. NULL: nobody wants to know.
    void (*watch)(void *watcher, const State *s, const Iteration *it, size_t l, size_t c,
                  const real *y, size_t T);
    void *watcher;
} Edits;

// Whether some rule of a kind holds. part: EXPERT, HEAD or SHARED_KEY, of number `which`, or -1:
// the whole of an iteration.
static bool edited(const State *s, enum EditKind kind, size_t l, size_t c, int part, size_t which) {
    for (size_t i = 0; s->edits && i < s->edits->n; i++) {
        const Edit *e = &s->edits->edit[i];
        bool holds = e->kind == kind && (e->value[LAYER] < 0 || e->value[LAYER] == (int64_t)l) &&
                     (e->value[ITERATION_KEY] < 0 || e->value[ITERATION_KEY] == (int64_t)c);
        for (int k = EXPERT; k < CONDITIONS; k++)
            holds &= k == part ? e->value[k] == (int64_t)which : e->value[k] < 0;
        if (holds) return true;
    }
    return false;
}

// Before iteration c of layer l: remembers y_0 and, for a parallel iteration, puts it in the place
// of y_c (T, d).
static void edit_input(State *s, Iteration *it, size_t l, size_t c, size_t T, size_t d) {
    Edits *e = s->edits;
    if (!e) return;
    if (c == 0) memcpy(e->y_0, it->y, T * d * sizeof(real));
    if (c == 0 && e->watch) e->watch(e->watcher, s, it, l, 0, it->y, T);
    if (!edited(s, PARALLEL, l, c, -1, 0)) return;
    memcpy(e->y_c, it->y, T * d * sizeof(real));
    memcpy(it->y, e->y_0, T * d * sizeof(real));
}

// After the feed-forward of iteration c: puts y_c back, and makes ffn (T, d) 0 if it is silenced.
static void edit_output(State *s, Iteration *it, size_t l, size_t c, size_t T, size_t d) {
    if (!s->edits) return;
    if (edited(s, PARALLEL, l, c, -1, 0)) memcpy(it->y, s->edits->y_c, T * d * sizeof(real));
    if (edited(s, SILENCE, l, c, -1, 0)) memset(it->ffn, 0, T * d * sizeof(real));
}

// After iteration c, which made y (T, d).
static void tell_round(State *s, const Iteration *it, size_t l, size_t c, const real *y, size_t T) {
    if (s->edits && s->edits->watch)
        s->edits->watch(s->edits->watcher, s, it, l, c + 1, y, T);
}

// What the router of iteration c sees: y_c, or with gate_input y_0.
static const real *router_input(const State *s, const Iteration *it, size_t l, size_t c) {
    return edited(s, GATE_INPUT, l, c, -1, 0) ? s->edits->y_0 : it->y;
}

// Which iteration's router iteration c of C uses.
static size_t router_of(const State *s, size_t l, size_t c, size_t C) {
    return edited(s, SWAP_GATES, l, c, -1, 0) ? C - 1 - c : c;
}

// Before the experts' outputs are added to ffn (T, d), which is the shared expert's: makes that 0,
// or the weights (T, K) of experts, where they are silenced.
static void edit_parts(const State *s, Iteration *it, size_t l, size_t c, size_t T, size_t K,
                       size_t d) {
    if (!s->edits) return;
    if (edited(s, SILENCE, l, c, SHARED_KEY, 1)) memset(it->ffn, 0, T * d * sizeof(real));
    for (size_t i = 0; i < T * K; i++)
        if (edited(s, SILENCE, l, c, EXPERT, (size_t)it->expert[i])) it->weight[i] = 0;
}

// Before o_proj: makes silenced heads 0; heads (T, H dv).
static void edit_heads(const State *s, real *heads, size_t l, size_t T, size_t H, size_t dv) {
    for (size_t h = 0; s->edits && h < H; h++)
        if (edited(s, SILENCE, l, 0, HEAD, h))
            for (size_t t = 0; t < T; t++) memset(heads + (t * H + h) * dv, 0, dv * sizeof(real));
}
#endif // EDITS_H
