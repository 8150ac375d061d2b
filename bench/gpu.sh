#!/usr/bin/env bash
# All that can be said about speed on one GPU, in under ten minutes: attention, the stages with the
# paper's model, eager and compiled, memory to 65,536 pairs, and encode and training steps beside
# transformers and sentence-transformers. What the commands print is added to bench/RESULTS.md.
#
#     bash bench/gpu.sh             # needs a GPU, and what requirements-test.txt installs
#     bash bench/gpu.sh --dry-run   # the same with tiny sizes, on any machine; prints only
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DATA=${DATA:-out/pydocs}
RESULTS=bench/RESULTS.md
DRY=
[ "${1:-}" = --dry-run ] && DRY=1 && RESULTS=/dev/stdout

describe() {
    $PYTHON - <<'END'
import importlib.metadata, platform, time, torch
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
names = ("torch", "transformers", "sentence-transformers", "flash-attn")
def version(name):
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"
print(f"\n## {device}, {time.strftime('%Y-%m-%d')}\n")
print(", ".join(map(version, names)) + f", Python {platform.python_version()}")
END
}

# run TITLE, sizes for a GPU, sizes for a dry run, command: prints the command and what it says
run() {
    local title=$1 sizes=$2
    [ -n "$DRY" ] && sizes=$3
    shift 3
    # shellcheck disable=SC2086
    set -- "$@" "--data=$DATA" $sizes
    [[ "$*" == *bench/attention.py* ]] && set -- "${@/--data=$DATA/--seed=0}"
    printf '\n### %s\n\n```\n$ python %s\n' "$title" "$*" >>"$RESULTS"
    $PYTHON "$@" 2>out/gpu.err >>"$RESULTS" || { tail -5 out/gpu.err >&2; exit 1; }
    printf '```\n' >>"$RESULTS"
}

if [ -z "$DRY" ] && ! $PYTHON -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: there is no GPU here: give --dry-run" >&2
    exit 2
fi
mkdir -p out
[ -f "$DATA/meta.json" ] || $PYTHON data/pydocs.py --out="$DATA"
describe >>"$RESULTS"

small="--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --intermediate-size=64"
small="$small --batch-size=8 --steps=4"
pairs="--batch-size=16384 --steps=8 --query-tokens=64 --document-tokens=256"

run "Attention: agreement and speed" "--tokens=65536" "--tokens=300 --heads=1 --rounds=1" \
    bench/attention.py
for compile in false true; do
    small_run="$small --compile=false"
    run "Stage 1 at 2,048 tokens, compile=$compile" "--batch-size=128 --compile=$compile" \
        "$small_run --seq-len=64" bench/stages.py --stages=mlm --preset=paper
    run "Stage 2, 16,384 pairs through GradCache, compile=$compile" "$pairs --compile=$compile" \
        "$small_run" bench/stages.py --stages=contrastive --preset=paper
    [ -n "$DRY" ] && break
done
run "Memory of a contrastive step" "--preset=paper --batches=1024,4096,16384,65536 --longest=1024" \
    "--batches=8 --source=halves" bench/memory.py
run "Encode, beside sentence-transformers" "--texts=2000" \
    "--texts=4 --layers=1 --hidden-size=64 --rounds=1" bench/encode.py
run "Training steps, beside transformers and sentence-transformers" \
    "--preset=paper --texts=1024 --tries=16,64,128 --compile" "--texts=8 --tries=8 --rounds=1" \
    bench/train.py
