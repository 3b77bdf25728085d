#!/usr/bin/env bash
# Table 2: is general ability kept? MT-Bench and MMLU of the untouched model and of SPA, trained on each of TRAINED_ON:
#   MTBENCH=question.jsonl REFERENCES=gpt-4.jsonl bash recipes/table2.sh      both are FastChat's, of llm_judge/data
# MMLU is lm-evaluation-harness's: python -m pip install "lm_eval==0.4.13". MMLU=no, or no MTBENCH, leaves one out.
set -euo pipefail
. "$(dirname "$0")/systems.sh"
setting TRAINED_ON "saferlhf wildguard" saferlhf high_stakes
setting MTBENCH_OPTIONS "" "" "--limit 1 --max_new_tokens 32 --judge_max_new_tokens 16"
setting MMLU_OPTIONS "" "" "--limit 1"
RESULTS=$OUT/$JUDGED/table2 SEED=${SEEDS%% *} ANSWERS=()

MODELS=("Vanilla=$MODEL")
for NAME in $TRAINED_ON; do
  data "$NAME"
  train SPA || exit
  MODELS+=("SPA_$DATA=$TRAINED")
done
if [ -n "${MTBENCH:-}" ]; then
  python eval/mtbench.py --models "${MODELS[@]}" --questions "$MTBENCH" ${REFERENCES:+--references "$REFERENCES"} \
    $JUDGE $MTBENCH_OPTIONS --output_dir "$RESULTS"
fi
if [ "${MMLU:-yes}" != no ]; then
  for ONE in "${MODELS[@]}"; do
    FOLDER=$RESULTS/lm_eval${MMLU_OPTIONS// /_}/${ONE%%=*} # cut short is not all of it
    [ "${ONE%%=*}" = Vanilla ] || FOLDER=${FOLDER}_$TAG # another RATE is another model
    ANSWERS+=("${ONE%%=*}=$FOLDER")
    [ -e "$FOLDER" ] || python -m lm_eval run --model hf --model_args "pretrained=${ONE#*=},dtype=float32" --tasks mmlu \
      --num_fewshot 5 $MMLU_OPTIONS --log_samples --output_path "$FOLDER"
  done
  python eval/mmlu_table.py --runs "${ANSWERS[@]}" --output_dir "$RESULTS"
fi
