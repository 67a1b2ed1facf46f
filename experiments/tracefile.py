"""Reads what ./run --trace wrote, and from model.bin what is needed to understand it."""
import codecs
import struct
import sys

from common import ROOT, Failure

sys.path.insert(0, ROOT)
sys.dont_write_bytecode = True          # no folder of Python's beside export.py
import export                           # of which read_header() needs nothing but Python

HEADER = "position\ttoken\tlayer\titeration\trank\texpert\tweight\tmodel"
BYTE_NAMES = {256: "<|beginoftext|>", 257: "<|endoftext|>"}


class Model:
    """The part of a model.bin that says what its experts and its tokens are."""

    def __init__(self, path):
        try:
            with export.open_file(path) as f:
                header = export.read_header(f, path)
                f.seek(header.start + header.files_bytes)
                section = f.read(header.tokenizer_bytes)
        except export.Failure as e:
            raise Failure(str(e))
        c = header.config
        self.path, self.layers, self.shared = path, c.num_hidden_layers, c.n_shared_experts
        self.fingerprint = f"{header.crc or 0:08x}"            # version 1 had no CRC-32
        self.experts, self.chosen = c.n_routed_experts, c.num_experts_per_tok
        self.iterations, self.tokenizer = c.inner_iter, c.tokenizer
        if self.tokenizer == "bpe":
            self.pieces = read_pieces(section, path)

    def piece(self, token):
        """The bytes that a token stands for; its number where the model has no tokenizer."""
        if self.tokenizer == "bpe":
            return self.pieces[token] if token < len(self.pieces) else b""
        if self.tokenizer == "bytes":
            return bytes([token]) if token < 256 else BYTE_NAMES.get(token, "").encode()
        return f"{token} ".encode()


def read_pieces(section, path):
    """What the tokens of a tokenizer section decode to: its first array tells where each begins in
    the second. Every array starts at a multiple of 64."""
    try:
        n, size = struct.unpack_from("<2I", section)
        first = struct.unpack_from(f"<{n + 1}I", section, 64)
    except struct.error:
        raise Failure(f"{path}: the tokenizer section is cut off")
    begin = 64 + (4 * (n + 1) + 63) // 64 * 64
    if begin + size > len(section) or list(first) != sorted(first) or first[n] != size:
        raise Failure(f"{path}: the tokenizer section is damaged")
    return [section[begin + first[i]:begin + first[i + 1]] for i in range(n)]


class Trace:
    """experts[layer][iteration][position] is the tuple of the experts chosen there, largest weight
    first, and weights has the same form. Only layers that choose are in them."""

    def __init__(self, path, model):
        self.path, self.model = path, model
        self.tokens, self.experts, self.weights = [], {}, {}
        E, K, C = model.experts, model.chosen, model.iterations
        with open(path, encoding="utf-8") as f:
            if f.readline().rstrip("\n") != HEADER:
                raise Failure(f"{path}: line 1 must be the header of ./run --trace: "
                              + HEADER.replace("\t", " "))
            for number, line in enumerate(f, 2):
                try:
                    *whole, weight, fingerprint = line.rstrip("\n").split("\t")
                    position, token, layer, iteration, rank, expert = map(int, whole)
                    weight = float(weight)
                except ValueError:
                    raise Failure(f"{path}: line {number} is {line.strip()[:60]!r}, must be six "
                                  "whole numbers, a weight and a model")
                if fingerprint != model.fingerprint:
                    raise Failure(f"{path}: line {number} is of the model {fingerprint[:60]}, "
                                  f"{model.path} is {model.fingerprint}: another model, or it was "
                                  "trained on since")
                if not (0 <= expert < E and 0 <= iteration < C and 0 <= layer < model.layers):
                    raise Failure(f"{path}: line {number} names layer {layer}, iteration "
                                  f"{iteration}, expert {expert}, but {model.path} has "
                                  f"{model.layers}, {C} and {E} of them")
                if position == len(self.tokens):
                    self.tokens.append(token)
                if position != len(self.tokens) - 1 or token != self.tokens[-1]:
                    raise Failure(f"{path}: line {number} has position {position} and token "
                                  f"{token} after position {len(self.tokens) - 1}")
                chosen = self.experts.setdefault(layer, [[] for _ in range(C)])[iteration]
                weights = self.weights.setdefault(layer, [[] for _ in range(C)])[iteration]
                if rank == 0:
                    chosen.append(())
                    weights.append(())
                if len(chosen) != position + 1 or len(chosen[-1]) != rank:
                    raise Failure(f"{path}: line {number} has rank {rank}, which does not follow")
                chosen[-1] += (expert,)
                weights[-1] += (weight,)
        if not self.experts:
            raise Failure(f"{path}: no expert is chosen in it")
        for layer, chains in self.experts.items():
            for c, chain in enumerate(chains):
                if len(chain) != len(self.tokens) or {len(x) for x in chain} != {K}:
                    raise Failure(f"{path}: layer {layer}, iteration {c} is not complete: "
                                  f"{len(self.tokens)} tokens choose {K} experts each")

    def labels(self):
        """A text for each token; together they are the text. Where a character is made of several
        tokens it belongs to the last of them; bytes that make none become U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        last = len(self.tokens) - 1
        return [decoder.decode(self.model.piece(token), i == last)
                for i, token in enumerate(self.tokens)]
