#!/usr/bin/env bash
# Every evaluation script on one finished run, by default the quickstart's (minutes on two CPU cores):
#   bash recipes/evaluate.sh                       RUN=runs/llama_saferlhf MODEL=… bash recipes/evaluate.sh
# BASE and TRAINED are scored test answers of the model before and after. MMLU=1 adds MMLU by lm-evaluation-harness
# (python -m pip install "lm_eval==0.4.13"; it fetches the questions from the hub), MTBENCH=FILE MT-Bench on FastChat's
# question file (REFERENCES: its answers), both cut short for a CPU:
#   MMLU_LIMIT=9999 MTBENCH_LIMIT=10 ANSWER_TOKENS=1024 JUDGE_TOKENS=2048       is all of them
set -euo pipefail
. "$(dirname "$0")/environment.sh"
RUN=${RUN:-runs/quickstart}
BASE=${BASE:-$RUN/test_base}
TRAINED=${TRAINED:-$RUN/test_trained}
OUT=${OUT:-$RUN/eval}
ASKED="choice harmlessness helpfulness" # without a record
MODEL=${MODEL:-models/smollm2-135m} # the model before
if [ -e "$RUN/02_args.json" ]; then # the judge is checked as it scored the run's responses
  ASKED=$(python -c 'import json, sys; a = json.load(open(sys.argv[-1]))["args"]; print(a["score_mode"], *a["objectives"])' \
    "$RUN/02_args.json")
fi
OBJECTIVES=${OBJECTIVES:-${ASKED#* }}
SCORES=${SCORES:-${ASKED%% *}}
JUDGE=${JUDGE:-} # another judge of the run's responses; without one, the same model reading integers
SYSTEMS=("Vanilla=$BASE" "SPA=$TRAINED")
SAME=(--output_dir "$OUT")
CHECK=(--objectives $OBJECTIVES --score_mode "$SCORES")

# Has training on its own scores made it a better judge, or a worse one?
python eval/judge_check.py --model "$MODEL" "${CHECK[@]}" --output_dir "$OUT/judge_check"
python eval/judge_check.py --model "$RUN/06_model" "${CHECK[@]}" --output_dir "$OUT/judge_trained" \
  --against "$OUT/judge_check"
python eval/judge_table.py --runs "${SYSTEMS[@]}" "${SAME[@]}"
python eval/frontier.py --runs "${SYSTEMS[@]}" "${SAME[@]}"
python eval/pairwise.py --runs "${SYSTEMS[@]}" "${SAME[@]}"

mkdir -p "$OUT/judged"
cp "$RUN/01_samples.jsonl" "$RUN/01_args.json" "$OUT/judged"
python 02_score.py --run_dir "$OUT/judged" --objectives $OBJECTIVES --score_mode constrained \
  ${JUDGE:+--judge_model "$JUDGE"}
python eval/rv.py --weak "self=$RUN" --strong "judge=$OUT/judged" "${SAME[@]}"
python eval/reliability.py --runs "self=$RUN" --others "judge=$OUT/judged" "${SAME[@]}"

MODELS=("Vanilla=$MODEL" "SPA=$RUN/06_model")
if [ -n "${MMLU:-}" ]; then
  ANSWERS=()
  for SYSTEM in "${MODELS[@]}"; do # NAME=FOLDER; lm_eval logs each question, so that the difference is paired
    ANSWERS+=("${SYSTEM%%=*}=$OUT/lm_eval/${SYSTEM%%=*}")
    python -m lm_eval run --model hf --model_args "pretrained=${SYSTEM#*=},dtype=float32" --tasks mmlu --num_fewshot 5 \
      --limit "${MMLU_LIMIT:-1}" --log_samples --output_path "$OUT/lm_eval/${SYSTEM%%=*}"
  done
  python eval/mmlu_table.py --runs "${ANSWERS[@]}" "${SAME[@]}"
fi
if [ -n "${MTBENCH:-}" ]; then
  python eval/mtbench.py --models "${MODELS[@]}" --questions "$MTBENCH" ${REFERENCES:+--references "$REFERENCES"} \
    --judge_model "${JUDGE:-$MODEL}" --limit "${MTBENCH_LIMIT:-1}" \
    --max_new_tokens "${ANSWER_TOKENS:-32}" --judge_max_new_tokens "${JUDGE_TOKENS:-16}" "${SAME[@]}"
fi
python eval/annotate.py --runs "${SYSTEMS[@]}" "${SAME[@]}"
python eval/report.py --run_dir "$RUN" --test_runs "${SYSTEMS[@]}"
