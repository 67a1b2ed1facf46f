// tests/fuzz/data.c - training data, as train reads it: texts, token files, and what is neither.
//
// An input is two bytes of choices and a file. With some choices the file gets the header of a
// token file that fits, or is cut in two, for training and for validation.
#include "fuzz.h"
#include "../../train.c"

// Writes a file of data; with a width, 2 or 4, as tokens of so many bytes.
static void write_data(const char *name, const uint8_t *data, size_t n, size_t width) {
    enum { HEADER = 1024 };
    uint8_t *file = allocate(HEADER + n, "an input");
    const int32_t header[3] = { width == 4 ? 20240801 : 20240520, width == 4 ? 7 : 1,
                                width ? (int32_t)(n / width) : 0 };
    memcpy(file, header, sizeof header);
    memcpy(file + HEADER, data, n);
    if (width) fuzz_file(name, file, HEADER + n / width * width);
    else fuzz_file(name, data, n);
    release(file);
}

static void work_on(const uint8_t *data, size_t n) {
    static Run run = { .val_loss = NAN, .solved = NAN, .best_val_loss = -1 };
    Progress resumed = { 0 };
    char *argv[40] = { "train", "-d", "fuzz-data", "-b", "2", "-l", "16", "--hidden_size", "8",
                       "--num_hidden_layers", "1", "--vocab_size", "300", "--eval_problems" };
    int argc = 14;
    if (n < 2) return;
    const unsigned choice = data[0] | (unsigned)data[1] << 8;
    data += 2, n -= 2;
    argv[argc++] = choice & 1 ? "2" : "0";
    if (choice & 2) argv[argc++] = "--packing=false";
    if (choice & 4) argv[argc++] = "--completion_only_loss=true";
    if (choice & 8) argv[argc++] = "--sequential";
    if (choice & 16) argv[argc++] = "--allow_bytes";
    if (choice & 32) argv[argc++] = "--tokenizer", argv[argc++] = "fuzz-tokenizer.bin";
    if (choice & 64) argv[argc++] = "--show_data=9", argv[argc++] = "--show_loss";
    const size_t first = choice & 128 ? n / 2 : n, width = choice >> 7 & 6;
    write_data("fuzz-data", data, first, width == 6 ? 0 : width);
    if (first < n) {
        write_data("fuzz-val", data + first, n - first, choice >> 9 & 2);
        argv[argc++] = "--val", argv[argc++] = "fuzz-val";
    }
    program = "train";
    if (!prepare(&run, &resumed, argc, argv)) return;
    make_room(&run, &resumed);
    const size_t rows = run.recipe.batch_size * run.recipe.max_length;
    for (uint64_t step = 0; step < 20; step++) {
        next_batch(&run.data, step, run.inputs, run.targets);
        for (size_t i = 0; i < rows; i++) {
            FUZZ_MUST(run.inputs[i] >= 0 && run.inputs[i] < 300);
            FUZZ_MUST(run.targets[i] >= NO_TARGET && run.targets[i] < 300);
        }
    }
    run.val_loss = validate(&run, min_size(val_samples(&run.data), 4));
    FUZZ_MUST(isnan(run.val_loss) == !run.data.val_targets || val_samples(&run.data) > 4);
    if (choice & 1) run.solved = solve(&run, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    fuzz(work_on, data, n);
    return 0;
}
