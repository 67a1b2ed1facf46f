// dump_grads MODEL.bin TOKENS B L OUT [TARGETS]: the gradients of the mean cross entropy plus the balancing loss over B
// sequences of L as float32, laid out like the weights section of a model file. Sequence b reads tokens [b L, + L]
// and predicts the next ones, or where a second token file is given those at the same places in it. Prints both losses.
#define main train_main
#include "../train.c"
#undef main

int main(int argc, char **argv) {
    if (argc != 6 && argc != 7) fail(WRONG_USAGE, "usage: dump_grads MODEL.bin TOKENS B L OUT [TARGETS]");
    const size_t B = (size_t)atol(argv[3]), L = (size_t)atol(argv[4]);
    Model m = model_open(argv[1], 1, NULL, NULL);
    Stream s = read_stream(&m, argv[2]);
    Stream targets = { .tokens = s.tokens + 1, .n = s.n - 1 };
    if (argc == 7) targets = read_stream(&m, argv[6]);
    if (s.n < B * L || targets.n < B * L) fail(FAILED, "%s: holds %zu tokens, too few for %zu x %zu", argv[2], s.n, B, L);
    Weights dw = weights_layout(&m.config, m.coe_weights, F32);
    real *grad = allocate(m.w.size * sizeof(real), "gradients");
    weights_bind(&dw, grad);
    State state = state_new(&m.config, B * L, L, to_keep(&m));
    Gradients g = gradients_new(&m.config, B * L, L);
    Loss loss = backward(&m, &dw, &state, &g, s.tokens, targets.tokens, B, L, 1.0 / (double)(B * L), 1);
    FILE *out = fopen(argv[5], "wb");
    if (!out) fail(FAILED, "%s: cannot be written", argv[5]);
    write_floats(grad, m.w.size, out, argv[5]);
    fclose(out);
    printf("loss %.9g\naux_loss %.9g\n", loss.loss, loss.aux);
    return 0;
}
