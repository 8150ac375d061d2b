#!/usr/bin/env bash
# What one GPU does, in minutes and as Markdown: the stages with two models, encode and training
# steps against other libraries, memory of large batches.
#
#     bash bench/gpu.sh | tee gpu.md       # needs a GPU, and requirements-dev.txt installed
#     bash bench/gpu.sh --dry-run          # the same with tiny sizes, on any machine
#
# A command that fails is reported, and the next one runs.
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python} DATA=--data=${DATA:-out/pydocs} DRY=${1:-} FAILED=0

# run TITLE, sizes for a GPU, sizes for a dry run, script and its options
run() {
    local sizes=${DRY:+$3}
    local command="${*:4} ${sizes:-$2}"
    printf '\n### %s\n\n`python %s`\n\n' "$1" "$command"
    # shellcheck disable=SC2086  # the command is several words
    $PYTHON $command || { printf '\nThis command failed.\n'; FAILED=1; }
}

if [ -z "$DRY" ] && ! $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: there is no GPU here: give --dry-run" >&2
    exit 2
fi
small="--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --intermediate-size=64"
small="$small --batch-size=8 --steps=4 --compile=false"
pairs="--batch-size=16384 --steps=8 --query-tokens=64 --document-tokens=256"
stages="bench/stages.py $DATA"

run "Tests" "" "" -m pytest -q -k gpu tests/test_model.py
run "Stage 1, 12 layers of 768, 2,048 tokens" "--batch-size=128" "$small --seq-len=64" \
    $stages --stages=mlm --preset=paper
run "Stage 2, the same model, 16,384 pairs through GradCache" "$pairs" "$small" \
    $stages --stages=contrastive --preset=paper
run "Stages 1 and 2, 6 layers of 512" "" "$small" $stages --stages=mlm,contrastive --preset=gpu
run "encode" "--texts=500" "--texts=4 --layers=1 --hidden-size=64 --rounds=1" bench/encode.py $DATA
run "Training steps" "--preset=paper --texts=512" "--texts=8 --tries=8 --rounds=1" \
    bench/train.py $DATA
run "Memory of a contrastive step" "--preset=paper --batches=1024,16384 --longest=1024" \
    "--batches=8" bench/memory.py
exit $FAILED
