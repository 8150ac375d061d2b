#!/usr/bin/env bash
# All that can be said about speed on one GPU, in under ten minutes: attention, the stages with the
# paper's model, eager and compiled, memory up to 65,536 pairs, encode and training steps against
# transformers and sentence-transformers. Prints everything, and appends it to docs/gpu.md.
#
#     bash bench/gpu.sh             # needs a GPU, and requirements-dev.txt installed
#     bash bench/gpu.sh --dry-run   # the same with tiny sizes on any machine; only prints
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DATA=${DATA:-out/pydocs} LOG=docs/gpu.md DRY= COMPILE="false true"
[ "${1:-}" = --dry-run ] && DRY=1 LOG=/dev/null COMPILE=false
ERRORS=$(mktemp)
trap 'rm -f "$ERRORS"' EXIT

# run TITLE, sizes for a GPU, sizes for a dry run, script and its options
run() {
    local title=$1 sizes=${DRY:+$3}
    sizes=${sizes:-$2}
    shift 3
    # shellcheck disable=SC2086  # sizes are several words
    set -- "$@" $sizes
    { printf '\n### %s\n\n`python %s`\n\n' "$title" "$*"
      $PYTHON "$@" 2>"$ERRORS" || { tail -5 "$ERRORS" >&2; exit 1; }; } | tee -a "$LOG"
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

run Attention "--tokens=65536" "--tokens=300 --heads=1 --rounds=1" bench/attention.py
for compile in $COMPILE; do
    run "Stage 1, 2,048 tokens" "--batch-size=128 --compile=$compile" "$small --seq-len=64" \
        bench/stages.py --stages=mlm --preset=paper "--data=$DATA"
    run "Stage 2, 16,384 pairs through GradCache" "$pairs --compile=$compile" "$small" \
        bench/stages.py --stages=contrastive --preset=paper "--data=$DATA"
done
run "Memory of a contrastive step" "--preset=paper --batches=1024,4096,16384,65536 --longest=1024" \
    "--batches=8 --source=halves" bench/memory.py "--data=$DATA"
run "encode" "--texts=2000" "--texts=4 --layers=1 --hidden-size=64 --rounds=1" \
    bench/encode.py "--data=$DATA"
run "Training steps" "--preset=paper --texts=1024 --tries=16,64,128 --compile" \
    "--texts=8 --tries=8 --rounds=1" bench/train.py "--data=$DATA"
