#!/usr/bin/env bash
# Figure 6: SPA without its noise filters (w/o NF), the same on as many prompts as the filters leave, and with each
# filter alone (the last three ours).
set -euo pipefail
. "$(dirname "$0")/systems.sh"

data "${DATASETS%% *}"
for SYSTEM in Vanilla SPA wo_NF wo_NF_equal only_consistency only_informativeness; do evaluate "$SYSTEM"; done
table figure6
python recipes/plot_scores.py --table "$OUT/$JUDGED/figure6/judge_table.csv"
