#!/usr/bin/env bash
# What can be said on one GPU (the first five commands take four minutes): attention against
# float64, the stages with two models, eager and compiled, memory of large batches, encode and
# training steps against transformers and sentence-transformers. Prints everything, and appends it to
# docs/gpu.md.
#
#     bash bench/gpu.sh                    # needs a GPU, and requirements-dev.txt installed
#     bash bench/gpu.sh --dry-run          # the same with tiny sizes on any machine; only prints
#
# A command that fails is reported, and the next one runs.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-out/pydocs} LOG=${LOG:-docs/gpu.md} DRY= FAILED=0
[ "${1:-}" = --dry-run ] && DRY=1 LOG=/dev/null
ERRORS=$(mktemp)
trap 'rm -f "$ERRORS"' EXIT

# run TITLE, sizes for a GPU, sizes for a dry run, script and its options
run() {
    local title=$1 sizes=${DRY:+$3} began=$SECONDS
    sizes=${sizes:-$2}
    shift 3
    # shellcheck disable=SC2086  # sizes are several words
    set -- "$@" $sizes
    { printf '\n### %s\n\n`python %s`\n\n' "$title" "$*"
      $PYTHON "$@" 2>"$ERRORS" || { printf '\nThis command failed.\n'; false; }
    } | tee -a "$LOG" || { FAILED=1; tail -5 "$ERRORS" >&2; }
    echo "($((SECONDS - began)) s)" >&2
}

if [ -z "$DRY" ] && ! $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "gpu.sh: there is no GPU here: give --dry-run" >&2
    exit 2
fi
[ -f "$DATA/meta.json" ] || $PYTHON data/pydocs.py --out="$DATA"
printf '\n## %s\n' "$(date +%F)" | tee -a "$LOG"
small="--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --intermediate-size=64"
small="$small --batch-size=8 --steps=4 --compile=false"
pairs="--batch-size=16384 --steps=8 --query-tokens=64 --document-tokens=256"

run "Tests" "" "" -m pytest -q -k "on_a_gpu or for_the_gpu" tests/test_model.py
run "Attention" "--tokens=65536" "--tokens=300 --heads=1 --rounds=1" bench/attention.py
run "Stage 1, 12 layers of 768, 2,048 tokens" "--batch-size=128" "$small --seq-len=64" \
    bench/stages.py --stages=mlm --preset=paper "--data=$DATA"
run "Stage 2, the same model, 16,384 pairs through GradCache" "$pairs" "$small" \
    bench/stages.py --stages=contrastive --preset=paper "--data=$DATA"
run "Stages 1 and 2, 6 layers of 512" "" "$small" \
    bench/stages.py --stages=mlm,contrastive --preset=gpu "--data=$DATA"
run "The same, not compiled" "--compile=false" "$small" \
    bench/stages.py --stages=mlm,contrastive --preset=gpu "--data=$DATA"
run "encode" "--texts=500" "--texts=4 --layers=1 --hidden-size=64 --rounds=1" \
    bench/encode.py "--data=$DATA"
run "Training steps" "--preset=paper --texts=512 --tries=8,32 --compile" \
    "--texts=8 --tries=8 --rounds=1" bench/train.py "--data=$DATA"
run "Memory of a contrastive step" "--preset=paper --batches=1024,16384 --longest=1024" \
    "--batches=8 --source=halves" bench/memory.py "--data=$DATA"
exit $FAILED
