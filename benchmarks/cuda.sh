#!/usr/bin/env bash
# What only a GPU can show, in about a quarter of an hour, the most important first.
#
#     pip install pytest transformers peft accelerate matplotlib
#     bash benchmarks/cuda.sh
#
# Each part has a time limit and a log of its own under results/cuda; what was done when a part was
# cut off stays. The times of the full jobs are those from the command to the result. Texts and
# weights are those of train_glue_small.py: fetched, or in $AFLORA_DATA and $AFLORA_MODEL.
set -u
cd "$(dirname "$0")/.."
out=results/cuda
mkdir -p "$out"
nvidia-smi > "$out/device.txt"

part() {  # its name, its limit in seconds, its command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s: $*" | tee -a "$out/parts.txt"
}

part tests 150 env CUDA_VISIBLE_DEVICES=0 python -m pytest -q tests/test_graphs.py
part sst2 150 python train_glue_small.py --task sst2 --preset full --out "$out/run-sst2"
part mrpc 60 python train_glue_small.py --task mrpc --preset full --out "$out/run-mrpc"
part step-minilm 100 python benchmarks/step.py --shape minilm --size 64x24 --precision bf16
part step-base 120 python benchmarks/step.py --shape base --size 64x128 --precision bf16
part epoch 120 python benchmarks/epoch.py --rounds 1
nvidia-cuda-mps-control -d  # so that several processes share the GPU better
part results 420 python benchmarks/results.py --preset full --task sst2
echo quit | nvidia-cuda-mps-control
