#!/usr/bin/env bash
# A cluster of as many machines as SLURM gives, for one command; with it, it ends:
#     sbatch slurm.sh lavatar submit --pairs pairs.yaml --recipe fast
# Stopped by the time limit, or by scancel, the job keeps what is done: the same line takes it up again.
#SBATCH --job-name=lavatar
#SBATCH --nodes=3                  # EDIT: the first one also leads
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8          # EDIT
#SBATCH --gpus-per-node=1          # EDIT; remove it where there are none
#SBATCH --time=24:00:00            # EDIT
#SBATCH --signal=B:TERM@120        # two minutes before the end: store a checkpoint and stop
#SBATCH --output=lavatar-%j.log
set -euo pipefail

# EDIT: where lavatar is installed (on the shared disk, or at the same place everywhere), and cluster.env.
# shellcheck source=/dev/null
. "${LAVATAR_VENV:-$HOME/lavatar/.venv}/bin/activate"
set -a
# shellcheck source=/dev/null
. "${LAVATAR_ENV:-$HOME/cluster.env}"
set +a

[ $# -gt 0 ] || { echo "What shall run? sbatch slurm.sh lavatar submit ..." >&2; exit 2; }
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
cpus="${SLURM_CPUS_PER_TASK:-1}"

on() { # NODE COMMAND... &: one task there, with all that the job has of that machine; exec: signals reach it
    exec srun --nodes=1 --ntasks=1 --nodelist="$1" --cpus-per-task="$cpus" --overlap "${@:2}"
}

steps=()
# shellcheck disable=SC2317 # the trap calls it
finish() {
    trap - EXIT TERM INT
    for step in "${steps[@]}"; do kill -TERM "$step" 2>/dev/null || true; done
    wait
}
trap finish EXIT
trap 'exit 143' TERM INT

# This script runs on the first machine. Its address as the others see it; EDIT where it has several networks.
address="$({ getent ahostsv4 "${nodes[0]}" || true; } | awk '$1 !~ /^127\./ { print $1; exit }')"
[ -n "$address" ] || address="$(hostname -I | awk '{ print $1 }')"

on "${nodes[0]}" lavatar cluster up --block --host "$address" --cpus "$cpus" &
steps+=("$!")
until lavatar cluster status --wait 1 >/dev/null 2>&1; do
    kill -0 "${steps[0]}" 2>/dev/null || { echo "the head did not start" >&2; exit 1; }
    sleep 1
done
for node in "${nodes[@]:1}"; do
    on "$node" lavatar cluster join --block --cpus "$cpus" &
    steps+=("$!")
done
lavatar cluster status --wait "${#nodes[@]}"

# In the background, so that a signal reaches this shell at once; it is passed on, and waited for.
"$@" &
work="$!"
trap 'kill -TERM "$work" 2>/dev/null || true' TERM INT
code=0
wait "$work" || code="$?"
while kill -0 "$work" 2>/dev/null; do # a signal ends the wait, not what is waited for
    code=0
    wait "$work" || code="$?"
done
exit "$code"
