// tests/fuzz/resume.c - checkpoints, as train --resume reads them: one step goes on from each, and
// what is saved after that must be readable.
//
// An input is a byte of choices and a model file with a training state: see model_input.h.
#include "fuzz.h"
#include "../../train.c"
#include "model_input.h"

static void work_on(const uint8_t *data, size_t n) {
    static Run run = { .val_loss = NAN, .solved = NAN, .best_val_loss = -1 };
    Progress resumed = { 0 };
    char *argv[16] = { "train", "--resume", "fuzz-model.bin", "-o", "fuzz-out.bin" };
    int argc = 5;
    if (!n) return;
    if (*data & 2) argv[argc++] = "-x", argv[argc++] = "1000000000000";
    if (*data & 4) argv[argc++] = "-d", argv[argc++] = "fuzz-text.txt";
    program = "train";
    model_from(data + 1, n - 1, *data & 8, true);
    if (!prepare(&run, &resumed, argc, argv)) return;
    print_model(&run.model);
    const Recipe *r = &run.recipe;
    const double rows = (double)r->batch_size * (double)r->max_length;
    if (rows * (double)run.model.w.size > 1 << 24) return;          // takes too long
    make_room(&run, &resumed);
    double norm;
    if (run.step < r->max_steps) train_step(&run, &norm);
    save_checkpoint(&run);
    fuzz_must_go_on = true;
    fuzz_work = 0;
    FILE *file;
    Header header;
    Recipe recipe;
    const Model m = model_open("fuzz-out.bin", READ_CHECKED, &file, &header);
    read_state(&recipe, &resumed, &m, &header, file, "fuzz-out.bin");
    FUZZ_MUST(resumed.step == run.step && m.w.size == run.model.w.size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    fuzz(work_on, data, n);
    return 0;
}
