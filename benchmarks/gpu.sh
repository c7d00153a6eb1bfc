#!/usr/bin/env bash
# Measures everything on a machine with a GPU, in stages that each end inside nine minutes and can be called again:
#
#   benchmarks/gpu.sh check     installs the wheels of $WHEELS without a network, says what is missing, runs tests/gpu,
#                               and measures the rate that the length of training follows from
#   benchmarks/gpu.sh bench     unet and sampling beside their peers, and memory; stands apart from the others
#   benchmarks/gpu.sh data N    takes the piece of CIFAR-10 (parquet files, 64 MiB a transfer) that lies in $IN now
#   benchmarks/gpu.sh train     cifar10_short for seven minutes; the same command goes on
#   benchmarks/gpu.sh score     samples, classifier scores, NLL; the EMA in bf16 in pieces of 15 MiB
#
# check, data, train and score together take less than 28 minutes. Results: $OUT. For a rehearsal without a GPU:
#   REHEARSE=1 EXPERIMENT=digits OVERRIDES="train.batch_size=16 ..." benchmarks/gpu.sh check
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3} OUT=$(realpath -m "${OUT:-gpu-results}") WHEELS=${WHEELS:-wheels} IN=${IN:-cifar10}
EXPERIMENT=${EXPERIMENT:-cifar10_short} DATA=$OUT/cifar10
NEEDED="omegaconf webdataset braceexpand torch_fidelity pydantic pydantic_core annotated_types typing_inspection
    markdown_it mdurl rich argcomplete" # beside torch, torchvision, numpy, pyarrow, pillow, scipy, scikit-learn, psutil
mkdir -p "$OUT"
export PYTHONPATH=$PWD:$OUT/site CUBLAS_WORKSPACE_CONFIG=:4096:8
read -ra overrides <<<"${OVERRIDES:-} cluster.workers=0 cluster.storage=$OUT/runs"
if [ "$EXPERIMENT" = cifar10_short ]; then
    overrides+=("data.path=$DATA" evaluate.features=classifier train.checkpoint_every=1000)
fi

# Run a command for at most nine minutes; it is asked to stop, and leaves a checkpoint.
limit() { timeout -s TERM 540 "$@" 2>&1 | tee -a "$OUT/$stage.log"; }
ddpm() { limit "$PYTHON" -m pipeline "$1" "$EXPERIMENT" "${overrides[@]}" "train.steps=$(cat "$OUT/steps")" "${@:2}"; }

check() {
    for name in $NEEDED; do
        "$PYTHON" -c "import $name" 2>/dev/null || "$PYTHON" -m pip install --quiet --no-index --no-deps \
            --find-links "$WHEELS" --target "$OUT/site" "${name/markdown_it/markdown-it-py}"
    done
    for name in $NEEDED torch torchvision numpy pyarrow PIL scipy sklearn psutil; do
        "$PYTHON" -c "import $name" 2>/dev/null || echo "MISSING: $name for $("$PYTHON" --version)"
    done
    [ -n "${REHEARSE:-}" ] || limit "$PYTHON" -m pytest tests/gpu --noconftest -q
    limit "$PYTHON" -m pipeline doctor "$EXPERIMENT" "${overrides[@]}"
    limit "$PYTHON" - "$OUT/steps" <<'RATE'
import sys, time, torch
from pathlib import Path
from benchmarks.harness import Settings
from benchmarks.subjects import FASTEST, Way, our_train_step

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
batch, steps = (128, 40) if device.type == "cuda" else (2, 2)
way = FASTEST if device.type == "cuda" else Way("bf16")  # as cifar10_short has it
step = our_train_step(Settings(device, quick=True, rounds=1), way, batch)
for _ in range(steps):  # to warm up
    step()
if device.type == "cuda":
    torch.cuda.synchronize()
began = time.perf_counter()
for _ in range(steps):
    step()
if device.type == "cuda":
    torch.cuda.synchronize()
rate = steps / (time.perf_counter() - began)
length = max(4, min(30_000, int(rate * 420) // 1000 * 1000))  # seven minutes
Path(sys.argv[1]).write_text(str(length))
print(f"{rate:.1f} steps/s at batch {batch} in bf16: {length} steps of training, torch {torch.__version__}")
RATE
}

bench() {
    for name in unet sampling memory; do
        limit "$PYTHON" -m benchmarks "$name" --quick --json "$OUT/$name.json"
    done
}

data() {
    mkdir -p "$DATA"
    cp "$IN"/*.parquet "$DATA/" && echo "piece ${1:?which piece? benchmarks/gpu.sh data N}" && ls -l "$DATA"
}

train() { ddpm train; }

score() {
    ddpm run
    "$PYTHON" - "$OUT" <<'HALVE'
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

out = Path(sys.argv[1])
for file in sorted(out.glob("runs/*/train/step_*/ema.safetensors"))[-1:]:
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, out / "ema_bf16.safetensors")
HALVE
    split -b 15M -d "$OUT/ema_bf16.safetensors" "$OUT/ema_bf16.part" && rm "$OUT/ema_bf16.safetensors"
    cp "$OUT"/runs/*/evaluation/*/metrics.json "$OUT"/runs/*/report/report.html "$OUT/"
    du -sh "$OUT"/*
}

stage=${1:-}
case $stage in
check | bench | data | train | score) "$@" ;;
*) sed -n '2,14s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
