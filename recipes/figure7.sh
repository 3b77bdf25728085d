#!/usr/bin/env bash
# Figure 7: the number of training samples; here so many of the prompts that pass the filters, a larger draw keeping the
# smaller one, and last all of them. The paper doesn't say which set or what is counted.
set -euo pipefail
. "$(dirname "$0")/systems.sh"
setting SAMPLES "25 50 100" "8 16 32" "4 8"

data "${DATASETS%% *}"
evaluate Vanilla
for K in $SAMPLES; do evaluate "SPA_$K"; done
evaluate SPA
table figure7
python recipes/plot_scores.py --table "$OUT/$JUDGED/figure7/judge_table.csv" --line
