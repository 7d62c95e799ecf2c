#!/usr/bin/env bash
# A Ray cluster on the nodes of a SLURM allocation, and one job on it.
#
#   sbatch --nodes 4 --gpus-per-node 8 cluster/slurm.sh jobs/pretrain_1b.py --data URI --storage URI
#SBATCH --job-name=vlmo
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@120
set -euo pipefail

port=${VLMO_PORT:-6379}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))') # of this allocation alone
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# the head takes part in training here: an allocation is lost as a whole
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head --node-ip-address="$head" --port="$port" --block &
head_step=$!
until ray status --address="$head:$port" > /dev/null 2>&1; do
    kill -0 "$head_step" # ends this script if the head has failed
    sleep 1
done
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --nodelist="$others" --overlap \
        ray start --address="$head:$port" --block &
fi

RAY_ADDRESS="$head:$port" python "$@" &
job=$!
trap 'kill -TERM "$job"' TERM # the run saves its checkpoint and ends
status=0
wait "$job" || status=$?
while kill -0 "$job" 2> /dev/null; do # a signal ends `wait` early
    status=0
    wait "$job" || status=$?
done
exit "$status"
