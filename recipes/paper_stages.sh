# Sourced by recipes/paper_*.sh: the six stages with the paper's settings. What a recipe sets (all can also
# be set from outside, as in `RUN=runs/a NUM_PROMPTS=50 bash recipes/paper_llama_saferlhf.sh`):
#   MODEL PROMPTS NUM_PROMPTS PRIMARY SYSTEM_PROB BETA GAMMA_RATIO RUN
# What the paper gives as a search space (Table 5) or not at all stands here; the choice is ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
N=${N:-5}                   # Table 5: 3 or 5
TOKENS=${TOKENS:-2048}      # appendix A
SCORES=${SCORES:-json}      # Figure 9's free text; the kit's default, constrained, always gives a score
RHO=${RHO:-30}              # Table 5: 10, 20, 30, 40 or 50
DELTA=${DELTA:-2}           # Table 5: 2, 3 or 4
ALPHA=${ALPHA:-1}           # Table 5: 1, 2, 3 or 4
RATE=${RATE:-1e-6}          # Table 5: 5e-7, 1e-6, 5e-6 or 1e-5
EPOCHS=${EPOCHS:-1}         # not in the paper
BATCH=${BATCH:-16}          # prompts per optimizer step; not in the paper
DENOISE=${DENOISE:-}        # w/o NF: --no-consistency --no-informativeness
GENERATE=${GENERATE:---config_file configs/ddp.yaml} # 8 GPUs, the model on each
LAUNCH=${LAUNCH:---config_file configs/fsdp.yaml}    # 8 GPUs, one model over all

accelerate launch $GENERATE 01_sample.py --run_dir "$RUN" --model "$MODEL" --prompts "$PROMPTS" --num_prompts "$NUM_PROMPTS" \
  --n "$N" --temperature 1 --max_new_tokens "$TOKENS" --system_prob "$SYSTEM_PROB"
accelerate launch $GENERATE 02_score.py --run_dir "$RUN" --primary "$PRIMARY" --score_mode "$SCORES"
accelerate launch $GENERATE 03_refine.py --run_dir "$RUN" --max_new_tokens "$TOKENS"
python 04_denoise.py --run_dir "$RUN" --rho "$RHO" $DENOISE
python 05_pairs.py --run_dir "$RUN" --delta "$DELTA"
accelerate launch $LAUNCH 06_train.py --run_dir "$RUN" --loss spa --alpha "$ALPHA" --beta "$BETA" \
  --gamma_beta_ratio "$GAMMA_RATIO" --learning_rate "$RATE" --epochs "$EPOCHS" --batch_size "$BATCH" \
  --gradient_checkpointing
