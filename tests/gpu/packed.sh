#!/usr/bin/env bash
# What "the packed engine" shows on GPUs, each call within ten minutes.
# Run from the repository's root with the package's dependencies importable by python3:
#   tests/gpu/packed.sh check OUT WORK   is it right; W1 and W2 on a card held to 24 GiB
#   tests/gpu/packed.sh speed OUT WORK   W1, W2, and W2 through generate()
#   tests/gpu/packed.sh cards OUT WORK   W1 on one card held to 24 GiB and on all of them; a model spread over them
# OUT gets the logs, WORK (40 GB) the full-size random model and its pictures. A first call makes these.
set -euo pipefail
what=${1:?check, speed or cards} out=${2:?a folder for the logs} work=${3:?a folder for model and pictures}
export PYTHONPATH="pipeline:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out" "$work"
cards=$(nvidia-smi -L | wc -l)
# A line that fails or takes too long leaves the others their time.
bench() { # SECONDS NAME OPTION…
  local seconds=$1 name=$2
  timeout "$seconds" python3 -m tests.bench "$work" --out "$out/$name.json" "${@:3}" 2>&1 | tail -n 4 ||
    echo "$name: not as expected, or not within $seconds s"
}
keep_logs() {
  tail -n 60 "$work"/runs/*.run.log > "$out/runs-$what.log" || true
  grep -H "" "$work"/runs/*/.glm4v-batch/batches.jsonl > "$out/batches-$what.txt" || true
}
trap keep_logs EXIT
prepare() { # REQUESTS OF W1, REQUESTS OF W2
  python3 -c "
from pathlib import Path
from tests.bench.inputs import checkpoint, source
folder = Path('$work').absolute()
checkpoint(folder, 'full')
for name, rows in (('w1', $1), ('w2', $2)):
    rows and source(folder, name, rows)
"
}
nvidia-smi --query-gpu=index,name,memory.total,memory.used,power.limit --format=csv,noheader

case $what in
  check)
    prepare 900 600 &
    timeout 200 python3 -m tests.gpu.packed_check 2>&1 | tee "$out/packed_check.log" || echo "packed_check: see above"
    wait
    bench 170 w1-24 --work w1 --rows 900 --cap-gib 24
    bench 190 w2-24 --work w2 --rows 600 --cap-gib 24
    ;;
  speed)
    prepare 1500 1500
    bench 250 w2-generate --work w2 --rows 300 --engine generate
    bench 180 w2 --work w2 --rows 1500
    bench 160 w1 --work w1 --rows 1500
    ;;
  cards)
    prepare 600 0 &
    timeout 150 python3 -m tests.gpu.cross_device 2>&1 | tee "$out/cross_device.log" || echo "cross_device: see above"
    wait
    bench 200 w1-24-one --work w1 --rows 600 --cap-gib 24
    bench 200 w1-24-all --work w1 --rows "$((600 * cards))" --cap-gib 24 --devices "$cards"
    ;;
esac
