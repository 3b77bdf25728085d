#!/usr/bin/env bash
# The paper's setting: Mistral-7B-Instruct (the paper names no version) on HoneSet (HONESET=path/to/HoneSet.json, from the HonestyLLM repository).
MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.3}
PROMPTS=${PROMPTS:-honeset:${HONESET:-HoneSet.json}}
NUM_PROMPTS=${NUM_PROMPTS:-400}
PRIMARY=honesty
SYSTEM_PROB=0.5 # appendix B
BETA=2.5       # SimPO's recipe for Mistral-Instruct
GAMMA_RATIO=0.1
RUN=${RUN:-runs/mistral_honeset}
. "$(dirname "$0")/paper_stages.sh"
