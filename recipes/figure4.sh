#!/usr/bin/env bash
# Figure 4: win, tie or lose of SPA against the untouched model on every objective, in both orders. One seed, the first.
set -euo pipefail
. "$(dirname "$0")/systems.sh"
SEEDS=${SEEDS%% *}

for NAME in $DATASETS; do
  data "$NAME"
  RUNS=()
  for SYSTEM in Vanilla ${SYSTEMS:-SPA}; do evaluate "$SYSTEM"; done
  # not JUDGING, whose `choice` can't compare two answers
  python eval/pairwise.py --runs "${RUNS[@]}" $JUDGE --output_dir "$OUT/$JUDGED/figure4/$DATA"
done
