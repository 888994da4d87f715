#!/usr/bin/env bash
# Training, sampling and likelihood on an accelerator: float32, TF32 and bfloat16, one step and five
# in a compiled call; prints a Markdown table. It needs this repository and its requirements, no data.
#
#   bash benchmarks/accelerator.sh [FILE]        # the reports, one JSON line each; accelerator.jsonl
#   CONFIG=configs/vp/cifar10_ddpmpp_continuous.py BATCH=64 RUNS=20 bash benchmarks/accelerator.sh
set -euo pipefail
cd "$(dirname "$0")/.."
reports=${1:-accelerator.jsonl}
config=${CONFIG:-configs/ve/cifar10_ncsnpp_continuous.py}
batch=${BATCH:-128}
runs=${RUNS:-7}

measure() {
  python -m benchmarks "$config" --batch_size="$batch" --runs="$runs" --json="$reports" "$@"
}

all=train,forward,sampler,likelihood
measure --parts=$all --set model.matmul_precision=float32 --set training.n_jitted_steps=1
measure --parts=$all --set model.matmul_precision=tensorfloat32 --set training.n_jitted_steps=1
measure --parts=train --set model.matmul_precision=tensorfloat32 --set training.n_jitted_steps=5
measure --parts=$all --set model.dtype=bfloat16 --set training.n_jitted_steps=1
measure --parts=train --set model.dtype=bfloat16 --set training.n_jitted_steps=5
measure --parts=train --set model.dtype=bfloat16 --set training.n_jitted_steps=1 \
  --set model.remat=True --set model.remat_policy=products
python -m benchmarks.summary "$reports"
