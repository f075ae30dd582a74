#!/usr/bin/env bash
# What only a GPU can show, the most important first. Up to `results` it takes a quarter of an hour on
# an H100; the runs on SST-2 and all tests, which come then, are long.
#
#     pip install pytest transformers peft accelerate matplotlib
#     bash benchmarks/cuda.sh                   all parts, or those that are named: tests sst2 mrpc
#
# Each part has a time limit and a log of its own under results/cuda; what was done when a part was
# cut off stays. The times of the full jobs are those from the command to the result. Texts and
# weights are those of train_glue_small.py: fetched, or in $AFLORA_DATA and $AFLORA_MODEL. The part
# `results` runs what is not in results/full: all of it, if that folder was moved away.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1  # a log has all lines when its part is cut off
out=results/cuda
mkdir -p "$out"
nvidia-smi > "$out/device.txt"
parts=" $* "

wanted() {  # is this part among those that were named, or none named?
  [[ $parts == "  " || $parts == *" $1 "* ]]
}

part() {  # its name, its limit in seconds, its command
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  wanted "$name" || return
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s: $*" | tee -a "$out/parts.txt"
}

full="python3 train_glue_small.py --preset full"
rm -rf runs/cuda-*  # a run that was cut off would stand in the way of its repetition
part tests 120 env CUDA_VISIBLE_DEVICES=0 python3 -m pytest -q tests/test_graphs.py
part sst2 150 $full --task sst2 --out runs/cuda-sst2
part mrpc 60 $full --task mrpc --out runs/cuda-mrpc
for task in sst2 mrpc; do  # they name folders of this machine: shorten these before a commit
  wanted "$task" && cp "runs/cuda-$task/result.json" "$out/$task.json"
done
part diet 150 python3 benchmarks/diet.py
part step-minilm 150 python3 benchmarks/step.py --shape minilm --size 64x24 --precision bf16
part step-base 220 python3 benchmarks/step.py --shape base --size 64x128 --precision bf16 --rounds 8
part epoch 240 python3 benchmarks/epoch.py --rounds 1
wanted results && nvidia-cuda-mps-control -d > "$out/mps.log" 2>&1  # processes share the GPU better
part results 600 python3 benchmarks/results.py --preset full --task mrpc
part results-sst2 1500 python3 benchmarks/results.py --preset full --task sst2
wanted results && echo quit | nvidia-cuda-mps-control >> "$out/mps.log" 2>&1
part all-tests 600 env CUDA_VISIBLE_DEVICES=0 python3 -m pytest -q
