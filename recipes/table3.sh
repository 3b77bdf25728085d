#!/usr/bin/env bash
# Table 3: SPA against Self-Criticism and Reward Soups, with HH_5, HH_10 and HH_20. The soups as they were published,
# weights between two specialists, are Soup_6_4 …:
#   SYSTEMS="SPA Soup_6_4 Soup_9_1" bash recipes/table3.sh
set -euo pipefail
. "$(dirname "$0")/systems.sh"

data "${DATASETS%% *}"
for SYSTEM in ${SYSTEMS:-SPA Self_Criticism RS_6_4 RS_7_3 RS_8_2 RS_9_1}; do evaluate "$SYSTEM"; done
table table3
