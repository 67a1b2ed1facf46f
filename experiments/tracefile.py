"""Reads what ./run --trace wrote, and from model.bin what is needed to understand it."""
import codecs
import struct

from common import Failure

HEADER = "position\ttoken\tlayer\titeration\trank\texpert\tweight"
BYTE_NAMES = {256: "<|beginoftext|>", 257: "<|endoftext|>"}


class Model:
    """The part of a model.bin that says what its experts and its tokens are."""

    def __init__(self, path):
        with open(path, "rb") as f:
            head = f.read(1024)
            if len(head) < 1024 or head[:8] != b"COE1\1\0\0\0":
                raise Failure(f"{path}: is no model.bin of version 1")
            slots = struct.unpack("<128q", head)
            f.seek(1024 + slots[2])
            section = f.read(slots[3])
        self.path, self.layers, self.shared, self.experts = path, slots[20], slots[22], slots[23]
        self.chosen, self.iterations = slots[24], slots[30]
        self.kind = slots[6]
        if self.kind == 2:
            self.pieces = read_pieces(section, path)
        elif self.kind not in (0, 1):
            raise Failure(f"{path}: tokenizer is {self.kind}, must be 0 (none), 1 (bytes), 2 (bpe)")

    def piece(self, token):
        """The bytes that a token stands for; its number where the model has no tokenizer."""
        if self.kind == 2:
            return self.pieces[token] if token < len(self.pieces) else b""
        if self.kind == 1:
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
                    *whole, weight = line.split("\t")
                    position, token, layer, iteration, rank, expert = map(int, whole)
                    weight = float(weight)
                except ValueError:
                    raise Failure(f"{path}: line {number} is {line.strip()[:60]!r}, must be six "
                                  "whole numbers and a weight")
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
