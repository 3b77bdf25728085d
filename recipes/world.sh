#!/usr/bin/env bash
# The controlled world (eval/world.py): bases, prompts, all systems of all questions, tables and figure, on two CPU cores.
#   bash recipes/world.sh            half an hour; the same command goes on where it stopped
#   SMALL=1 bash recipes/world.sh    minutes, one base and one seed: it shows that everything runs, and nothing else
# The rate was chosen before, on SimPO at sigma 0, a base and a seed that are in no table; the result is in world.csv:
#   OUT=runs/world_rate BASES=99 SEEDS=99 QUESTIONS=rate bash recipes/world.sh
set -euo pipefail
. "$(dirname "$0")/environment.sh"

if [ -n "${SMALL:-}" ]; then
  OUT=${OUT:-runs/world_small}
  BASES=${BASES:-0} SEEDS=${SEEDS:-0} STEPS=${STEPS:-250} TRAIN=${TRAIN:-320} TEST=${TEST:-60} SIGMAS=${SIGMAS:-0 1}
  ROUNDS=${ROUNDS:-2} TRAINING=${TRAINING:-8}
fi
OUT=${OUT:-runs/world}
BASES=${BASES:-0 1}
SEEDS=${SEEDS:-0 1 2 3 4}
QUESTIONS=${QUESTIONS:-losses path filters alpha order rounds blind three}
SIGMAS=${SIGMAS:-0 1 2 3}
STEPS=${STEPS:-2500}      # of a base
TRAIN=${TRAIN:-2000}      # prompts a seed, of which the filters keep about 100
TEST=${TEST:-400}         # test prompts with hazards, and a quarter as many without
ROUNDS=${ROUNDS:-4}
TRAINING=${TRAINING:-60}  # optimizer steps of every system
export OMP_NUM_THREADS=1  # two processes, a core each

for BASE in $BASES; do # a base that is there stays
  MADE=$(cat "$OUT/base$BASE/steps.txt" 2>/dev/null || echo "$STEPS")
  [ "$MADE" = "$STEPS" ] || {
    echo "$OUT/base$BASE was made with STEPS=$MADE, not $STEPS: choose another OUT" >&2
    exit 2
  }
done
JOBS=
for BASE in $BASES; do
  [ -e "$OUT/base$BASE/model/tokenizer.json" ] && continue
  { python eval/world.py --make base --seed "$BASE" --steps "$STEPS" --output_dir "$OUT/base$BASE/model" &&
    echo "$STEPS" >"$OUT/base$BASE/steps.txt"; } &
  JOBS="$JOBS $!"
done
for JOB in $JOBS; do wait "$JOB"; done
for SEED in $SEEDS; do
  python eval/world.py --make prompts --seed "$SEED" --train "$((TRAIN * ROUNDS))" --test "$TEST" --output_dir "$OUT"
done

python recipes/world_runs.py --bases $BASES --seeds $SEEDS --questions $QUESTIONS --sigmas $SIGMAS \
  --num_prompts "$TRAIN" --rounds "$ROUNDS" --steps "$TRAINING" --output_dir "$OUT"

# Who finds a blind spot? The judge check of a scorer that sees everything, and of one that is blind to class 2.
for BLIND in "" 2; do
  WORLD_SIGMA=1 WORLD_SEED=0 WORLD_BLIND=$BLIND python eval/judge_check.py --scorer eval/world.py:scores \
    --probes "$OUT/probes.jsonl" --output_dir "$OUT/judge_check$BLIND"
done
python recipes/world_tables.py --output_dir "$OUT"
