// lib/setup.h - from the command line to a run that can start: options, model, data, memory.
// Included by train.c.
//
// Contents: tokenizers, resuming, models, data, memory, the command line.
#ifndef SETUP_H
#define SETUP_H

// ---- tokenizers ---------------------------------------------------------------------------------

// Whether a key of the config belongs to the tokenizer rather than to the weights.
static bool is_of_text(const Key *k) {
    return strstr(k->name, "s_token") || !strcmp(k->name, "chat_template");
}

// Takes the tokenizer of the model file --tokenizer, and what of the config goes with it, unless
// the user gave that. `fresh`: the vocabulary's size too.
static void take_tokenizer(Run *run, const Options *config_table, bool fresh) {
    Model *m = &run->model, from = model_open(run->job.tokenizer, MAPPED, NULL, NULL);
    if (!from.tokenizer) fail(FAILED, "%s: has no tokenizer", run->job.tokenizer);
    m->tokenizer = from.tokenizer;
    m->files = from.files;
    m->files_bytes = from.files_bytes;
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        if (config_table->given[i]) continue;
        if (is_of_text(k) || (fresh && !strcmp(k->name, "vocab_size")))
            key_copy(k, &m->config, &from.config);
    }
    if (m->config.vocab_size < m->tokenizer->n_tokens)
        fail(WRONG_USAGE, "vocab_size is %zu, must be at least %u for the tokenizer of %s",
             m->config.vocab_size, m->tokenizer->n_tokens, run->job.tokenizer);
}

// Ends the program unless --tokenizer is the one that the resumed model has.
static void check_resumed_tokenizer(const Run *run) {
    const Model *m = &run->model;
    Model from = model_open(run->job.tokenizer, MAPPED, NULL, NULL);
    const Tokenizer *mine = m->tokenizer, *other = from.tokenizer;
    bool same = !mine == !other && from.files_bytes == m->files_bytes;
    if (same && mine)
        same = mine->kind == other->kind && mine->section_bytes == other->section_bytes;
    if (!same || memcmp(from.files, m->files,
                        m->files_bytes + (mine ? mine->section_bytes : 0)))
        fail(WRONG_USAGE, "--tokenizer %s is not the tokenizer of %s", run->job.tokenizer,
             run->job.resume);
    model_free(&from);
}

// A fresh model's tokenizer: bytes, where its vocabulary has room for them.
static void choose_tokenizer(Run *run, const Options *config_table) {
    Config *c = &run->model.config;
    if (c->vocab_size >= BYTE_TOKENS)
        run->model.tokenizer = tokenizer_new(BYTES, NULL, 0, "options", c->vocab_size);
    if (run->model.tokenizer) return;
    if (!is_given(config_table, "bos_token_id")) c->bos_token_id = -1;
    if (!is_given(config_table, "eos_token_id")) c->eos_token_id = -1;
}

// ---- resuming -----------------------------------------------------------------------------------

// Takes the value of key k over from the struct `have`, which came from the file `where`, or ends
// the program if the user gave another one.
static void must_agree(const Options *table, const Key *k, const void *have, const char *where) {
    if (table->given[k - table->keys] && !key_equal(k, table->base, have)) {
        char text[64];
        snprintf(text, sizeof text, "%s", key_text(k, table->base));
        fail(WRONG_USAGE, "--%s is %s, but %s has %s", k->name, text, where, key_text(k, have));
    }
    key_copy(k, table->base, have);
}

