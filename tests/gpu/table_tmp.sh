set -u
export PYTHONPATH=/tmp/site:pipeline:. PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/ind TRITON_CACHE_DIR=/tmp/tri
t0=$(date +%s); T(){ echo "[$(( $(date +%s)-t0 ))s] $*"; }
W=/tmp/bench
(python3 - <<'P'
from pathlib import Path
from tests.bench.inputs import source
p=Path("/tmp/bench"); p.mkdir(exist_ok=True)
if __name__=="__main__":
    for w,n in (("w1",800),("w1",700),("w2",700),("w2",150)): source(p,w,n)
P
) > $OUT/src.log 2>&1 & S=$!
timeout 100 python3 -m tests.gpu.packed_check 2> $OUT/check.err | tee $OUT/check.txt; tail -3 $OUT/check.err; T checked
wait $S; tail -2 $OUT/src.log; T sources
line(){ timeout $1 python3 -m tests.bench $W --commit $C --out $OUT/$2.json ${@:3} 2> $OUT/$2.err | tail -4 | cut -c1-1500; rc=$?; tail -c 400 $OUT/$2.err | grep -v Writing; T $2; }
line 190 w1 --work w1 --rows 800
grep -q images_per_second $OUT/w1.json || { cat $W/runs/*.log | tail -c 5000; exit 1; }
line 110 w1c --work w1 --rows 700 --cap-gib 24
line 110 w2 --work w2 --rows 700
line 80 w2g --work w2 --rows 150 --engine generate
line 125 w2c --work w2 --rows 700 --cap-gib 24
mkdir -p $OUT/b; for d in $W/runs/*/; do n=$(basename $d); (cat $d/.glm4v-batch/batches.jsonl | cut -c1-900; cat $d/.glm4v-batch/report.json) > $OUT/$n.txt; done; cat $OUT/*.txt > $OUT/all.txt; cat $W/runs/*.log > $OUT/logs.txt; cat $OUT/*.err > $OUT/errs.txt; cat $OUT/w*.json > $OUT/figures.txt; rm -f $OUT/w*.txt $OUT/*.err $OUT/src.log; rmdir $OUT/b
