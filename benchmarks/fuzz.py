"""Damages files at random: each is read rightly or refused with AFLoRAError, nothing else.

    pip install pytest && python benchmarks/fuzz.py --count 8000

Mutated copies of a .safetensors file, an adapter file, a table of texts and a vocabulary go through
the readers of aflora.py and train_glue_small.py. What is accepted is compared with an independent
reading: NumPy at the header's offsets, the undamaged adapter, the csv module, the bytes' lines.
"""

import argparse
import collections
import csv
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import aflora  # noqa: E402
import test_aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402

HEADER = ["sentence", "label"]


def mutate(data, draw):
    """A copy of `data` with one to three random damages."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        # Half of the damages hit the first 4 KB, where headers lie.
        end = len(data) if draw.random() < 0.5 else min(len(data), 4096)
        at, size = draw.randrange(end + 1), draw.choice((1, 1, 2, 8, 100))
        kind = draw.choice(("bit", "byte", "digit", "delete", "insert", "repeat", "cut"))
        if kind == "bit" and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "byte" and at < len(data):
            data[at] = draw.choice(b"\0\xff\t\n\r\"{}[]:,-0a\x80")
        elif kind == "digit":
            digits = [i for i, byte in enumerate(data[:4096]) if chr(byte).isdigit()]
            if digits:
                data[draw.choice(digits)] = draw.choice(b"0123456789")
        elif kind == "delete":
            del data[at:at + size]
        elif kind == "insert":
            data[at:at] = draw.randbytes(size)
        elif kind == "repeat":
            data[at:at] = data[at:at + size]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def damage(content, draw):
    """Drops one entry of an adapter file's content, or replaces it by something else."""
    parts = [part for part in content.values() if part and isinstance(part, dict)]
    where = draw.choice([content, *parts])
    key = draw.choice(list(where))
    value = where.pop(key)
    other = [None, -1, 10**9, "x", [], {}, torch.zeros(3), torch.zeros(0), torch.ones(2**20).int()]
    if torch.is_tensor(value):
        other += [value[:-1], value.double(), torch.cat([value, value]), value.flip(0).clone()]
        other.append(torch.zeros(1).expand(2**40))  # a stride of 0: claims terabytes
    if draw.random() < 0.8:
        where[key] = draw.choice(other)


def read_safetensors(path, data, _):
    with aflora.blame(path):  # as Bert.load reads it
        tensors = companion.read_weights(path)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys()
    kinds = dict(F32="<f4", F16="<f2", I64="<i8", BF16="<u2")
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        expected = np.frombuffer(data[start + begin:start + end], kinds[entry["dtype"]])
        ours = tensors[name].view(torch.uint16) if entry["dtype"] == "BF16" else tensors[name]
        np.testing.assert_array_equal(ours.numpy().view("u1").ravel(), expected.view("u1"))
        assert list(ours.shape) == entry["shape"]


def read_adapter(path, _, whole):
    model = test_aflora.Net()
    aflora.load_adapter(model, path)
    content = torch.load(path, weights_only=True)
    for name, value in aflora.saved_values(model).items():
        told = content["learned"].get(name, whole[name])  # learned values are what the file says
        assert torch.equal(value, whole[name]) or torch.equal(value.flatten(), told.to(value.dtype))


def read_texts(path, data, _):
    rows = companion.read_table(path, HEADER, label=1)
    lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")[1:]
    expected = [next(csv.reader([line.rstrip("\r").replace("\r", "\0")], delimiter="\t",
                                quoting=csv.QUOTE_NONE)) for line in lines]
    assert [[cell.replace("\r", "\0") for cell in row] for row in rows] == expected
    assert all(row[1] in ("0", "1") for row in rows)


def read_vocabulary(path, data, _):
    vocab = companion.WordPieceTokenizer(path).vocab
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removesuffix(b"\n").split(b"\n")
    assert vocab == {line.decode(): index for index, line in enumerate(lines)}


def main(count, seed=0):
    """Reads `count` damaged files; returns {kind of file: [read rightly, refused]}."""
    draw, counts = random.Random(seed), collections.defaultdict(lambda: [0, 0])
    with tempfile.TemporaryDirectory() as name:
        folder = test_aflora.make_folder(Path(name))
        model, _ = test_aflora.adapted(train_matrices=["up"])
        test_aflora.perturb(model)
        aflora.save_adapter(model, folder / "adapter.pt")
        whole = aflora.saved_values(model)
        readers = {"model.safetensors": read_safetensors, "adapter.pt": read_adapter,
                   "SST-2/train.tsv": read_texts, "vocab.txt": read_vocabulary}
        good = {file: (folder / file).read_bytes() for file in readers}
        for index in range(count):
            file = list(readers)[index % len(readers)]
            data = mutate(good[file], draw)
            path = folder / f"damaged{Path(file).suffix}"
            path.write_bytes(data)
            if file == "adapter.pt" and draw.random() < 0.7:  # a whole file of damaged content
                content = torch.load(folder / file, weights_only=True)
                damage(content, draw)
                torch.save(content, path)
            torch.manual_seed(0)  # the head of Net
            try:
                readers[file](path, data, whole)
                counts[file][0] += 1
            except aflora.AFLoRAError:
                counts[file][1] += 1
            except Exception:
                print(f"damaged file {index} (seed {seed}), {file}:", file=sys.stderr)
                raise
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=8000, help="default: 8000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    for file, (read, refused) in main(args.count, args.seed).items():
        print(f"{file}: {read} read rightly, {refused} refused")
