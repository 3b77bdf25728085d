#!/usr/bin/env bash
# Table 4: trained on SafeRLHF (the first of DATASETS), asked on the sets of TRANSFER. JailbreakTrigger is a file of
# TrustLLM: JAILBREAK=path/to/jailbreak_trigger.json bash recipes/table4.sh
set -euo pipefail
. "$(dirname "$0")/systems.sh"

data "${DATASETS%% *}"
for SYSTEM in Vanilla SFT SPA_DPO SPA_SimPO SPA; do evaluate "$SYSTEM" $TRANSFER; done
table table4
