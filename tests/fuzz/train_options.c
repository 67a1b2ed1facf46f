// tests/fuzz/train_options.c - command lines of train: options, presets, configs. The first step is
// taken where that does not take long. An input has one argument a line.
#include "fuzz.h"
#include "../../train.c"
#include "arguments.h"

// A value must be the same when it is read back from the text that a file has for it.
static void check_values(const Key *keys, size_t n_keys, const void *base) {
    static union { Config config; Recipe recipe; } copy;
    for (const Key *k = keys; k < keys + n_keys; k++) {
        if (k->kind == TEXT) continue;
        FUZZ_MUST(key_parse(k, &copy, key_text(k, base)) && key_equal(k, &copy, base));
    }
}

static void work_on(const uint8_t *data, size_t n) {
    static Run run = { .val_loss = NAN, .solved = NAN, .best_val_loss = -1 };
    Progress resumed = { 0 };
    char *argv[MOST_ARGUMENTS + 1] = { "train" };
    program = "train";
    if (!prepare(&run, &resumed, arguments_from(argv, data, n), argv)) return;
    check_values(config_keys, CONFIG_KEYS, &run.model.config);
    check_values(recipe_keys, RECIPE_KEYS, &run.recipe);
    print_model(&run.model);
    const double rows = (double)run.recipe.batch_size * (double)run.recipe.max_length;
    if (rows * (double)run.model.w.size > 1 << 24) return;          // takes too long
    make_room(&run, &resumed);
    double norm;
    if (run.step < run.recipe.max_steps) train_step(&run, &norm);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    fuzz(work_on, data, n);
    return 0;
}
