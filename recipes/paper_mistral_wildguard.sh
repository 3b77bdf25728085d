#!/usr/bin/env bash
# The paper's setting: Mistral-7B-Instruct (the paper names no version) on WildGuard (gated: accept its terms on the hub, then `hf auth login`).
MODEL=${MODEL:-mistralai/Mistral-7B-Instruct-v0.3}
PROMPTS=${PROMPTS:-wildguard}
NUM_PROMPTS=${NUM_PROMPTS:-300}
PRIMARY=harmlessness
SYSTEM_PROB=0 # appendix B
BETA=2.5       # SimPO's recipe for Mistral-Instruct
GAMMA_RATIO=0.1
RUN=${RUN:-runs/mistral_wildguard}
. "$(dirname "$0")/paper_stages.sh"
