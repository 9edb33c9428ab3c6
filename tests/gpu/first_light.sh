#!/usr/bin/env bash
# What "First light" shows on a GPU: the sample job, then a batch size search on a full-size model.
# Run from the repository's root with the package's dependencies importable by python3.
set -euo pipefail
out=${1:?a folder for the outputs}
export PYTHONPATH="pipeline:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
run() { python3 -m glm4v_batch.cli "$@"; }
nvidia-smi --query-gpu=name,memory.total,memory.used --format=csv,noheader

for job in caption question; do
  run plan "jobs/$job.yaml" --set "output.path=$out/$job"
  run run "jobs/$job.yaml" --set "output.path=$out/$job"
  run run "jobs/$job.yaml" --set "output.path=$out/$job"
  run status "$out/$job"
done
python3 - "$out" <<'PY'
import sys
import pyarrow.parquet as pq
for job, column in (("caption", "caption"), ("question", "answer")):
    rows = pq.read_table(f"{sys.argv[1]}/{job}").to_pylist()
    print(job, sum(row["text"] == row[column] for row in rows), "of", len(rows), "exact")
PY

python3 -m tests.gpu.batch_size_search --cap-gib 24 --requests 200
python3 -m tests.gpu.batch_size_search --requests 400