// Takes a checkpoint's model, recipe, step and moments. What the user said otherwise must agree,
// except how far to go. *progress: for the data to be compared.
static void resume(Run *run, const Options tables[TABLES], Progress *progress) {
    const char *path = run->job.resume;
    FILE *file;
    Header header;
    Recipe recipe;
    Model m = model_open(path, READ_CHECKED, &file, &header);
    read_state(&recipe, progress, &m, &header, file, path);
    for (int i = 0; i < CONFIG_KEYS; i++)
        must_agree(&tables[CONFIG_TABLE], &config_keys[i], &m.config, path);
    for (int i = 0; i < RECIPE_KEYS; i++) {
        const Key *k = &recipe_keys[i];
        if (!strcmp(k->name, "max_steps") && tables[RECIPE_TABLE].given[i]) continue;
        must_agree(&tables[RECIPE_TABLE], k, &recipe, path);
    }
    run->model = m;
    if (*run->job.tokenizer) check_resumed_tokenizer(run);
    run->saved = true;
    run->step = progress->step;
    run->m = allocate(checked_mul(m.w.size, sizeof(real)), "AdamW's first moments");
    run->v = allocate(checked_mul(m.w.size, sizeof(real)), "AdamW's second moments");
    read_floats(run->m, m.w.size, file, path);
    read_floats(run->v, m.w.size, file, path);
    fclose(file);
}

// Ends the program unless the data is what the checkpoint of --resume was trained on.
static void check_resumed_data(const Run *run, const Progress *resumed) {
    const Job *job = &run->job;
    const Data *data = &run->data;
    if (data->built_in != (resumed->data_tokens == 0))
        fail(FAILED, "%s was trained on %s: %s --data", job->resume,
             data->built_in ? "a file" : "the built-in task",
             data->built_in ? "give it with" : "leave out");
    if (!data->built_in && (resumed->data_tokens != data->train.n ||
                            strcmp(resumed->data_fingerprint, data_fingerprint(data))))
        fail(FAILED, "%s: is not the data that %s was trained on (%zu tokens, there %zu)",
             job->data, job->resume, data->train.n, resumed->data_tokens);
}

// ---- models -------------------------------------------------------------------------------------

// Takes the model of --init. Options may change what does not change the meaning of its weights.
static void init_from(Run *run, const Options *config_table) {
    static const char *const free_keys[] = {
        "aux_loss_alpha", "seq_aux", "max_position_embeddings", "initializer_range", "temperature",
        "top_k", "top_p", "min_p", "repetition_penalty", "torch_dtype", "add_bos_token",
        "chat_template",
    };
    Model m = model_open(run->job.init, READ_CHECKED, NULL, NULL);
    for (int i = 0; i < CONFIG_KEYS; i++) {
        const Key *k = &config_keys[i];
        bool is_free = false;
        for (size_t j = 0; j < sizeof free_keys / sizeof *free_keys; j++)
            is_free |= !strcmp(k->name, free_keys[j]);
        if (is_free && config_table->given[i]) key_copy(k, &m.config, &run->model.config);
        else must_agree(config_table, k, &m.config, run->job.init);
    }
    run->model = m;
    if (*run->job.tokenizer) take_tokenizer(run, config_table, false);
    config_check(&run->model.config, "options", WRONG_USAGE);
}

// A new model, as the options describe it, still without weights; its context is at least a window
// long.
static void fresh_model(Run *run, const Options *config_table) {
    Model *m = &run->model;
    Config *c = &m->config;
    if (!is_given(config_table, "max_position_embeddings"))
        c->max_position_embeddings = max_size(c->max_position_embeddings, run->recipe.max_length);
    if (*run->job.tokenizer) take_tokenizer(run, config_table, true);
    else choose_tokenizer(run, config_table);
    config_check(c, "options", WRONG_USAGE);
    m->w = weights_layout(c, false, F32);       // make_room() gives them memory and values
}

// ---- data ---------------------------------------------------------------------------------------

