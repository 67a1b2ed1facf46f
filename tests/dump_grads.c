// dump_grads MODEL.bin TOKENS B n OUT [TARGETS [COUNTS]]: the gradients of the mean cross entropy plus the
// balancing loss over B sequences of n tokens as float32, laid out like the weights section of a
// model file. Sequence b reads tokens [b n, + n] and predicts the next ones, or where a second
// token file is given those at the same places in it. In a third one, 0 stands at the places whose
// targets have no loss. Prints both losses.
#define main train_main
#include "../train.c"
#undef main

int main(int argc, char **argv) {
    if (argc < 6 || argc > 8)
        fail(WRONG_USAGE, "usage: dump_grads MODEL.bin TOKENS B n OUT [TARGETS [COUNTS]]");
    const size_t B = (size_t)atol(argv[3]), n = (size_t)atol(argv[4]);
    Model m = model_open(argv[1], READ_CHECKED, NULL, NULL);
    Stream s = read_stream(&m, argv[2], NULL, true, false);
    Stream targets = { .tokens = s.tokens + 1, .n = s.n - 1 };
    if (argc > 6) targets = read_stream(&m, argv[6], NULL, true, false);
    Stream counts = targets;
    if (argc > 7) counts = read_stream(&m, argv[7], NULL, true, false);
    if (s.n < B * n || targets.n < B * n || counts.n < B * n)
        fail(FAILED, "%s: holds %zu tokens, too few for %zu x %zu", argv[2], s.n, B, n);
    for (size_t i = 0; argc > 7 && i < B * n; i++)
        if (!counts.tokens[i]) targets.tokens[i] = NO_TARGET;
    const size_t learned = count_targets(targets.tokens, B * n);
    real *grad = allocate(m.w.size * sizeof(real), "gradients");
    gradients_bind(&m.w, grad);
    State state = state_new(&m.config, B * n, n, to_keep(&m));
    Gradients g = gradients_new(&m.config, B * n, n);
    const MicroBatch batch = { s.tokens, targets.tokens, B, n, 1.0 / (double)learned, 1 };
    forward(&m, &state, batch.tokens, B, n, 0, B * n);
    const Loss loss = backward(&m, &state, &g, &batch);
    ModelWriter out = { .file = fopen(argv[5], "wb"), .path = argv[5] };
    if (!out.file) fail(FAILED, "%s: cannot be written", argv[5]);
    write_floats(&out, grad, m.w.size);
    fclose(out.file);
    printf("loss %.9g\naux_loss %.9g\n", loss.loss, loss.aux);
    return 0;
}
