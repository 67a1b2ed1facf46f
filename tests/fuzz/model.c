// tests/fuzz/model.c - model files, as run reads them in each of its modes.
//
// An input is a byte that chooses the mode and the form of the file, and the file: see
// model_input.h.
#include "fuzz.h"
#include "../../run.c"
static const Key recipe_keys[1];                // run knows none
enum { RECIPE_KEYS = 0 };
#include "model_input.h"

static char *const command_lines[8][20] = {
    { "--ids", "-i", "0 0 0", "-n", "3", "-t", "0" },
    { "-i", "the <bos> 12 x", "-n", "3", "-s", "1", "-k", "5", "--repeat-penalty", "1.5" },
    { "-m", "eval", "--ids", "-i", "0 0 0 0" },
    { "-m", "eval", "-f", "fuzz-text.txt", "-c", "4", "--trace", "fuzz-trace.tsv",
      "--completion_only_loss", "true" },
    { "-m", "lens", "--ids", "-i", "0 0 0", "--silence", "layer=0,expert=0", "--parallel", "all",
      "--swap_gates", "all", "--gate_input", "iteration=1" },
    { "-m", "info" },
    { "-m", "chat", "-i", "Hi there", "--system", "Be brief.", "-n", "2", "-t", "0" },
    { "-m", "tokenize", "-i", "the text 12" },
};

static void work_on(const uint8_t *data, size_t n) {
    char *argv[24] = { "run", "fuzz-model.bin" };
    int argc = 2;
    if (!n) return;
    for (char *const *arg = command_lines[*data & 7]; *arg; arg++) argv[argc++] = *arg;
    model_from(data + 1, n - 1, *data & 8, false);
    program_main(argc, argv);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    fuzz(work_on, data, n);
    return 0;
}
