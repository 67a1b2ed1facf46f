// lib/info.h - run --mode info: what is in a model file. Included by run.c.
#ifndef INFO_H
#define INFO_H

// Bytes that one token adds to the cache.
static size_t cache_bytes(const Config *c) {
    return c->num_hidden_layers * (c->kv_lora_rank + c->qk_rope_head_dim) * sizeof(real);
}

// What is in the file: the config, every tensor of a checkpoint, and what that amounts to.
static void info(const Run *run) {
    const Model *m = &run->model;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        const bool pieces = m->config.generation.chat_template == CHAT_OF_PIECES;
        if (!strncmp(k->name, "chat.", 5) && !pieces) continue;
        if (k->kind == NUM) print_value(k->name, key_number(k, &m->config));
        else if (k->kind == TEXT) print_text(k->name, key_text(k, &m->config));
        else printf("%s %s\n", k->name, key_text(k, &m->config));
    }
    static const char *const type_names[] = { "f32", "bf16", "q8" };
    printf("dtype %s\n", type_names[m->w.embed_tokens->type]);
    printf("tokenizer %s\n",
           !m->tokenizer ? "none" : m->tokenizer->kind == BYTES ? "bytes" : "bpe");
    for (size_t i = 0; i < m->w.n_tensors; i++) {
        const Tensor *t = &m->w.tensor[i];
        const int vector = t->init == ONES || t->init == ZEROS;
        for (size_t e = 0; e < t->copies; e++) {
            char name[128];
            tensor_name(name, sizeof name, &m->w, i, e);
            if (!vector) printf("%s %zux%zu %s\n", name, t->rows, t->cols, type_names[t->type]);
            else printf("%s %zu f32\n", name, t->cols);
        }
    }
    const Parameters p = count_parameters(m);
    print_count("total_parameters", p.total);
    print_count("active_parameters", p.active);
    print_count("bytes", p.bytes);
    print_count("flops_per_token", 2 * p.active);   // without attention to the past, which grows
    print_count("cache_bytes_per_token", cache_bytes(&m->config));
}
#endif // INFO_H
