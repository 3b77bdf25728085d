#!/usr/bin/env bash
# A first real result on one card of 24 GB: a model of 1 to 2 billion parameters, an adapter, 96 prompts, and the answers
# to 100 held-out prompts before and after, scored by a larger judge:
#   bash recipes/one_gpu.sh
#   MODEL=ORG/NAME JUDGE="--judge_model ORG/JUDGE" DATASETS=my_prompts.jsonl bash recipes/one_gpu.sh
# All weights take 16 bytes a parameter (calculated): with 1 billion TRAINING=--gradient_checkpointing RATE=1e-6.
# A MODEL that can't judge is refused before training: see the judge check that stage 2 prints.
set -euo pipefail
SCALE=${SCALE:-gpu}
. "$(dirname "$0")/systems.sh"

data "${DATASETS%% *}"
for SYSTEM in Vanilla ${SYSTEMS:-SPA}; do evaluate "$SYSTEM"; done
table one_gpu
