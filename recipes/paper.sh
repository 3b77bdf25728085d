#!/usr/bin/env bash
# The six stages with the paper's settings, on 8 GPUs of 80 GB:
#   bash recipes/paper.sh llama|mistral saferlhf|wildguard|honeset
#   RUN=runs/a DELTA=4 DENOISE="--consistency off --no-informativeness" bash recipes/paper.sh llama saferlhf
# Each name in capitals can be set from outside. WildGuard is gated (accept its terms on the hub, then `hf auth
# login`); HoneSet is a file of the HonestyLLM repository: HONESET=path/to/HoneSet.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { echo "usage: bash recipes/paper.sh llama|mistral saferlhf|wildguard|honeset" >&2; exit 2; }
[ $# = 2 ] || usage

# Models (section 4), with the beta and gamma/beta of SimPO's recipe for each. The paper names no Mistral version.
case $1 in
  llama) MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct} BETA=${BETA:-2.5} GAMMA_RATIO=${GAMMA_RATIO:-0.55} ;;
  mistral) MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.3} BETA=${BETA:-2.5} GAMMA_RATIO=${GAMMA_RATIO:-0.1} ;;
  *) usage ;;
esac

# Prompts (section 4), their number, and the objectives in order of priority. The alternative system prompt is for
# honesty only (appendix B).
case $2 in
  saferlhf | wildguard) PROMPTS=${PROMPTS:-$2} NUM_PROMPTS=${NUM_PROMPTS:-300}
    OBJECTIVES=${OBJECTIVES:-harmlessness helpfulness} SYSTEM_PROB=${SYSTEM_PROB:-0} ;;
  honeset) PROMPTS=${PROMPTS:-honeset:${HONESET:-HoneSet.json}} NUM_PROMPTS=${NUM_PROMPTS:-400}
    OBJECTIVES=${OBJECTIVES:-honesty helpfulness} SYSTEM_PROB=${SYSTEM_PROB:-0.5} ;;
  *) usage ;;
esac

# What the paper gives as a search space (Table 5) or not at all; the choice is ours.
RUN=${RUN:-runs/$1_$2}
N=${N:-5}                   # Table 5: 3 or 5
TOKENS=${TOKENS:-2048}      # appendix A
SCORES=${SCORES:-json}      # Figure 9's free text; the kit's default, constrained, always gives a score
RHO=${RHO:-30}              # Table 5: 10, 20, 30, 40 or 50
DELTA=${DELTA:-2}           # Table 5: 2, 3 or 4
ALPHA=${ALPHA:-1}           # Table 5: 1, 2, 3 or 4
RATE=${RATE:-1e-6}          # Table 5: 5e-7, 1e-6, 5e-6 or 1e-5
EPOCHS=${EPOCHS:-1}         # not in the paper
BATCH=${BATCH:-16}          # prompts per optimizer step; not in the paper
DENOISE=${DENOISE:-}        # w/o NF: --consistency off --no-informativeness
JUDGE=${JUDGE:-}            # --accept_unfit_judge: train although the judge check of stage 2 says not to
GENERATE=${GENERATE:---config_file configs/ddp.yaml} # 8 GPUs, the model on each
LAUNCH=${LAUNCH:---config_file configs/fsdp.yaml}    # 8 GPUs, one model over all

accelerate launch $GENERATE 01_sample.py --run_dir "$RUN" --model "$MODEL" --prompts "$PROMPTS" \
  --num_prompts "$NUM_PROMPTS" --n "$N" --temperature 1 --max_new_tokens "$TOKENS" --system_prob "$SYSTEM_PROB"
accelerate launch $GENERATE 02_score.py --run_dir "$RUN" --objectives $OBJECTIVES --score_mode "$SCORES"
accelerate launch $GENERATE 03_refine.py --run_dir "$RUN" --max_new_tokens "$TOKENS"
python 04_denoise.py --run_dir "$RUN" --rho "$RHO" $DENOISE
python 05_pairs.py --run_dir "$RUN" --delta "$DELTA"
accelerate launch $LAUNCH 06_train.py --run_dir "$RUN" --loss spa --alpha "$ALPHA" --beta "$BETA" \
  --gamma_beta_ratio "$GAMMA_RATIO" --learning_rate "$RATE" --epochs "$EPOCHS" --batch_size "$BATCH" \
  --gradient_checkpointing $JUDGE
