"""What is compared: the paper's models as rows, their sizes, and the claims about them."""
from typing import NamedTuple

# ---- rows ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    about: str
    options: dict       # for ./train, in the place of the preset's; "times_layers" multiplies them
    paper: float | None         # validation loss in the reference's published curves, one run each
    ablation: bool = False      # the main pair or one of its ablations: these get more seeds


def moe(K, **more):
    return {"num_experts_per_tok": K, "inner_iter": 1, **more}


def coe(K, C=2, **more):
    return {"num_experts_per_tok": K, "inner_iter": C, **more}


OUTER = {"inner_residual": "false", "outer_residual": "true"}
# N counts the shared expert, as in the paper: 64 are 63 to choose from and the shared one.
ROWS = [Row(*row) for row in (
    ("moe-k8",           "MoE K=8",                        moe(8),                     1.196, True),
    ("coe-k4c2",         "CoE K=4, C=2",                   coe(4),                     1.121, True),
    ("coe-k8c2",         "CoE K=8, C=2",                   coe(8),                     1.120, True),
    ("coe-k8c2-gate",    "CoE K=8, C=2, one shared gate",  coe(8, use_igate="false"),  1.244, True),
    ("coe-k8c2-outer",   "CoE K=8, C=2, outer residual",   coe(8, **OUTER),            1.175, True),
    ("coe-k8c2-both",    "CoE K=8, C=2, both residuals",   coe(8, outer_residual="true"),
     None, True),
    ("moe-k16",          "MoE K=16",                       moe(16),                    1.166),
    ("moe-k24",          "MoE K=24",                       moe(24),                    1.175),
    ("coe-k4c2-n48",     "CoE K=4, C=2, N=48",             coe(4, n_routed_experts=47), 1.210),
    ("dense-c1",         "all 8 of 8 experts, C=1",        moe(8, n_routed_experts=8), 1.232),
    ("dense-c2",         "all 8 of 8 experts, C=2",        coe(8, n_routed_experts=8), 1.293),
    ("moe-k8-2layers",   "MoE K=8, twice the layers",      moe(8, times_layers=2),     1.109),
    ("moe-k8-3layers",   "MoE K=8, three times the layers", moe(8, times_layers=3),    1.070),
    ("coe-k2c4",         "CoE K=2, C=4",                   coe(2, 4),                  None),
    ("coe-k4c3",         "CoE K=4, C=3",                   coe(4, 3),                  None),
    ("coe-k4c4",         "CoE K=4, C=4",                   coe(4, 4),                  None),
)]


# ---- claims --------------------------------------------------------------------------------------

class Claim(NamedTuple):
    text: str
    better: str         # the row that the paper finds better, or at least as good
    other: str
    margin: float       # it may be worse by this part of the other's loss: 0 for "better"


MATCH = 0.02            # two losses match up to 2 %; the paper's that are said to differ by 1.2 %
CLAIMS = [Claim(*claim) for claim in (
    ("The chain beats the mixture of the same routed compute", "coe-k4c2", "moe-k8", 0),
    ("Iterating twice beats choosing twice as many", "coe-k8c2", "moe-k16", 0),
    ("Iterating twice matches choosing three times as many", "coe-k8c2", "moe-k24", MATCH),
    ("A chain of 48 experts matches a mixture of 64", "coe-k4c2-n48", "moe-k8", MATCH),
    ("Iterating twice matches twice the layers", "coe-k8c2", "moe-k8-2layers", MATCH),
    ("Gates of their own beat a shared one", "coe-k8c2", "coe-k8c2-gate", 0),
    ("The inner residual beats the outer", "coe-k8c2", "coe-k8c2-outer", 0),
    ("Without sparsity the chain gains nothing", "dense-c1", "dense-c2", MATCH),
)]


# ---- presets -------------------------------------------------------------------------------------

class Preset(NamedTuple):
    about: str
    steps: int
    seeds: tuple        # of the main pair and its ablations, and of the other rows
    evals: int          # validations in a run, at equal distances
    problems: int       # held-out problems to solve, of the built-in task
    options: dict


# In all presets as in the paper: 63 experts and a shared one, warm-up over a tenth of the steps and
# then a constant learning rate, so that a run is comparable at each of its steps. All tokens of one
# stream have a loss: it is the model of the whole text that is compared.
COMMON = {"packing": "true", "completion_only_loss": "false", "adam_beta2": 0.95,
          "n_routed_experts": 63, "n_shared_experts": 1, "vocab_size": 258, "lr_scheduler":
          "constant", "warmup_ratio": 0.1, "num_attention_heads": 8, "qk_rope_head_dim": 16}
PRESETS = {
    "quick": Preset("does it work at all", 150, (2, 1), 5, 40, COMMON | {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 32,
        "batch_size": 16, "max_length": 128, "learning_rate": 2e-3}),
    "default": Preset("two hours", 500, (3, 1), 10, 200, COMMON | {
        "hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 4,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 64,
        "batch_size": 16, "max_length": 256, "learning_rate": 1e-3}),
    "large": Preset("some days", 2000, (3, 1), 20, 200, COMMON | {
        "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4,
        "qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 128,
        "batch_size": 32, "max_length": 256, "learning_rate": 1e-3}),
}


# ---- sizes ---------------------------------------------------------------------------------------

def options_of(row, preset, extra):
    """All options of a row's model and recipe but steps and seed."""
    options = preset.options | row.options | extra
    options["num_hidden_layers"] *= options.pop("times_layers", 1)
    return options


def sizes(options):
    """(all parameters, those that a token meets, each as often as it does), as ./run -m info counts
    them: K = 4 and C = 2 with a shared expert is 10 experts a layer, K = 8 and C = 1 is 9."""
    o = options
    d, H, R, L = (o[k] for k in ("hidden_size", "num_attention_heads", "kv_lora_rank",
                                 "num_hidden_layers"))
    dn, dr, dv = o["qk_nope_head_dim"], o["qk_rope_head_dim"], o["v_head_dim"]
    E, K, C, S = (o[k] for k in ("n_routed_experts", "num_experts_per_tok", "inner_iter",
                                 "n_shared_experts"))
    attention = d * H * (dn + dr) + d * (R + dr) + R * H * (dn + dv) + H * dv * d + R + 2 * d
    expert, gate = 3 * d * o["moe_intermediate_size"], E * d
    gates = 1 if o.get("use_igate") == "false" else C
    total = L * (attention + gates * gate + (E + S) * expert) + d
    active = L * (attention + C * gate + C * (K + S) * expert) + d
    return total + o["vocab_size"] * d, active + o["vocab_size"] * d


def flops_per_token(options):
    """Of a forward pass, a product and its sum being 2: every active parameter once, and attention
    to half a sequence on average. (The backward pass takes about twice as many.)"""
    o = options
    head = o["qk_nope_head_dim"] + o["qk_rope_head_dim"] + o["v_head_dim"]
    past = o["num_hidden_layers"] * o["num_attention_heads"] * head * o["max_length"] / 2
    return 2 * sizes(options)[1] + 2 * past