// Opens the training and validation data. Fails where they do not make a single batch.
static void open_data(Run *run) {
    const Model *m = &run->model;
    Data *data = &run->data;
    const size_t n = run->recipe.max_length, B = run->recipe.batch_size;
    data->recipe = &run->recipe;
    data->tokenizer = m->tokenizer;
    data->eos = (int)m->config.eos_token_id;
    data->built_in = !*run->job.data;
    if (data->built_in && (!m->tokenizer || data->eos < 0))
        fail(FAILED, "the built-in task is text, but the model has no tokenizer or no "
             "eos_token_id: give token files with --data");
    if (data->built_in) data->val = task_validation(data);
    else data->train = read_stream(m, run->job.data);
    if (*run->job.val) data->val = read_stream(m, run->job.val);
    else if (!data->built_in)
        data->val = split_stream(&data->train, data->eos, run->recipe.sequential);
    if (!data->built_in && windows(&data->train, n) < B)
        fail(FAILED, "%s: %zu tokens make %zu windows of %zu, a batch needs %zu: "
             "make --batch_size or --max_length smaller",
             run->job.data, data->train.n, windows(&data->train, n), n, B);
}

// Prints n documents of a stream, or that many problems of the built-in task, each followed by a
// line <|endoftext|>.
static void show_documents(const Run *run, const Stream *s, size_t n, bool held_out) {
    const Recipe *r = &run->recipe;
    char problem[TASK_MAX];
    for (size_t i = 0; run->data.built_in && i < n; i++) {
        task_problem(problem, (uint64_t)r->seed, i, (int)r->level, held_out);
        printf("%s%s\n", problem, EOS_TEXT);
    }
    bool line = true;               // whether a line begins here
    for (size_t i = 0; i < s->n && n > 0 && !run->data.built_in; i++) {
        const int id = s->tokens[i];
        if (id == run->data.eos) {
            printf("%s%s\n", line ? "" : "\n", EOS_TEXT);
            n--;
            line = true;
            continue;
        }
        if (run->model.tokenizer) {
            size_t bytes;
            const char *text = decode(run->model.tokenizer, id, &bytes);
            fwrite(text, 1, bytes, stdout);
            if (bytes) line = text[bytes - 1] == '\n';
        } else {
            printf("%d ", id);
            line = false;
        }
    }
}

// ---- memory -------------------------------------------------------------------------------------

