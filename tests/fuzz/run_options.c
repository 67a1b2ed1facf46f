// tests/fuzz/run_options.c - command lines of run, which has a model fuzz-model.bin and a text
// fuzz-text.txt. An input has one argument a line.
#include "fuzz.h"
#define BENCH_H                                 // takes seconds whatever the model is
#define bench(run) ((void)(run))
#include "../../run.c"
#include "arguments.h"

static void work_on(const uint8_t *data, size_t n) {
    char *argv[MOST_ARGUMENTS + 1] = { "run" };
    program_main(arguments_from(argv, data, n), argv);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    fuzz(work_on, data, n);
    return 0;
}
