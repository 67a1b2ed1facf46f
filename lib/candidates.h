// lib/candidates.h - the most probable tokens, in order, without sorting a whole vocabulary.
#ifndef CANDIDATES_H
#define CANDIDATES_H

typedef struct { real p; int id; } Candidate;

// The order of candidates: more probable first, then the lower id.
static int before(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->id < y->id ? -1 : 1;
}

// Moves the k candidates that come before all others to the front, in any order (Hoare 1961).
static void select_first(Candidate *list, size_t n, size_t k) {
    while (0 < k && k < n) {
        const Candidate pivot = list[n / 2];
        size_t i = 0, j = n - 1;
        for (;; i++, j--) {
            while (before(&list[i], &pivot) < 0) i++;
            while (before(&pivot, &list[j]) < 0) j--;
            if (i >= j) break;
            const Candidate moved = list[i];
            list[i] = list[j];
            list[j] = moved;
        }
        if (k <= i) {               // list[0] .. list[i - 1] come before the others
            n = i;
        } else {
            list += i;
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

// Fills candidate (room for V) with the tokens whose probability is at least `least`, in any order.
// p (V). Returns how many.
static size_t at_least(Candidate *candidate, const real *p, size_t V, double least) {
    size_t n = 0;
    for (size_t i = 0; i < V; i++)
        if ((double)p[i] >= least) candidate[n++] = (Candidate){ p[i], (int)i };
    return n;
}

// The k most probable of V tokens, in order: k candidates. p (V).
static size_t first_k(Candidate *candidate, const real *p, size_t V, size_t k) {
    select_first(candidate, at_least(candidate, p, V, 0), k);
    qsort(candidate, k, sizeof *candidate, before);
    return k;
}

// The most probable of V tokens, in order: as many as a walk down from the top needs to add up to
// reach * all, and maybe more; but none below `floor`. p (V), whose sum is `all`. Returns how many.
//
// V tokens, each below (1 - reach) all / V, add up to less than (1 - reach) all. So the others add
// up to more than reach * all, and the walk never comes to these. (Half of that limit is taken,
// because sums round.)
static size_t first_reaching(Candidate *candidate, const real *p, size_t V, double all,
                             double reach, double floor) {
    const double least = fmax((1 - reach) * all / (double)(2 * V), floor);
    const size_t n = at_least(candidate, p, V, least);
    qsort(candidate, n, sizeof *candidate, before);
    return n;
}
#endif // CANDIDATES_H
