#!/usr/bin/env bash
# The paper's setting: Llama-3.1-8B-Instruct on HoneSet (HONESET=path/to/HoneSet.json, from the HonestyLLM repository).
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
PROMPTS=${PROMPTS:-honeset:${HONESET:-HoneSet.json}}
NUM_PROMPTS=${NUM_PROMPTS:-400}
PRIMARY=honesty
SYSTEM_PROB=0.5 # appendix B
BETA=2.5       # SimPO's recipe for Llama-3-Instruct
GAMMA_RATIO=0.55
RUN=${RUN:-runs/llama_honeset}
. "$(dirname "$0")/paper_stages.sh"
