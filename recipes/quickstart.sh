#!/usr/bin/env bash
# The whole of SPA on a real instruct model (135M parameters), on two CPU cores, without a model hub: the six stages in
# a row, then greedy answers to all held-out prompts before and after, and one page with everything.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

# A toy's settings. The paper's are the scripts' defaults; see recipes/paper.sh. Each can be set from outside:
# RUN=runs/more PROMPTS=64 bash recipes/quickstart.sh
RUN=${RUN:-runs/quickstart}
MODEL=${MODEL:-models/smollm2-135m}
PROMPTS=${PROMPTS:-40}              # paper: 300 to 400
N=${N:-3}                           # paper: 3 or 5
TEMPERATURE=${TEMPERATURE:-0.7}     # at 1 a model this small rambles; paper: 1
TOKENS=${TOKENS:-64}                # longest answer, and no ending is taught where it was cut; paper: 2048
OBJECTIVES=${OBJECTIVES:-harmlessness helpfulness}
SCORES=${SCORES:-choice}            # Yes or No, the least bad of nine ways with this model; paper: integers
JUDGE=${JUDGE---accept_unfit_judge} # its judge check fails in each of them; with a judge that passes: JUDGE=
PROBES=${PROBES:-data/judge_probes.jsonl}
ATTEMPTS=${ATTEMPTS:-4}             # refinements per prompt, the best stays; paper: 1
# How it refines: the objectives as a system prompt before the plain prompt. Asked in the paper's form (Figure 10, REFINE=) this
# model writes about the task in two texts of three; what is left of such remarks is counted and dropped.
REFINE=${REFINE---template principles --drop_remarks}
DENOISE=${DENOISE:-}                # w/o NF: --consistency off --no-informativeness
DELTA=${DELTA:-0.3}                 # expected scores lie close together; paper: 2 to 4
RATE=${RATE:-5e-5}                  # chosen on the accuracy on its training pairs alone; paper: 5e-7 to 1e-5
EPOCHS=${EPOCHS:-2}
BATCH=${BATCH:-128}                 # responses at a time: on a CPU the more, the faster
TEST_PROMPTS=${TEST_PROMPTS:-36}    # paper: 500

SAMPLING="--max_new_tokens $TOKENS --batch_size $BATCH"
SCORING="--objectives $OBJECTIVES --score_mode $SCORES"

python 01_sample.py --run_dir "$RUN" --model "$MODEL" --num_prompts "$PROMPTS" --n "$N" --temperature "$TEMPERATURE" $SAMPLING
python 02_score.py --run_dir "$RUN" $SCORING --judge_probes "$PROBES" # first of all: can this model judge?
python 03_refine.py --run_dir "$RUN" $REFINE --attempts "$ATTEMPTS" --temperature "$TEMPERATURE" $SAMPLING
python 04_denoise.py --run_dir "$RUN" $DENOISE
python 05_pairs.py --run_dir "$RUN" --delta "$DELTA"
python 06_train.py --run_dir "$RUN" --learning_rate "$RATE" --epochs "$EPOCHS" --batch_size 4 \
  --tokens_per_batch 1024 $JUDGE

# Held-out prompts, greedily, one judge for both. The table says what is better, worse or not to be told apart.
TEST="--split test --num_prompts $TEST_PROMPTS --n 1 --temperature 0 $SAMPLING"
python 01_sample.py --run_dir "$RUN/test_base" --model "$MODEL" $TEST
python 02_score.py --run_dir "$RUN/test_base" $SCORING --no-judge_check
python 01_sample.py --run_dir "$RUN/test_trained" --model "$RUN/06_model" $TEST
python 02_score.py --run_dir "$RUN/test_trained" --judge_model "$MODEL" $SCORING --no-judge_check
TESTS=("base=$RUN/test_base" "trained=$RUN/test_trained")
python eval/judge_table.py --runs "${TESTS[@]}" --output_dir "$RUN/eval"
python eval/report.py --run_dir "$RUN" --test_runs "${TESTS[@]}" # every stage's numbers, prompts and answers: open it