// Prints what training will take, by kind, with `rows` tokens at once. Fails if the machine has
// less: it would go on, but on its disk.
static void check_memory(const Run *run, size_t rows) {
    const Config *c = &run->model.config;
    const size_t n = run->recipe.max_length;
    const double numbers = 1e-6 * sizeof(real) * (double)run->model.w.size;
    State s = { .rows = rows, .context = n, .keep = to_keep(&run->model) };
    Gradients g = { 0 };
    Arena kept = { 0 }, other = { 0 };
    state_layout(&s, c, &kept);
    gradients_layout(&g, c, rows, n, &other);
    const double activations = 1e-6 * ((double)kept.used + (double)other.used);
    fprintf(stderr, "memory: weights %.1f MB, gradients %.1f MB, moments %.1f MB, "
            "activations %.1f MB\n", numbers, numbers, 2 * numbers, activations);
#ifdef _SC_PHYS_PAGES
    const double there = 1e-6 * (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    if (4 * numbers + activations > there)
        fail(FAILED, "training takes %.1f MB of memory, this machine has %.1f MB: a smaller model, "
             "--micro_batch_size or --max_length takes less", 4 * numbers + activations, there);
#endif
}

// Memory for everything that training needs, the weights of a new model among it, and the place in
// the data that belongs to run->step.
static void make_room(Run *run) {
    Model *m = &run->model;
    const Recipe *r = &run->recipe;
    const size_t B = r->batch_size, n = r->max_length, size = m->w.size;
    const size_t at_once = r->micro_batch_size ? min_size(r->micro_batch_size, B) : B;
    check_memory(run, checked_mul(at_once, n));
    if (!m->weights) {
        m->weights = allocate(checked_mul(size, sizeof(real)), "the weights");
        weights_bind(&m->w, m->weights);
        weights_init(m, (uint64_t)r->seed);
    }
    run->grad = allocate(checked_mul(size, sizeof(real)), "the gradients");
    gradients_bind(&m->w, run->grad);
    if (!run->m) run->m = allocate(checked_mul(size, sizeof(real)), "AdamW's first moments");
    if (!run->v) run->v = allocate(checked_mul(size, sizeof(real)), "AdamW's second moments");
    run->state = state_new(&m->config, checked_mul(at_once, n), n, to_keep(m));
    run->g = gradients_new(&m->config, at_once * n, n);
    run->inputs = allocate(checked_mul(B * n, sizeof(int)), "a batch");
    run->targets = allocate(checked_mul(B * n, sizeof(int)), "a batch");
    run->window = allocate((n + 1) * sizeof(int), "a window");
    run->n_chosen = checked_mul(m->config.num_hidden_layers,
                                checked_mul(m->config.inner_iter, m->config.n_routed_experts));
    run->chosen = allocate(checked_mul(run->n_chosen, sizeof(int)), "the choices of experts");
    for (size_t i = 0; run->data.built_in && i < (size_t)run->step * B; i++)
        next_made_window(&run->data, run->window);
}

// ---- the command line ---------------------------------------------------------------------------

// What --help prints.
static void print_help(const Options tables[TABLES]) {
    puts("usage: ./train [options]\n"
         "Trains a Chain-of-Experts; without options a small one on built-in word problems.\n"
         "\n"
         "files and reports:");
    print_options(&tables[JOB_TABLE]);
    puts("\nthe recipe:");
    print_options(&tables[RECIPE_TABLE]);
    puts("\nthe model (keys of config.json):");
    print_options(&tables[CONFIG_TABLE]);
}

// Settles recipe, model and data, from the options and the files that they name.
static void settle(Run *run, const Options tables[TABLES]) {
    Job *job = &run->job;
    Progress resumed;
    set_threads(job->threads);
    if (*job->resume && !is_given(&tables[JOB_TABLE], "output")) job->output = job->resume;
    if (*job->init && *job->resume)
        fail(WRONG_USAGE, "--init and --resume: only one of them can be given");
    apply_preset(tables, *job->init ? paper_recipe : presets[job->model]);
    if (job->model == PAPER && !*job->init) apply_preset(tables, paper_recipe);
    if (*job->resume) resume(run, tables, &resumed);
    else if (*job->init) init_from(run, &tables[CONFIG_TABLE]);
    else fresh_model(run, &tables[CONFIG_TABLE]);
    const size_t longest = run->model.config.max_position_embeddings;
    if (run->recipe.max_length > longest)
        fail(WRONG_USAGE, "--max_length is %zu, must be 2..%zu (max_position_embeddings)",
             run->recipe.max_length, longest);
    open_data(run);
    if (*job->resume) check_resumed_data(run, &resumed);
}

// Does what the command line says up to where training can begin. False where all is done already.
static bool prepare(Run *run, int argc, char **argv) {
    unsigned char given[TABLES][CONFIG_KEYS] = { { 0 } };
    const Options tables[TABLES] = {
        [CONFIG_TABLE] = { config_keys, CONFIG_KEYS, &run->model.config, given[CONFIG_TABLE] },
        [RECIPE_TABLE] = { recipe_keys, RECIPE_KEYS, &run->recipe, given[RECIPE_TABLE] },
        [JOB_TABLE]    = { job_keys, JOB_KEYS, &run->job, given[JOB_TABLE] },
    };
    const Job *job = &run->job;
    for (int i = 0; i < TABLES; i++) keys_init(tables[i].keys, tables[i].n, tables[i].base);
    parse_options(tables, TABLES, argc, argv, 1);
    if (job->version) puts("train (coe.c) " COE_VERSION);
    else if (job->help) print_help(tables);
    else settle(run, tables);
    if (!job->version && !job->help && !job->show_data && !job->show_val) return true;
    if (job->show_data) show_documents(run, &run->data.train, job->show_data, false);
    if (job->show_val) show_documents(run, &run->data.val, job->show_val, true);
    flush_stdout();
    return false;
}
#endif // SETUP_H
