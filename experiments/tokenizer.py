#!/usr/bin/env python3
"""Trains a tokenizer on a text and puts it into a model file, from which ./train takes it:

    build/python/bin/pip install -r tests/requirements.txt tokenizers==0.23.3
    build/python/bin/python experiments/tokenizer.py text.txt tokenizer.bin --vocab_size 2048
    ./train --tokenizer tokenizer.bin -d text.txt ...

It is a byte-level BPE of Hugging Face's library, as GPT-2's, but that each digit is a token of its
own, so that numbers of any length are written in the same way. Documents are separated by a line
<|endoftext|>. The model in the file is as small as can be, and knows nothing.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import ROOT, Failure, command_line
from tracefile import export as model_files

BOS, EOS = "<|beginoftext|>", "<|endoftext|>"
SMALLEST = {
    "model_type": "coe_deepseekv2", "hidden_size": 2, "intermediate_size": 1,
    "moe_intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "n_routed_experts": None, "kv_lora_rank": 1, "q_lora_rank": None,
    "qk_rope_head_dim": 2, "qk_nope_head_dim": 1, "v_head_dim": 1, "inner_iter": 1,
    "max_position_embeddings": 2, "tie_word_embeddings": True,
    "use_igate": True, "inner_residual": True, "outer_residual": False,
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "seq_aux": False}


def train(text, vocab_size):
    """A tokenizer whose last two ids are BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text.split(EOS + "\n"), trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def export(*args):
    """Runs export.py, which says itself what is wrong."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "export.py"), *args],
                          stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure(done.stderr.strip())


def main():
    p = argparse.ArgumentParser(description="trains a tokenizer for ./train --tokenizer")
    p.add_argument("text", metavar="TEXT", help="UTF-8")
    p.add_argument("output", metavar="OUTPUT", help="the model file to write")
    p.add_argument("--vocab_size", type=int, default=2048, help="tokens, 258 or more (2048)")
    args = p.parse_args()
    if args.vocab_size < 258:
        p.error(f"--vocab_size is {args.vocab_size}, must be 258 or more: all bytes, BOS and EOS")
    if model_files.same_file(args.text, args.output):
        p.error(f"{args.output} is TEXT, too, OUTPUT must be a file of its own")
    try:
        with open(args.text, encoding="utf-8", newline="") as f:
            text = f.read()
    except UnicodeDecodeError as e:
        raise Failure(f"{args.text}: {e}, must be UTF-8") from e
    tokenizer = train(text, args.vocab_size)
    size = tokenizer.get_vocab_size()
    ids = {key: tokenizer.token_to_id(token) for key, token in
           (("bos_token_id", BOS), ("eos_token_id", EOS))}
    with tempfile.TemporaryDirectory() as folder:
        here = lambda name: os.path.join(folder, name)
        with open(here("config.json"), "w", encoding="utf-8") as f:
            json.dump(SMALLEST | ids | {"vocab_size": size}, f)
        export(here("config.json"), here("fresh.bin"), "--init", "1")
        export(here("fresh.bin"), here("checkpoint"))
        tokenizer.save(here("checkpoint/tokenizer.json"))
        with open(here("checkpoint/tokenizer_config.json"), "w", encoding="utf-8") as f:
            json.dump({"bos_token": BOS, "eos_token": EOS}, f)
        export(here("checkpoint"), args.output)
    tokens = len(tokenizer.encode(text).ids)
    print(f"{args.output}: {size} tokens, {len(text.encode()) / tokens:.2f} bytes of "
          f"{args.text} each")


if __name__ == "__main__":
    command_line(main)
