#!/usr/bin/env bash
# What "every card busy, none out of memory" shows on a machine with two or four large GPUs.
# Run from the repository's root with the package's dependencies importable by python3:
#   tests/gpu/every_card.sh one OUT WORK       one card each: mixed sizes, a neighbour that takes memory
#   tests/gpu/every_card.sh offload OUT WORK   weights in host memory and on the disk
#   tests/gpu/every_card.sh all OUT WORK       all cards: a 106B plan, replicas, plain transformers, balanced
#   tests/gpu/every_card.sh short OUT WORK     most of it on two cards within nine minutes
#   tests/gpu/every_card.sh rest OUT WORK      a 106B plan, a killed replica, plain transformers at small batches
# The first call makes the model and runs tests.gpu.cross_device beside that.
# OUT gets the logs, WORK (40 GB) the full-size random model and its pictures.
set -euo pipefail
what=${1:?one, offload, all, short or rest} out=${2:?a folder for the logs} work=${3:?a folder for model and pictures}
export PYTHONPATH="pipeline:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out" "$work"
scenario() { timeout "${seconds:-600}" python3 -m tests.gpu.every_card "$@" --model "$work/model" --source "$work/source" --out "$work/runs"; }
cards=$(nvidia-smi -L | wc -l)
keep_logs() {
  for log in "$work"/runs/*.log; do echo "== $log"; tail -n 40 "$log"; done > "$out/runs-$what.log" || true
  for lines in "$work"/runs/*/.glm4v-batch/batches.jsonl; do
    cp "$lines" "$out/batches-$(basename "$(dirname "$(dirname "$lines")")").jsonl" || true
  done
}
trap keep_logs EXIT
nvidia-smi --query-gpu=index,name,memory.total,memory.used --format=csv,noheader

if [[ ! -e $work/made ]]; then
  python3 -m tests.gpu.full_size source "$work/source" --rows "${rows:-1600}" &
  python3 -m tests.gpu.cross_device > "$out/cross_device.log" 2>&1 &
  cross=$!
  time python3 -m tests.gpu.full_size model "$work/model"
  wait "$cross" || echo "cross_device failed"
  wait
  cat "$out/cross_device.log"
  touch "$work/made"
fi

case $what in
  one)
    scenario one-card --card 0 --rows 320 > "$out/one_card.log" 2>&1 &
    scenario neighbour --card 1 --rows 240 > "$out/neighbour.log" 2>&1 &
    wait
    cat "$out/one_card.log" "$out/neighbour.log"
    ;;
  offload)
    scenario offload --card 0
    ;;
  short)
    seconds=175 scenario neighbour --card 1 --rows 160 > "$out/neighbour.log" 2>&1 &
    seconds=90 scenario offload --card 0 || true
    wait
    cat "$out/neighbour.log"
    python3 -m tests.gpu.plan_large "$work/large" || true
    seconds=190 scenario four-replicas --cards "$cards" --rows 120 || true
    seconds=100 scenario balanced --cards "$cards" --cap-gib "$((cards == 4 ? 12 : 16))" --rows 160 || true
    seconds=80 scenario plain-auto --cards "$cards" --rows 96 --sizes 64 48 32 24 || true
    ;;
  rest)
    python3 -m tests.gpu.plan_large "$work/large" || true
    seconds=110 scenario killed --cards "$cards" --rows 140 || true
    tail -n 12 "$work/runs/killed.log"
    seconds=100 scenario plain-auto --cards "$cards" --rows 96 --sizes 16 8 2>&1 | grep -v Loading || true
    ;;
  all)
    [[ -e $work/large ]] || python3 -m tests.gpu.plan_large "$work/large"
    scenario four-replicas --cards "$cards" --rows 200
    scenario plain-auto --cards "$cards" --rows 96 --sizes 64 48 32 24 16 8
    scenario balanced --cards "$cards" --cap-gib "$((cards == 4 ? 12 : 16))" --rows 240
    ;;
esac
