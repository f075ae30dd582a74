"""Damages files at random: each is read rightly or refused with AFLoRAError, nothing else.

    python tests/fuzz.py --count 8000

Mutated copies of a .safetensors file, an adapter file, a table of texts and a vocabulary go through
the project's readers. What is accepted is compared with an independent reading: NumPy at the
header's offsets, the undamaged adapter, the csv module, the bytes' lines.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import aflora  # noqa: E402
import tiny  # noqa: E402
from data.text import WordPieceTokenizer, read_table  # noqa: E402
from data.weights import read_weights  # noqa: E402

HEADER = ["sentence", "label"]


# ---------------------------------------------------------------------------------------- damages
def mutate(data, draw):
    """A copy of `data` with one to three random damages."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        # Half of the damages hit the first 4 KB, where headers lie.
        end = len(data) if draw.random() < 0.5 else min(len(data), 4096)
        at = draw.randrange(end + 1)
        size = draw.choice((1, 1, 2, 8, 100))
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
    # As a rank, 10**13 would take more memory than any machine has: that fails at once
    other = [None, -1, 10**13, "x", [], {}, torch.zeros(3), torch.zeros(0), torch.ones(99).int()]
    if torch.is_tensor(value):
        other += [value[:-1], value.double(), torch.cat([value, value]), value.flip(0).clone()]
        other.append(torch.zeros(1).expand(2**40))  # a stride of 0: claims terabytes
    if isinstance(value, list):
        other += [value[:-1], value[::-1], value + value, ["x", *value[1:]], [*value[:-1], "x"]]
    if draw.random() < 0.8:
        where[key] = draw.choice(other)


# -------------------------------------------------------------- readers, and what they are held to
def read_safetensors(path, data, whole):
    with aflora.blame(path):  # as the BERT is loaded
        tensors = read_weights(path)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    assert tensors.keys() == header.keys()
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BF16": "<u2"}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        expected = np.frombuffer(data[start + begin:start + end], kinds[entry["dtype"]])
        found = tensors[name].view(torch.uint16) if entry["dtype"] == "BF16" else tensors[name]
        np.testing.assert_array_equal(found.numpy().view("u1").ravel(), expected.view("u1"))
        assert list(found.shape) == entry["shape"]


def read_adapter(path, data, whole):
    """whole: {name: value} of the model of which the file was saved."""
    model = tiny.Net()
    aflora.load_adapter(model, path)
    told = torch.load(path, weights_only=True)["values"]
    found = model.state_dict()
    for name, value in whole.items():
        if name in told:  # it is what the file says, and only a cast may have come between
            assert torch.equal(found[name], told[name].to(found[name].dtype)), name
        else:  # regrown: nothing but the very start will do
            assert torch.equal(found[name], value), name


def learned(model):
    """{name: a copy of its value} of all that a file of this model's adapters covers."""
    state = model.state_dict()
    return {name: state[name].clone() for name in model.saved_names}


def read_texts(path, data, whole):
    rows = read_table(path, HEADER, label=1)
    lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")[1:]
    expected = []
    for line in lines:
        line = line.rstrip("\r").replace("\r", "\0")  # the csv module would end a row there
        expected.append(next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE)))
    assert [[cell.replace("\r", "\0") for cell in row] for row in rows] == expected
    assert all(row[1] in ("0", "1") for row in rows)


def read_vocabulary(path, data, whole):
    vocab = WordPieceTokenizer(path).vocab
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removesuffix(b"\n").split(b"\n")
    assert vocab == {line.decode(): index for index, line in enumerate(lines)}


READERS = {"model.safetensors": read_safetensors, "adapter.pt": read_adapter,
           "SST-2/train.tsv": read_texts, "vocab.txt": read_vocabulary}


# ----------------------------------------------------------------------------------------- the run
def make_adapter(path):
    """Saves an adapter of which some matrices have left their start. Returns learned()."""
    model, _ = tiny.adapted(train_matrices=["up"])
    start = learned(model)
    tiny.perturb(model)
    for name in ("blocks.0.query.lora_A", "blocks.1.down.lora_B"):  # these are still there
        model.get_parameter(name).data.copy_(start[name])
    aflora.save_adapter(model, path)
    return learned(model)


def write_damaged(path, file, good, draw):
    """Writes a damaged copy of a file, {name: bytes} in `good`, and returns its bytes."""
    path.write_bytes(mutate(good[file], draw))
    if file == "adapter.pt" and draw.random() < 0.7:  # a whole file of damaged content
        path.write_bytes(good[file])
        content = torch.load(path, weights_only=True)
        damage(content, draw)
        torch.save(content, path)
    return path.read_bytes()


def main(count, seed=0):
    """Reads `count` damaged files; returns {kind of file: [read rightly, refused]}."""
    draw = random.Random(seed)
    counts = {file: [0, 0] for file in READERS}
    with tempfile.TemporaryDirectory() as name:
        folder = tiny.make_folder(Path(name))
        whole = make_adapter(folder / "adapter.pt")
        good = {file: (folder / file).read_bytes() for file in READERS}
        for index in range(count):
            file = list(READERS)[index % len(READERS)]
            path = folder / f"damaged{Path(file).suffix}"
            data = write_damaged(path, file, good, draw)
            try:
                READERS[file](path, data, whole)
                counts[file][0] += 1
            except aflora.AFLoRAError:
                counts[file][1] += 1
            except Exception:
                print(f"damaged file {index} (seed {seed}), {file}:", file=sys.stderr)
                raise
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=8000, help="default: 8000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    for file, (read, refused) in main(args.count, args.seed).items():
        print(f"{file}: {read} read rightly, {refused} refused")
