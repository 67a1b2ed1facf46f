// lib/trace.h - run --trace: a table of the experts that were chosen. Included by run.c.
#ifndef TRACE_H
#define TRACE_H

static const char TRACE_COLUMNS[] = "position\ttoken\tlayer\titeration\trank\texpert\tweight\t"
                                    "model\n";

// The trace of the forward() that ran last: a line for every expert that its rows from `skip` on
// chose. Row 0 is token number `index` of the input. The last column is a fingerprint of the model.
static void trace(const Run *run, size_t index, size_t n, size_t skip) {
    LETTERS(&run->model.config);
    char text[DECIMAL_TEXT];
    for (size_t row = skip; row < n; row++)
        for (size_t l = 0; l < L; l++)
            for (size_t c = 0; is_moe(&run->model.config, l) && c < C; c++)
                for (size_t k = 0; k < K; k++) {
                    const Iteration *it = &run->state.layer[l].iteration[c];
                    fprintf(run->trace_file.file, "%zu\t%d\t%zu\t%zu\t%zu\t%d\t%s\t%08x\n",
                            index + row, run->tokens[index + row], l, c, k, it->expert[row * K + k],
                            decimal(text, (double)it->weight[row * K + k]), run->fingerprint);
                }
}
#endif // TRACE_H
