#!/usr/bin/env bash
# Figure 5: a second iteration from the trained model, on the same prompts or on others. ITERATIONS=3 goes one further.
set -euo pipefail
. "$(dirname "$0")/systems.sh"
setting DATASET wildguard saferlhf high_stakes

data "$DATASET"
evaluate Vanilla
LABEL=Iter1 evaluate SPA
for ((I = 2; I <= ${ITERATIONS:-2}; I++)); do
  for KIND in same diff; do evaluate "Iter${I}_$KIND"; done
done
table figure5
python recipes/plot_scores.py --table "$OUT/$JUDGED/figure5/judge_table.csv"
