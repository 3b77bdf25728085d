#!/usr/bin/env bash
# Table 1: SPA, its losses, SFT and the untouched model on three sets. One MODEL a call:
#   JUDGE="--judge_model gpt-4o --judge_endpoint URL" bash recipes/table1.sh
# Table 7 is the same with another judge; nothing is trained or answered again:
#   JUDGED=claude JUDGE="--judge_model NAME --judge_endpoint URL" bash recipes/table1.sh
set -euo pipefail
. "$(dirname "$0")/systems.sh"

for NAME in $DATASETS; do
  data "$NAME"
  for SYSTEM in Vanilla SFT SPA_DPO SPA_SimPO SPA; do evaluate "$SYSTEM"; done
done
table table1
