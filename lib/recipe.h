// lib/recipe.h - the settings of a training run, in two tables of keys.
//
// The recipe is what decides which weights come out, to the last bit: a checkpoint carries it, and
// a resumed run must agree with it. The job is the rest: files, and how often to report.
#ifndef RECIPE_H
#define RECIPE_H

enum { CONSTANT, COSINE };                              // lr_scheduler
enum { DEMO, SMALL, PAPER };                            // model

typedef struct {
    size_t batch_size, max_length;      // sequences a step, tokens a sequence
    size_t micro_batch_size;            // sequences at once; 0: the batch
    int64_t max_steps;
    double learning_rate;
    int64_t warmup_steps;               // -1: by warmup_ratio
    double warmup_ratio;
    int lr_scheduler;                   // CONSTANT or COSINE
    double weight_decay, adam_beta1, adam_beta2, adam_epsilon;
    double max_grad_norm;               // 0: no clipping
    double bias_update_speed;           // of correction biases, a step; 0: they stay
    int64_t seed;
    bool sequential;                    // samples in file order
    int64_t level;                      // of the built-in task
    bool packing;                       // windows over one stream; else one document a sequence
    bool completion_only_loss;          // what stands before a completion has no loss
    const char *completion_marker;      // what a completion begins with
} Recipe;

#define ROW(field, ...) { KEY(Recipe, field), __VA_ARGS__ }
static const Key recipe_keys[] = {
    ROW(batch_size, .letter = 'b', RANGE(1, 1 << 20), .init = "2",
        .help = "sequences per step; 8 with --data"),
    ROW(max_length, .letter = 'l', RANGE(2, 1 << 24), .init = "192",
        .help = "tokens per sequence"),
    ROW(micro_batch_size, RANGE(0, 1 << 20), .words = "null", .init = "null",
        .help = "sequences at once; null: the batch"),
    ROW(max_steps, .letter = 'x', RANGE(0, 1e12), .init = "7200",
        .help = "steps in all, resumed ones included; 4000 with --data"),
    ROW(learning_rate, RANGE(0, 1e9), .init = "1e-3",
        .help = "of AdamW, after warm-up; 1.2e-3 with --data"),
    ROW(warmup_steps, RANGE(-1, 1e12), .words = "null", .init = "null",
        .help = "steps of linear warm-up; null: by warmup_ratio"),
    ROW(warmup_ratio, RANGE(0, 1), .init = "0.05",
        .help = "share of max_steps that is warm-up"),
    ROW(lr_scheduler, .words = "constant|cosine", .init = "cosine",
        .help = "after warm-up; cosine ends at 0"),
    ROW(weight_decay, RANGE(0, 1e9), .init = "0.01",
        .help = "of AdamW, on every tensor"),
    ROW(adam_beta1, RANGE(0, 0.9999999), .init = "0.9",
        .help = "decay of the first moment"),
    ROW(adam_beta2, RANGE(0, 0.9999999), .init = "0.99",
        .help = "decay of the second moment; 0.95 with --data"),
    ROW(adam_epsilon, RANGE(1e-30, 1), .init = "1e-8",
        .help = "added to the root of the second moment"),
    ROW(max_grad_norm, RANGE(0, 1e9), .init = "1",
        .help = "gradient is clipped to this norm; 0: off"),
    ROW(bias_update_speed, RANGE(0, 1e9), .init = "0", .absent = "0",
        .help = "how fast a correction bias (noaux_tc) balances the experts, a step; 0: off"),
    ROW(seed, .letter = 's', RANGE(0, 9e15), .init = "1",
        .help = "of the initial weights and the order of the data"),
    ROW(sequential, .flag = true, .init = "false",
        .help = "samples in file order instead of shuffled"),
    ROW(level, RANGE(1, 2), .init = "1",
        .help = "difficulty of the built-in task"),
    ROW(packing, .init = "true", .absent = "true",
        .help = "windows over one stream; false: a document a sequence, padded; true with --data"),
    ROW(completion_only_loss, .init = "true", .absent = "false",
        .help = "no loss before the completion; false with --data"),
    ROW(completion_marker, .init = "answer:", .absent = "answer:",
        .help = "what the completion of a document begins with"),
};
#undef ROW
enum { RECIPE_KEYS = sizeof recipe_keys / sizeof *recipe_keys };

typedef struct {
    const char *init, *resume, *data, *val, *tokenizer, *output, *best, *log;
    bool profile;
    int model;                          // the preset
    int64_t eval_steps, save_steps, sample_steps;
    int64_t eval_windows;               // -1: by how much is trained between
    size_t eval_problems, threads, show_data, show_val;
    bool allow_bytes, show_loss, help, version;
} Job;

