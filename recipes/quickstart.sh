#!/usr/bin/env bash
# The whole of SPA on a real instruct model (135M parameters), on two CPU cores, without a model hub:
# the six stages in a row, then the same answers before and after on prompts that were held out.
set -euo pipefail
. "$(dirname "$0")/environment.sh"

# A toy's settings, chosen by measuring. The paper's are the scripts' defaults; see recipes/paper.sh. Each can be
# set from outside: RUN=runs/more PROMPTS=64 bash recipes/quickstart.sh
RUN=${RUN:-runs/quickstart}
MODEL=${MODEL:-models/smollm2-135m}
PROMPTS=${PROMPTS:-32}              # paper: 300 to 400
N=${N:-3}                           # paper: 3 or 5
TEMPERATURE=${TEMPERATURE:-0.7}     # at 1 a model this small rambles; paper: 1
TOKENS=${TOKENS:-64}                # longest answer; paper: 2048
OBJECTIVES=${OBJECTIVES:-harmlessness helpfulness}
SCORES=${SCORES:-choice}            # Yes or No, the least bad of nine ways with this model; paper: integers
JUDGE=${JUDGE---accept_unfit_judge} # its judge check fails in each of them; with a judge that passes: JUDGE=
PROBES=${PROBES:-data/judge_probes.jsonl}
ATTEMPTS=${ATTEMPTS:-4}             # refinements per prompt, the best stays; paper: 1
DENOISE=${DENOISE:-}                # w/o NF: --consistency off --no-informativeness
DELTA=${DELTA:-0.3}                 # expected scores lie close together; paper: 2 to 4
RATE=${RATE:-1e-5}                  # paper: 5e-7 to 1e-5
EPOCHS=${EPOCHS:-2}
BATCH=${BATCH:-128}                 # responses at a time: on a CPU the more, the faster
TEST_PROMPTS=${TEST_PROMPTS:-10}    # paper: 500

SAMPLING="--n $N --max_new_tokens $TOKENS --temperature $TEMPERATURE --batch_size $BATCH"
REFINING="--attempts $ATTEMPTS --max_new_tokens $TOKENS --temperature $TEMPERATURE --batch_size $BATCH"
SCORING="--objectives $OBJECTIVES --score_mode $SCORES"

# Can this model judge at all? First asked as in the paper; stage 2 checks the way of asking that is used here.
python eval/judge_check.py --model "$MODEL" --objectives $OBJECTIVES --probes "$PROBES" --output_dir "$RUN/judge_paper"

python 01_sample.py --run_dir "$RUN" --model "$MODEL" --num_prompts "$PROMPTS" $SAMPLING
python 02_score.py --run_dir "$RUN" $SCORING --judge_probes "$PROBES"
python 03_refine.py --run_dir "$RUN" $REFINING
python 04_denoise.py --run_dir "$RUN" $DENOISE
python 05_pairs.py --run_dir "$RUN" --delta "$DELTA"
python 06_train.py --run_dir "$RUN" --learning_rate "$RATE" --epochs "$EPOCHS" --batch_size 4 \
  --tokens_per_batch 1024 $JUDGE

# Held-out prompts: the base model's sampled and refined answers, then the trained model's, one judge for all.
TEST="--split test --num_prompts $TEST_PROMPTS $SAMPLING"
python 01_sample.py --run_dir "$RUN/test_base" --model "$MODEL" $TEST
python 02_score.py --run_dir "$RUN/test_base" $SCORING --no-judge_check
python 03_refine.py --run_dir "$RUN/test_base" $REFINING
python 01_sample.py --run_dir "$RUN/test_trained" --model "$RUN/06_model" $TEST
python 02_score.py --run_dir "$RUN/test_trained" --judge_model "$MODEL" $SCORING --no-judge_check
python eval/judge_table.py --runs "base=$RUN/test_base" "refined=$RUN/test_base+refined" "trained=$RUN/test_trained" \
  --output_dir "$RUN/eval"

# Has training on its own scores made it a better judge, or a worse one?
python eval/judge_check.py --model "$RUN/06_model" $SCORING --probes "$PROBES" --output_dir "$RUN/judge_trained" \
  --against "$RUN"
