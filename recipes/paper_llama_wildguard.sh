#!/usr/bin/env bash
# The paper's setting: Llama-3.1-8B-Instruct on WildGuard (gated: accept its terms on the hub, then `hf auth login`).
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
PROMPTS=${PROMPTS:-wildguard}
NUM_PROMPTS=${NUM_PROMPTS:-300}
PRIMARY=harmlessness
SYSTEM_PROB=0 # appendix B
BETA=2.5       # SimPO's recipe for Llama-3-Instruct
GAMMA_RATIO=0.55
RUN=${RUN:-runs/llama_wildguard}
. "$(dirname "$0")/paper_stages.sh"
