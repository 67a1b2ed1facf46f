"""What export.py writes, as Hugging Face's transformers sees it: python tests/test_transformers.py

Models that ./train made go through export.py into transformers, which must find every tensor and
compute the same logits and tokens as ./run. Ends in a line `N passed, N failed`. Needs PyTorch and
transformers of requirements-ci.txt, no network. Versions of transformers before 5 lack YaRN's
temperature on the scores (mscale_all_dim) in DeepSeek-V2, so the pinned one is the one to test.
"""
import json, os, shutil, subprocess, sys, tempfile, traceback

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TMP = tempfile.mkdtemp(prefix="test_transformers-")
# Before the import: nothing is fetched, and the modules of a checkpoint are copied to here.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{TMP}/home", "TRANSFORMERS_VERBOSITY": "error",
               "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_WAIT_POLICY": "passive"}
sys.dont_write_bytecode = True

import numpy as np
import torch
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DeepseekV2ForCausalLM,
                          DeepseekV3ForCausalLM)
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
torch.set_num_threads(2)
passed = failed = 0


def check(what, ok, detail=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED: {what}: {str(detail)[-600:]}")


def call(*command):
    """What a program printed: (stdout, stderr). It must end well."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.returncode} {done.stderr}")
    return done.stdout, done.stderr


def export(*args):
    return call(sys.executable, "export.py", *args)[1]


SMALL = """--hidden_size 32 --num_attention_heads 2 --num_hidden_layers 2 --n_routed_experts 8
    --moe_intermediate_size 16 --intermediate_size 48 --kv_lora_rank 16 --qk_nope_head_dim 8
    --qk_rope_head_dim 8 --v_head_dim 8 --max_position_embeddings 64 --initializer_range 0.15
    -x 3 -b 2 -l 16 --learning_rate 0.02""".split()
DEEPSEEK = "--inner_iter 1 --inner_residual false --outer_residual true".split()
YARN = """--rope_scaling.type yarn --rope_scaling.factor 4 --rope_theta 10000
    --rope_scaling.original_max_position_embeddings 16""".split()
IDS = [257, 72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 0, 255, 128, 7, 7]


def train(name, *options):
    """A model of its own, trained a little so that biases and norms are not what they began as."""
    if not os.path.exists(f"{TMP}/text"):
        with open(f"{TMP}/text", "w") as f:
            f.write(call("./train", "--show_data", 20)[0])
    call("./train", "-d", f"{TMP}/text", *SMALL, *options, "-o", f"{TMP}/{name}.bin")
    return f"{TMP}/{name}.bin"


def logits_of(model):
    call("./run", model, "-m", "eval", "--ids", "-i", " ".join(map(str, IDS)),
         "--logits", f"{TMP}/logits")
    return np.fromfile(f"{TMP}/logits", "<f4").reshape(len(IDS), -1)


LIMIT = 1e-5            # of logits: rounding leaves less than a tenth of it


def difference(theirs, ours):
    """The largest, in parts of the largest logit."""
    return abs(theirs - ours).max() / abs(ours).max()


@torch.no_grad()
def their_logits(model):
    return model(torch.tensor([IDS])).logits[0].float().numpy()


# ---- transformers' own DeepSeek-V2 --------------------------------------------------------------

NATIVE = {
    "plain": "",
    "shared gate, untied": "--use_igate false --tie_word_embeddings false",
    "dense first layer": "--first_k_dense_replace 1 --num_hidden_layers 3 --n_shared_experts 2",
    "q_lora_rank, biases": "--q_lora_rank 12 --attention_bias true",
    "groups": "--topk_method group_limited_greedy --n_group 4 --topk_group 2 "
              "--num_experts_per_tok 3 --routed_scaling_factor 2.5",
    "linear": "--rope_scaling.type linear --rope_scaling.factor 3",
    "linear, mscale_all_dim": "--rope_scaling.type linear --rope_scaling.factor 3 "
                              "--rope_scaling.mscale_all_dim 0.9",
    "yarn": [*YARN],
    "yarn, mscale_all_dim": [*YARN, "--rope_scaling.mscale_all_dim", "1"],
    "yarn as DeepSeek-V2-Lite": """--rope_scaling.type yarn --rope_scaling.factor 40
        --rope_theta 10000 --rope_scaling.mscale 0.707 --rope_scaling.mscale_all_dim 0.707
        --q_lora_rank null --first_k_dense_replace 1 --tie_word_embeddings false""",
    "yarn, two temperatures": [*YARN, "--rope_scaling.mscale", "0.5", "--rope_scaling.beta_fast",
                               "4", "--rope_scaling.mscale_all_dim", "1.5"],
}


# DeepSeek-V3, whose correction biases a fast update has moved apart.
SIGMOID = "--scoring_func sigmoid --topk_method noaux_tc --bias_update_speed 0.1 --use_igate false "
NATIVE_3 = {
    "V3": SIGMOID,
    "V3, groups": SIGMOID + "--n_group 4 --topk_group 2 --num_experts_per_tok 3 "
                            "--norm_topk_prob true --routed_scaling_factor 2.5",
    "V3, untied, dense first layer, q_lora_rank": SIGMOID + "--tie_word_embeddings false --n_group 2 "
        "--topk_group 1 --first_k_dense_replace 1 --q_lora_rank 12 --num_hidden_layers 3",
    "V3, one expert, a router of its own": SIGMOID.replace("use_igate false", "use_igate true")
        + "--num_experts_per_tok 1 --norm_topk_prob true --prenorm_chain true --outer_residual false",
    "V3, yarn": [*SIGMOID.split(), *YARN, "--rope_scaling.mscale", "1", "--rope_scaling.mscale_all_dim",
                 "1"],
}


def split(options):
    return options.split() if isinstance(options, str) else options


def test_native():
    compare_native(NATIVE, "deepseek_v2", DeepseekV2ForCausalLM)
    compare_native(NATIVE_3, "deepseek_v3", DeepseekV3ForCausalLM)


def compare_native(models, model_type, kind):
    worst = 0
    for name, options in models.items():
        prenorm = ["--inner_iter", "1"] if "--prenorm_chain" in options else DEEPSEEK
        model, folder = train("native", *prenorm, *split(options)), f"{TMP}/{name}"
        said = export(model, folder, *["--model_type", model_type] * (kind is DeepseekV2ForCausalLM))
        check(f"{name}: no warning", "warning" not in said, said)
        theirs, info = kind.from_pretrained(folder, output_loading_info=True)
        check(f"{name}: every tensor is found and none is left", not any(info.values()), info)
        off = difference(their_logits(theirs), logits_of(model))
        worst = max(worst, off)
        check(f"{name}: logits", off < LIMIT, off)

        ids = torch.tensor([IDS])          # without a mask, what is like the padding is hidden
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                              do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
        ours, _ = call("./run", model, "--ids", "-t", 0, "--ignore-eos", "-n", 24, "-i",
                       " ".join(map(str, IDS)))
        check(f"{name}: greedy tokens", out == [int(x) for x in ours.split()], (out, ours))

        theirs.save_pretrained(f"{TMP}/saved")                 # and what transformers writes
        said = export(f"{TMP}/saved", f"{TMP}/back.bin")
        check(f"{name}: comes back without a warning", "warning" not in said, said)
        export(f"{TMP}/back.bin", f"{TMP}/back", "--model_type", model_type)
        with open(f"{folder}/model.safetensors", "rb") as a, \
                open(f"{TMP}/back/model.safetensors", "rb") as b:
            check(f"{name}: comes back", a.read() == b.read())
        with open(f"{folder}/config.json") as a, open(f"{TMP}/back/config.json") as b:
            a, b = json.load(a), json.load(b)
        check(f"{name}: config comes back", a == b, {k for k in a if a[k] != b.get(k)})
    print(f"logits of transformers' {kind.__name__}, {len(models)} models: off by {worst:.1e}")


def test_bfloat16():
    model = train("b16", *DEEPSEEK, "--torch_dtype", "bfloat16")
    export(model, f"{TMP}/b16", "--model_type", "deepseek_v2")
    theirs = DeepseekV2ForCausalLM.from_pretrained(f"{TMP}/b16")
    check("bfloat16 is loaded as that", theirs.dtype == torch.bfloat16, theirs.dtype)
    export(f"{TMP}/b16", f"{TMP}/b16.bin", "--dtype", "bf16")
    off = difference(their_logits(theirs.float()), logits_of(f"{TMP}/b16.bin"))
    check("bf16 in ./run is the same numbers", off < LIMIT, off)


def test_warnings():
    """What export.py warns of is true: transformers refuses it, or computes something else."""
    for options, warning, refusal in (
            ("--norm_topk_prob true", "norm_topk_prob true", None),
            ("--moe_layer_freq 2 --num_hidden_layers 3", "moe_layer_freq 2", None),
            ("--n_shared_experts null", "n_shared_experts null", "'n_shared_experts'"),
            ("--n_routed_experts null", "n_routed_experts null", "'n_routed_experts'"),
            ("--num_attention_heads 3", "hidden_size no multiple", "not a multiple"),
            ([*YARN, "--rope_scaling.mscale", "0.5"], "rope_scaling.mscale 0.5 with", None),
            ([*YARN, "--rope_scaling.mscale", "0", "--rope_scaling.mscale_all_dim", "0.7"],
             "rope_scaling.mscale 0.0 with mscale_all_dim 0.7", None)):
        model = train("warned", *DEEPSEEK, *split(options))
        said = export(model, f"{TMP}/warned", "--model_type", "deepseek_v2")
        check(f"{warning}: warned", said.count("warning") == 1 and warning in said, said)
        try:
            theirs = DeepseekV2ForCausalLM.from_pretrained(f"{TMP}/warned")
            off = difference(their_logits(theirs), logits_of(model))
            check(f"{warning}: a warning for nothing", not refusal and off > 1e-3, off)
        except Exception as e:
            check(f"{warning}: refused", refusal and refusal in str(e), e)


# ---- a CoE, with the user's own modeling_coe.py --------------------------------------------------

# What stands in for the reference's two files. The config takes the keys that the reference knows
# and nothing else; the model is a tree of parameters under the names of the reference, computed by
# tests/oracle.py from what transformers has read.
CONFIGURATION = '''
from transformers import PretrainedConfig

KEYS = {keys!r}
STANDARD = {{"architectures", "auto_map", "torch_dtype", "dtype", "bos_token_id", "eos_token_id",
            "tie_word_embeddings", "transformers_version", "name_or_path", "_name_or_path"}}


class CoeConfig(PretrainedConfig):
    model_type = "coe_deepseekv2"

    def __init__(self, **values):
        unknown = {{k for k in values if k[0] != "_"}} - set(KEYS) - STANDARD
        if unknown:
            raise TypeError(f"CoeConfig does not know {{unknown}}")
        self.as_read = {{k: v for k, v in values.items() if k in KEYS}}
        super().__init__(**{{k: v for k, v in values.items() if k in STANDARD}})
'''
MODELING = '''
import json, sys
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from .configuration_coe import CoeConfig


def linear(i, o, bias=False):
    return nn.Linear(i, o, bias=bias)


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n))


class SwiGLU(nn.Module):
    def __init__(self, d, f):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d, f), linear(d, f), linear(f, d)


class MoE(nn.Module):
    def __init__(self, c, d, f, upcycled):
        super().__init__()
        E, C, S = c["n_routed_experts"], c["inner_iter"], c["n_shared_experts"]
        self.gate = (nn.ModuleList([linear(d, E) for _ in range(C)]) if c["use_igate"]
                     else linear(d, E))
        self.experts = nn.ModuleList([SwiGLU(d, f) for _ in range(E)])
        if S:
            self.shared_experts = SwiGLU(d, f * S)
        if upcycled:
            self.coe_weights = nn.ParameterList([torch.zeros(d) for _ in range(C - 1)])


class Attention(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        H, R, r, bias = (c[k] for k in ("num_attention_heads", "kv_lora_rank", "q_lora_rank",
                                        "attention_bias"))
        dn, dr, dv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        if r is None:
            self.q_proj = linear(d, H * (dn + dr))
        else:
            self.q_a_proj, self.q_a_layernorm = linear(d, r, bias), Norm(r)
            self.q_b_proj = linear(r, H * (dn + dr))
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = linear(d, R + dr, bias), Norm(R)
        self.kv_b_proj, self.o_proj = linear(R, H * (dn + dv)), linear(H * dv, d, bias)


class Layer(nn.Module):
    def __init__(self, c, l, d, upcycled):
        super().__init__()
        moe = c["n_routed_experts"] and l >= c["first_k_dense_replace"] \\
            and l % c["moe_layer_freq"] == 0
        self.input_layernorm, self.post_attention_layernorm = Norm(d), Norm(d)
        self.self_attn = Attention(c, d)
        self.mlp = (MoE(c, d, c["moe_intermediate_size"], upcycled) if moe
                    else SwiGLU(d, c["intermediate_size"]))


class Body(nn.Module):
    def __init__(self, c, upcycled):
        super().__init__()
        d = c["hidden_size"]
        self.embed_tokens, self.norm = nn.Embedding(c["vocab_size"], d), Norm(d)
        self.layers = nn.ModuleList([Layer(c, l, d, upcycled)
                                     for l in range(c["num_hidden_layers"])])


class CoeForCausalLM(PreTrainedModel):
    config_class = CoeConfig
    _tied_weights_keys = {{"lm_head.weight": "model.embed_tokens.weight"}}

    def __init__(self, config):
        super().__init__(config)
        c = config.as_read
        self.model = Body(c, {upcycled!r})
        self.lm_head = linear(c["hidden_size"], c["vocab_size"])
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        sys.path.insert(0, {here!r})
        oracle = __import__("oracle")
        weights = {{name: w.double() for name, w in self.state_dict().items()}}
        return CausalLMOutput(logits=oracle.forward(self.config.as_read, weights, input_ids)[0])
'''
COE = {
    "coe": "",
    "shared gate, untied": "--use_igate false --tie_word_embeddings false --inner_iter 3",
    "outer": "--inner_residual false --outer_residual true --norm_topk_prob true",
    "q_lora_rank, biases, dense": "--q_lora_rank 12 --attention_bias true "
                                  "--first_k_dense_replace 1 --n_shared_experts null",
    "yarn, groups": [*YARN, *"""--rope_scaling.mscale_all_dim 0.7 --n_group 4 --topk_group 2
        --topk_method group_limited_greedy --bos_token_id null""".split()],
    "linear": "--rope_scaling.type linear --rope_scaling.factor 3 --eos_token_id 5",
    "upcycled": None,
}


def test_coe():
    with open(f"{HERE}/golden/coe/config.json") as f:
        keys = sorted(json.load(f))                            # what the reference knows
    worst = 0
    for n, (name, options) in enumerate(COE.items()):
        folder = f"{TMP}/coe{n}"
        if options is None:
            export(train("c1", *DEEPSEEK), f"{TMP}/up.bin", "--upcycle", 2)
            model = train("upcycled", "--init", f"{TMP}/up.bin", "--seed", 5)
        else:
            model = train("coe", *split(options))
        said = export(model, folder)
        check(f"{name}: no warning", "warning" not in said, said)
        check(f"{name}: files", sorted(os.listdir(folder)) == [
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
        for file, text in (("configuration", CONFIGURATION), ("modeling", MODELING)):
            with open(f"{folder}/{file}_coe.py", "w") as f:
                f.write(text.format(keys=keys, upcycled=options is None, here=HERE))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        missing = set(keys) - config.as_read.keys()
        check(f"{name}: every key is there", not missing, missing)
        theirs, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                            output_loading_info=True)
        check(f"{name}: every tensor is found and none is left", not any(info.values()), info)
        check(f"{name}: is the folder's own class", "coe" in type(theirs).__module__
              and type(theirs).__name__ == "CoeForCausalLM", type(theirs))
        off = difference(their_logits(theirs), logits_of(model))
        worst = max(worst, off)
        check(f"{name}: logits", off < LIMIT, off)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        check(f"{name}: tokenizer", tokenizer("a b").input_ids[-3:] == [97, 32, 98], tokenizer)
    print(f"logits of a CoE with code of its own, {len(COE)} models: off by {worst:.1e}")


# ---- the tokenizer -------------------------------------------------------------------------------

TEXTS = ["a", "Hello, world!\n", " two  spaces\t\r\n", "naïve Zürich – 你好 🙂 \u200d", "\0\x01\x7f",
         "<|endoftext|>", "x<|endoftext|>\n<|beginoftext|>y", "<|endoftext", "é" * 50]


def test_tokenizer():
    for n, options in enumerate(("", "--add_bos_token false", "--bos_token_id 256",
                                 "--bos_token_id null")):
        model, folder = train("tokens", *DEEPSEEK, *split(options)), f"{TMP}/tokens{n}"
        export(model, folder, "--model_type", "deepseek_v2")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        front = [] if n in (1, 3) else [256] if n == 2 else [257]
        check("bos and eos", [tokenizer.bos_token_id, tokenizer.eos_token_id] == [
            [257, 257], [257, 257], [256, 257], [None, 257]][n], tokenizer)
        for text in TEXTS:
            with open(f"{TMP}/text", "w", newline="") as f:
                f.write(text)
            ours = [int(x) for x in call("./run", model, "-m", "tokenize", "-f", f"{TMP}/text")[0]
                    .split()]
            ids = tokenizer(text, add_special_tokens=False).input_ids
            check(f"ids of {text!r}", ids == ours, (ids, ours))
            check(f"BOS before {text!r}", tokenizer(text).input_ids == front + ours)
            check(f"{text!r} comes back", tokenizer.decode(ids) == text, tokenizer.decode(ids))
        tokenizer.save_pretrained(f"{TMP}/saved-tokens")       # what transformers saves is read
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"{TMP}/saved-tokens/{name}", folder)
        export(folder, f"{TMP}/back.bin")
        back = call("./run", f"{TMP}/back.bin", "-m", "tokenize", "-f", f"{TMP}/text")[0]
        check("a saved tokenizer is the same", back.split() == [str(i) for i in ours], back)


def test_generation_defaults():
    """The defaults of the model are those of generate()."""
    for options, expected in (
            ("", (False, None, None)), ("--temperature 0", (False, None, None)),
            ("--temperature 0.5 --top_k 7 --top_p 0.9", (True, 0.5, 7)),
            ("--min_p 0.1", (True, None, None))):
        model = train("g", *DEEPSEEK, *split(options))
        shutil.rmtree(f"{TMP}/g", ignore_errors=True)
        export(model, f"{TMP}/g", "--model_type", "deepseek_v2")
        g = DeepseekV2ForCausalLM.from_pretrained(f"{TMP}/g").generation_config
        found = bool(g.do_sample), g.temperature, g.top_k
        check(f"{options}: generation_config", found == expected and g.eos_token_id == 257
              and g.bos_token_id == 257, g)


def main():
    try:
        for name, test in globals().copy().items():
            if name.startswith("test_"):
                try:
                    test()
                except Exception:                              # go on with the next test
                    check(name, False, traceback.format_exc())
    finally:
        shutil.rmtree(TMP, ignore_errors=True)
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
