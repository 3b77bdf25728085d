# Sourced, not run: what table1.sh … figure7.sh share. One block of settings, the paper's systems as options of the six
# stages, and a few functions. Each setting can come from outside; the same command again goes on where it stopped:
#   SCALE=small bash recipes/table1.sh              the embedded model of 135M parameters, two cores
#   SCALE=gpu bash recipes/table1.sh                1 to 2 billion parameters, LoRA, one card of 24 GB
#   MODEL=ORG/NAME SEEDS="0 1 2" JUDGE="--judge_model ORG/JUDGE" bash recipes/table1.sh
# In OUT: answers of the untouched model; in OUT/DATA: pool… (stages 1 to 3, once for all systems of a seed), a folder
# for each set of pairs (4, 5), and in that 06_SYSTEM…, a model, and answers_SYSTEM…; in OUT/JUDGED: tables, figures.
SCALE=${SCALE:-paper}
case $SCALE in paper | gpu | small) ;; *) echo "SCALE=$SCALE: paper, gpu or small is wanted" >&2; exit 2 ;; esac
if [ "$SCALE" = small ] && [ -z "${MODEL:-}" ]; then
  . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
else
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
fi

setting() { # setting NAME PAPER GPU SMALL: the value of this scale, unless one came from outside
  local value=$2
  [ "$SCALE" != gpu ] || value=$3
  [ "$SCALE" != small ] || value=$4
  [ -n "${!1+set}" ] || printf -v "$1" %s "$value"
}
#       name            paper                             one GPU                     small
setting MODEL           meta-llama/Llama-3.1-8B-Instruct  Qwen/Qwen2.5-1.5B-Instruct  models/smollm2-135m
setting DATASETS        "saferlhf wildguard honeset"      saferlhf                    high_stakes
setting TRANSFER        "jailbreaktrigger wildguard"      high_stakes                 honesty # not trained on
setting SEEDS           0                                 0                           "0 1 2"
setting PROMPTS         300                               96                          30 # trained on; appendix A
setting HONEST_PROMPTS  400                               96                          20 # the same of HoneSet
setting TEST_PROMPTS    500                               100                         36 # appendix A
setting VALIDATION      30                                30                          12 # see `ask` (ours)
setting N               5                                 5                           3 # Table 5: 3 or 5
setting TEMPERATURE     1                                 1                           0.7 # appendix A
setting TOKENS          2048                              512                         64 # appendix A
setting SCORING         "--score_mode json"               "--score_mode constrained"  "--score_mode choice"
setting CRITIC          "--score_mode json"               "--score_mode constrained"  "--score_mode expected"
setting RHO             30                                30                          30 # Table 5: 10 to 50
setting DELTA           2                                 2                           0.3 # Table 5: 2, 3 or 4
setting ALPHA           1                                 1                           1 # Table 5: 1, 2, 3 or 4
setting RATE            1e-6                              1e-5                        5e-5 # Table 5: 5e-7 to 1e-5
setting EPOCHS          1                                 1                           2 # not in the paper
setting BATCH           16                                16                          4 # not in the paper
setting BETA            2.5                               2.0                         2.0 # SimPO's, as the next
case $MODEL in *[Mm]istral*) RATIO=0.1 ;; *) RATIO=0.55 ;; esac
setting GAMMA_RATIO     $RATIO                            0.25                        0.25
setting JUDGING         "--score_mode json"               "--score_mode constrained"  "--score_mode choice"
setting ENGINE          ""                                ""                          "--batch_size 128" # of MODEL
setting LOCAL           ""                                ""                          "--batch_size 128" # of others
CARDS=configs/ddp.yaml LORA="--lora_rank 64 --base_dtype bfloat16 --gradient_checkpointing"
setting GENERATE        "accelerate launch --config_file $CARDS"              python  python
setting TRAIN           "accelerate launch --config_file configs/fsdp.yaml"   python  python
setting TRAINING        --gradient_checkpointing "$LORA" "--tokens_per_batch 1024 --accept_unfit_judge"
setting REFINING        "" "" "--template principles --attempts 4 --temperature 0.7 --drop_remarks"
setting JUDGE           "" "--judge_model Qwen/Qwen2.5-7B-Instruct" "--judge_model $MODEL"
JUDGED=${JUDGED:-judged} # a name for JUDGE, so that two of them stand side by side
HONESET=${HONESET:-HoneSet.json} JAILBREAK=${JAILBREAK:-jailbreak_trigger.json} # files of HonestyLLM and TrustLLM
PROBES=${PROBES:-data/judge_probes.jsonl}
OBJECTIVES=${OBJECTIVES:-} # of every set; default: the paper's for each
OUT=${OUT:-runs/$SCALE/${MODEL##*/}}
SIMPO="--beta $BETA --gamma_beta_ratio $GAMMA_RATIO"
WHICH=test RUNS=() STARTED=
if [ -z "$JUDGE" ]; then
  echo 'JUDGE is not set: who scores the answers? The paper has GPT-4o: JUDGE="--judge_model gpt-4o --judge_endpoint' \
    'URL" and its key as SPA_JUDGE_API_KEY; or a local model: JUDGE="--judge_model ORG/NAME"' >&2
  exit 2
fi

data() { # data NAME: the prompts of a set, how many are trained on, its objectives in order of priority
  SET=$1 COUNT=$PROMPTS GOALS=${OBJECTIVES:-harmlessness helpfulness} SYSTEM_PROB=0
  DATA=${1##*/} DATA=${DATA%.*}
  FOLDER=$OUT/$DATA
  case $1 in
    saferlhf | wildguard) SOURCE=$1 ;;
    honeset) SOURCE=honeset:$HONESET ;;
    jailbreaktrigger) SOURCE=jailbreaktrigger:$JAILBREAK ;;
    high_stakes | honesty) SOURCE=data/$1.jsonl ;;
    *) SOURCE=$1 ;; # a file of your own, with a column "split": train or test
  esac
  case $1 in honeset | honesty) COUNT=$HONEST_PROMPTS GOALS=${OBJECTIVES:-honesty helpfulness} ;; esac
  case $GOALS in [Hh]onesty*) SYSTEM_PROB=0.5 ;; esac # appendix B: the alternative system prompt is for honesty alone
}

