#!/usr/bin/env bash
# Table 5: the search space, α × δ × learning rate, then ρ and n one at a time. Each model answers validation prompts,
# which no training and no test has, and JUDGE's HH_10 chooses (ours; the paper says neither). The loss can't: α changes
# its weights. What is chosen is passed on: ALPHA=2 DELTA=3 RATE=5e-6 bash recipes/table1.sh
#   ALPHAS="1 2" DELTAS=2 RATES=1e-6 RHOS= NS= VALIDATION=100 bash recipes/table5.sh
set -euo pipefail
. "$(dirname "$0")/systems.sh"
setting ALPHAS "1 2 3 4" "1 2 3 4" "1 2"
setting DELTAS "2 3 4" "2 3 4" "0.3 0.6"
setting RATES "5e-7 1e-6 5e-6 1e-5" "5e-6 1e-5 5e-5" "1e-5 5e-5" # LoRA wants ten times as much
setting RHOS "10 20 30 40 50" "10 20 30 40 50" ""
setting NS "3 5" "3 5" ""
WHICH=validation

try() { LABEL=a${ALPHA}_d${DELTA}_r${RATE}_rho${RHO}_n$N evaluate SPA; }

data "${DATASETS%% *}"
evaluate Vanilla
for D in $DELTAS; do
  for A in $ALPHAS; do
    for R in $RATES; do ALPHA=$A DELTA=$D RATE=$R try; done
  done
done
for X in $RHOS; do [ "$X" = "$RHO" ] || RHO=$X try; done
for X in $NS; do [ "$X" = "$N" ] || N=$X try; done
table table5
echo "by HH_10 on the validation prompts, best first (bold in the table: better than every other, with its interval):"
awk -F, '$3 == "HH10" { print $7, $2 }' "$OUT/$JUDGED/table5/judge_table.csv" | sort -rn | head -n 5
