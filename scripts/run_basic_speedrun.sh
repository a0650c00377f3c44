#!/usr/bin/env bash
# A run of train.py with the observation settings taken from the environment.
#
#   MONITOR_SPECTRAL_EVERY=10 MONITOR_ACTIVATIONS=true MONITOR_ACTIVATIONS_EVERY=10 scripts/run_basic_speedrun.sh
#
# MONITOR_SPECTRAL_EVERY     steps between spectral norms (0 or -1: never)
# MONITOR_ACTIVATIONS        true or false
# MONITOR_ACTIVATIONS_EVERY  steps between activation moments (0 or -1: never)
#
# Usual profiles: production (spectral 100, activations false), research (10, true), final (1, true).
# Every further word goes to train.py as it is, and a flag there beats the variable. NPROC=2 runs two processes.
set -euo pipefail

cd "$(dirname "$0")/.."
export MONITOR_SPECTRAL_EVERY="${MONITOR_SPECTRAL_EVERY:-}"
export MONITOR_ACTIVATIONS="${MONITOR_ACTIVATIONS:-}"
export MONITOR_ACTIVATIONS_EVERY="${MONITOR_ACTIVATIONS_EVERY:-}"

python="${PYTHON:-python}"
if [ "${NPROC:-1}" -gt 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" train.py "$@"
fi
exec "$python" train.py "$@"
