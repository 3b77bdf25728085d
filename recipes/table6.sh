#!/usr/bin/env bash
# Table 6: do people agree with the judge? A page for blind annotation of each set; once the annotators' exports lie in
# OUT/JUDGED/table6/SET/exports, the same command ends in the agreement.
set -euo pipefail
. "$(dirname "$0")/systems.sh"
SEEDS=${SEEDS%% *}

for NAME in $DATASETS; do
  data "$NAME"
  RUNS=()
  for SYSTEM in SPA Vanilla; do evaluate "$SYSTEM"; done
  STUDY=$OUT/$JUDGED/table6/$DATA
  python eval/annotate.py --runs "${RUNS[@]}" --output_dir "$STUDY"
  mkdir -p "$STUDY/exports"
  if compgen -G "$STUDY/exports/*.json" >/dev/null; then
    python eval/annotate.py --exports "$STUDY"/exports/*.json --key "$STUDY/annotate_key.json" --output_dir "$STUDY"
  else
    echo "send $STUDY/annotate.html to the annotators, and put what they export into $STUDY/exports"
  fi
done