system() { # system NAME: what it passes to the stages. SFT, SPA_DPO, SPA_SimPO and SPA train on one set of pairs
  local k ratio=${1#*_}
  POOL=$FOLDER/pool_n$N-$SEED EXCLUDE=("$OUT/Vanilla_${DATA}_validation") FROM=
  SAMPLE="--n $N --temperature $TEMPERATURE --system_prob $SYSTEM_PROB"
  SCORE="--objectives $GOALS $SCORING" REFINE=$REFINING
  PAIRS=lex FILTER="--rho $RHO" RULE="--delta $DELTA" LOSS="--loss spa --alpha $ALPHA $SIMPO"
  case $1 in
    SPA) ;;
    SPA_SimPO) LOSS="--loss simpo $SIMPO" ;;
    SPA_DPO) LOSS="--loss dpo" ;;
    SFT) LOSS="--loss sft" ;;
    wo_NF) PAIRS=$1 FILTER="--consistency off --no-informativeness" ;;
    wo_NF_equal) # without filters on as many prompts as SPA's leave, drawn by hash: else more prompts are more steps
      PAIRS=$1 FILTER="--consistency off --no-informativeness"
      FILTER="$FILTER --max_prompts $(wc -l <"$FOLDER/lex_n${N}_rho${RHO}_d$DELTA-$SEED/04_denoised.jsonl")" ;;
    only_consistency) PAIRS=$1 FILTER=--no-informativeness ;;
    only_informativeness) PAIRS=$1 FILTER="--rho $RHO --consistency off" ;;
    SPA_[0-9]*) PAIRS=$1 FILTER="--rho $RHO --max_prompts $ratio" ;; # Figure 7: so many of the kept prompts
    RS_*) # Reward Soups, appendix A: candidates alone, no filter, every pair by (a G_a + b G_b) / (a + b), SPA's loss
      PAIRS=$1 FILTER= FROM=$POOL/02_scores.jsonl RULE="--rule weighted --weights ${ratio/_/ } --delta 0" ;;
    Self_Criticism) # a reconstruction, since the paper prints none of its prompts: one answer, its critique, a revision;
      # a judge with examples for harmless, honest, helpful; a pair where the revision is better and nowhere worse
      POOL=$FOLDER/criticism-$SEED PAIRS=$1 SAMPLE="--n 1 --temperature 0"
      SCORE="--objectives harmlessness honesty helpfulness $CRITIC"
      SCORE="$SCORE --judge_template recipes/prompts/self_criticism_judge.txt"
      REFINE="--template recipes/prompts/self_criticism.txt"
      FILTER="--consistency weak --no-informativeness" RULE="--delta 0" ;;
    Iter*) # Figure 5: the whole pipeline again, from the model before, on the same prompts or on others (diff)
      POOL=$FOLDER/pool_$1_$TAG PAIRS=$1_a${ALPHA}_r$RATE
      if [ "$ratio" = diff ]; then
        EXCLUDE+=("$FOLDER/pool_n$N-$SEED")
        for ((k = 2; k < ${1:4:1}; k++)); do EXCLUDE+=("$FOLDER/pool_Iter${k}_diff_$TAG"); done
      fi ;;
    *) echo "$1: no such system; recipes/systems.sh has them" >&2; return 2 ;;
  esac
}

run() { # a stage on all GPUs, or in the one process that a server or a function wants
  case " $* " in *"endpoint "* | *" --scorer "*) python "$@" ;; *) $GENERATE "$@" ;; esac
}

