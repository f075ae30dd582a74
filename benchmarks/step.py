"""Time of one training step, interleaved in one process: what an adapter costs over no adapter.

    python benchmarks/step.py

floor: the BERT of the companion (MiniLM-L6-H384 shapes, random weights, no dropout) without
adapters, its gradient running through all layers to the embeddings' LayerNorm. Against it AFLoRA
with the FFN's matrices trained, and with everything frozen. Prints medians, quartiles and the
median of the ratios to the floor of the same round: the machine's speed may drift.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aflora  # noqa: E402
import train_glue_small as companion  # noqa: E402

MINILM = dict(hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=6,
              vocab_size=30522, max_position_embeddings=512, type_vocab_size=2,
              layer_norm_eps=1e-12, hidden_dropout_prob=0.0)


def make_step(kind, precision, batch, device):
    """A callable that does one whole training step: forward, backward, score, clip, AdamW."""
    torch.manual_seed(0)
    model = companion.BertClassifier(companion.Bert(MINILM)).to(device)
    freezer = None
    if kind == "floor":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        model.encoder.embedding_norm.requires_grad_(True)
    else:
        live = kind == "aflora live"
        layers = aflora.add_adapters(model, companion.ATTENTION + companion.FFN,
                                     train_matrices=companion.FFN if live else "none",
                                     modules_to_save=["head"])
        if live:
            freezer = aflora.AdaptiveFreezer(layers, 1000, 500, 100)
    dtype = aflora.COMPUTE_TYPES[precision]
    cast = aflora.frozen_weights_in(model, dtype)
    cast.__enter__()  # never left: this model only serves here
    assert model.encoder.layers[0].query.weight.dtype == dtype
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step():
        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
            loss = F.cross_entropy(model(*batch[:3]).float(), batch[3])
        loss.backward()
        if freezer:
            freezer.update()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
    step.cast = cast  # kept alive: collected, it would put the float32 weights back
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds (default: 20)")
    rounds = parser.parse_args().rounds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, "
          f"{rounds} rounds")
    for precision, size, length in (("bf16", 32, 64), ("fp32", 32, 64), ("bf16", 32, 16)):
        ids = torch.randint(1000, 30000, (size, length))
        mask = torch.ones(size, length, dtype=torch.bool)
        batch = [t.to(device) for t in (ids, torch.zeros_like(ids), mask, torch.arange(size) % 2)]
        steps = {kind: make_step(kind, precision, batch, device)
                 for kind in ("floor", "aflora live", "aflora frozen")}
        times = {kind: [] for kind in steps}
        for _ in range(rounds + 3):  # three to warm up
            for kind, step in steps.items():
                began = time.perf_counter()
                step()
                times[kind].append(1000 * (time.perf_counter() - began))
        for kind in steps:
            low, median, high = statistics.quantiles(times[kind][3:], n=4)
            ratio = statistics.median(a / b for a, b in zip(times[kind][3:], times["floor"][3:]))
            print(f"{precision} {size} x {length}  {kind:14} {median:7.1f} ms "
                  f"({low:.1f} to {high:.1f})  {ratio:.2f} x floor")


if __name__ == "__main__":
    main()
