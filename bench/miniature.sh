#!/usr/bin/env bash
# The paper in miniature, on real public text: what does each stage add? One command from text to
# table: tokenizer, masked words, weak pairs, hard negatives, evaluation. It writes
# bench/MINIATURE.md row by row, and goes on where it was interrupted.
#
#     bash bench/miniature.sh SOURCES --dry-run            # tokens, operations, minutes: first
#     bash bench/miniature.sh SOURCES --seeds=2            # one GPU, the gpu presets
#     bash bench/miniature.sh SOURCES --size=laptop        # two cores, about 90 minutes
#     bash bench/miniature.sh SOURCES --size=tiny --out=out/tiny --report=out/tiny/REPORT.md
#
# It needs what requirements-extra.txt installs. The data is tokenised first, to out/miniature/data,
# on any machine (python bench/miniature_data.py SOURCES); with that folder and SOURCES a machine
# with a GPU trains at once.
#
# SOURCES is a folder of public data in this form; bench/miniature_data.py says what becomes of it:
#
#     text/wikipedia.jsonl.gz                              {"title", "text"}
#     pairs/{arxiv,medquad,stackexchange,tldr,questions_wiki}.jsonl.gz
#                                                          {"query", "document"}; medquad: "topic"
#     folders/{peps,swift-evolution}.tar.gz                reStructuredText, Markdown
#     retrieval/{scifact-train,questions-amazon,qmsum-trainval}/       the BEIR layout, split dev
#     sts/stsb-en-dev.csv.gz                               sentence, sentence, score
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/miniature.py" "$@"