#define ROW(field, ...) { KEY(Job, field), __VA_ARGS__ }
static const Key job_keys[] = {
    ROW(init, .init = "",
        .help = "model file whose weights to start from, with a new optimizer"),
    ROW(resume, .init = "",
        .help = "checkpoint to go on from, bit by bit"),
    ROW(data, .letter = 'd', .init = "",
        .help = "training data: UTF-8 text or llm.c tokens; none: the built-in task"),
    ROW(val, .init = "",
        .help = "validation data; none: the last 5 % of the documents"),
    ROW(allow_bytes, .flag = true, .init = "false",
        .help = "take data that is not UTF-8 text as it is"),
    ROW(tokenizer, .init = "",
        .help = "model file whose tokenizer to take; none: bytes, or that of --init"),
    ROW(output, .letter = 'o', .init = "model.bin",
        .help = "where checkpoints go; with --resume that file"),
    ROW(best, .init = "",
        .help = "also keep the weights with the lowest val_loss so far, in this file"),
    ROW(log, .init = "",
        .help = "TSV with a line for each step"),
    ROW(profile, .flag = true, .init = "false",
        .help = "at the end, print what the time went into"),
    ROW(model, .words = "demo|small|paper", .init = "demo",
        .help = "preset for all settings"),
    ROW(eval_steps, RANGE(0, 1e12), .init = "500",
        .help = "validate every so many steps; 0: at the end"),
    ROW(eval_windows, RANGE(-1, 1e12), .words = "null", .init = "null",
        .help = "samples that validate during the run, at the end all; 0: all; null: a tenth of "
                "those trained on"),
    ROW(save_steps, RANGE(0, 1e12), .init = "500",
        .help = "save every so many steps; 0: at the end"),
    ROW(sample_steps, RANGE(0, 1e12), .init = "0",
        .help = "show a sample every so many steps; 0: at the end"),
    ROW(eval_problems, RANGE(0, 1 << 20), .init = "200",
        .help = "held-out problems to solve, a quarter of them during the run; 0: off; on text, "
                "whose documents end in \"#### n\", only if given"),
    ROW(threads, RANGE(0, MOST_THREADS), .words = "null", .init = "null",
        .help = "threads; null: OMP_NUM_THREADS, else all cores"),
    ROW(show_data, RANGE(0, 1 << 30), .init = "0",
        .help = "print so many training documents and exit"),
    ROW(show_val, RANGE(0, 1 << 30), .init = "0",
        .help = "print so many validation documents and exit"),
    ROW(show_loss, .flag = true, .init = "false",
        .help = "there, mark what has no loss: [[so]], or dimmed on a terminal"),
    ROW(help, .letter = 'h', .flag = true, .init = "false",
        .help = "this list"),
    ROW(version, .flag = true, .init = "false",
        .help = "the version"),
};
#undef ROW
enum { JOB_KEYS = sizeof job_keys / sizeof *job_keys };

// What the reference has where the demo chose otherwise: a model this small learns to copy numbers
// much sooner with larger initial weights, faster rotations and one matrix at both ends.
#define REFERENCE "rope_theta 10000 tie_word_embeddings false initializer_range 0.02 "

// The presets of --model, as the options they stand for. What a preset does not name keeps the
// tables' value, which is the demo's.
static const char *const presets[] = {
    [DEMO] = "",
    [SMALL] = REFERENCE
    "vocab_size 4096 hidden_size 384 num_hidden_layers 6 num_attention_heads 6 "
    "qk_nope_head_dim 64 qk_rope_head_dim 32 v_head_dim 64 kv_lora_rank 128 n_routed_experts 32 "
    "moe_intermediate_size 192 intermediate_size 768 batch_size 8 max_length 256 "
    "max_steps 4000 learning_rate 1e-3 warmup_ratio 0.1 adam_beta2 0.95",
    [PAPER] = REFERENCE
    "vocab_size 102400 hidden_size 1024 num_hidden_layers 4 num_attention_heads 8 "
    "qk_nope_head_dim 128 qk_rope_head_dim 64 v_head_dim 128 kv_lora_rank 512 n_routed_experts 63 "
    "num_experts_per_tok 4 moe_intermediate_size 704 intermediate_size 2816 "
    "max_position_embeddings 163840 micro_batch_size 1 rope_scaling.type yarn "
    "rope_scaling.factor 40 rope_scaling.mscale 0.707 rope_scaling.mscale_all_dim 0.707",
};
// The paper's training, which --init takes too.
static const char paper_recipe[] = "batch_size 64 max_length 512 max_steps 1000 learning_rate 3e-4 "
    "warmup_ratio 0.1 lr_scheduler constant adam_beta2 0.95";
// What texts and token files get, where the built-in task has short answers to learn, and nothing
// of the questions: for that, many small steps are best.
static const char text_recipe[] = "packing true completion_only_loss false batch_size 8 "
    "max_steps 4000 learning_rate 1.2e-3 adam_beta2 0.95";

// The tables of train's options, in this order.
enum { CONFIG_TABLE, RECIPE_TABLE, JOB_TABLE, TABLES };

// Sets every "name value" of a preset that the user did not give.
static void apply_preset(const Options tables[TABLES], const char *preset) {
    char text[1024], *save = NULL;
    snprintf(text, sizeof text, "%s", preset);
    for (char *name = strtok_r(text, " ", &save); name; name = strtok_r(NULL, " ", &save)) {
        const Options *table;
        const Key *k = find_key(tables, TABLES, name, strlen(name), &table);
        const char *value = strtok_r(NULL, " ", &save);
        if (!k || !value) fail(FAILED, "bug: preset key %s", name);
        if (table->given[k - table->keys]) continue;
        if (!key_parse(k, table->base, value)) fail(FAILED, "bug: preset value of %s", name);
    }
}
#endif // RECIPE_H
