#!/usr/bin/env bash
# Figure 3: how alike a weak model's scores and JUDGE's are, as prompts are added by rising det Σ of the weak one.
set -euo pipefail
[ "${SCALE:-paper}" != paper ] || MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.3}
# at SCALE=small JUDGE is MODEL: asked in the same way it would be compared with itself
[ "${SCALE:-paper}" != small ] || : "${JUDGING=--score_mode expected}"
. "$(dirname "$0")/systems.sh"
setting DATASET wildguard saferlhf high_stakes
setting RV_PROMPTS 400 96 30

data "$DATASET"
SEED=${SEEDS%% *}
system SPA
WEAK=$FOLDER/figure3_n$N-$SEED
run 01_sample.py --run_dir "$WEAK" --model "$MODEL" --prompts "$SOURCE" --num_prompts "$RV_PROMPTS" --seed "$SEED" \
  --max_new_tokens "$TOKENS" $SAMPLE $ENGINE
run 02_score.py --run_dir "$WEAK" $SCORE --no-judge_check $ENGINE
mkdir -p "$WEAK/$JUDGED"
cp "$WEAK/01_samples.jsonl" "$WEAK/01_args.json" "$WEAK/$JUDGED"
run 02_score.py --run_dir "$WEAK/$JUDGED" --objectives $GOALS $JUDGE $JUDGING --no-judge_check
python eval/rv.py --weak "$WEAK" --strong "$WEAK/$JUDGED" --output_dir "$OUT/$JUDGED/figure3"