once() { # once STAGE --run_dir FOLDER …: what several systems share is not started again by every one
  [[ $STARTED == *"|$1 $3|"* ]] || { run "$@" && STARTED="$STARTED|$1 $3|"; }
}

ask() { # ask FOLDER MODEL ENGINE: greedy answers to DATA's test prompts. With WHICH=validation to prompts of its
  # training split that are drawn by hash and kept out of all training: what is chosen is chosen on these
  local prompts="--split test --num_prompts $TEST_PROMPTS"
  [ "$WHICH" = test ] || prompts="--num_prompts $VALIDATION --seed 1000"
  once 01_sample.py --run_dir "$1" --model "$2" --prompts "$SOURCE" $prompts --n 1 --temperature 0 \
    --max_new_tokens "$TOKENS" $3
}

train() { # train NAME: a system of this SEED, from its samples to its model, TRAINED. 3: nothing is left to train on
  local model=$MODEL engine=$ENGINE one ratio=${1#*_} folder
  TAG=n${N}_rho${RHO}_d${DELTA}_a${ALPHA}_r$RATE-$SEED
  case $1 in
    Soup_*) # rewarded soup as published: weights between two specialists, one for each objective
      train RS_1_0 && one=$TRAINED && train RS_0_1 || return
      folder=$FOLDER/$1_$TAG
      python eval/soup.py --models "$one" "$TRAINED" --weights ${ratio/_/ } --output_dir "$folder/06_$1" || return
      TRAINED=$folder/06_$1
      return ;;
    Iter2_* | wo_NF_equal) train SPA || return ;;
    Iter*) train "Iter$((${1:4:1} - 1))_$ratio" || return ;;
  esac
  case $1 in Iter*) model=$TRAINED engine=$LOCAL ;; esac
  system "$1" || return
  WHICH=validation ask "${EXCLUDE[0]}" "$MODEL" "$ENGINE" &&
    once 01_sample.py --run_dir "$POOL" --model "$model" --prompts "$SOURCE" --num_prompts "$COUNT" --seed "$SEED" \
      --exclude "${EXCLUDE[@]}" --max_new_tokens "$TOKENS" $SAMPLE $engine &&
    once 02_score.py --run_dir "$POOL" --judge_probes "$PROBES" $SCORE $engine || return
  folder=$FOLDER/${PAIRS}_n${N}_rho${RHO}_d$DELTA-$SEED TRAINED=$folder/06_$1_a${ALPHA}_r$RATE
  if [ -n "$FILTER" ]; then
    once 03_refine.py --run_dir "$POOL" --max_new_tokens "$TOKENS" $REFINE $engine &&
      python 04_denoise.py --run_dir "$folder" --input "$POOL" --seed "$SEED" $FILTER || return
  fi
  python 05_pairs.py --run_dir "$folder" ${FROM:+--input "$FROM"} $RULE &&
    $TRAIN 06_train.py --run_dir "$folder" --output_dir "$TRAINED" --seed "$SEED" $LOSS --learning_rate "$RATE" \
      --epochs "$EPOCHS" --batch_size "$BATCH" $TRAINING
}

answer() { # answer FOLDER MODEL ENGINE SET NAME: answers to a set's prompts, scored by JUDGE; a row of the tables
  local folder title
  title=${4##*/} title=${title%.*}
  folder=$1_${title}_$WHICH
  (
    data "$4"
    ask "$folder" "$2" "$3" && mkdir -p "$folder/$JUDGED" &&
      cp "$folder/01_samples.jsonl" "$folder/01_args.json" "$folder/$JUDGED" &&
      run 02_score.py --run_dir "$folder/$JUDGED" --objectives $GOALS $JUDGE $JUDGING --no-judge_check
  ) || exit
  [ "$WHICH" = test ] || title=$title-$WHICH
  RUNS+=("$title:$5=$folder/$JUDGED")
}

evaluate() { # evaluate NAME [SET…]: a system on every seed, its answers to each set (default: DATA's), their scores
  local name=$1 label=${LABEL:-$1} set status
  shift
  [ $# -gt 0 ] || set -- "$SET"
  if [ "$name" = Vanilla ]; then
    for set; do answer "$OUT/Vanilla" "$MODEL" "$ENGINE" "$set" "$label"; done
    return
  fi
  for SEED in $SEEDS; do
    status=0
    train "$name" || status=$?
    if [ $status = 3 ]; then
      echo "warning: $name, seed $SEED: nothing is left to train on, so the table lacks it" >&2
      continue
    fi
    [ $status = 0 ] || exit $status
    for set; do answer "${TRAINED%/*}/answers_${TRAINED##*/06_}" "$TRAINED" "$LOCAL" "$set" "$label"; done
  done
}

table() { # table NAME: the mean scores of all that was evaluated, in OUT/JUDGED/NAME
  python eval/judge_table.py --runs "${RUNS[@]}" --output_dir "$OUT/$JUDGED/$1"
}
