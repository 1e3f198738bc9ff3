#!/usr/bin/env bash
# A dsray job under Slurm: Ray's head on the first node, a Ray worker on each of the others, then `dsray submit`.
#
#   sbatch --nodes=2 cluster/slurm.sh my_job.toml [more arguments of dsray submit]
#
# The same command again continues the run from its last checkpoint; so does a job that Slurm puts back into the queue.
# Paths in my_job.toml must be absolute, on storage that all nodes see. dsray must be installed in DSRAY_VENV there.
#SBATCH --job-name=dsray
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the time is over, this script is told, so that the run writes a checkpoint and stops.
#SBATCH --signal=B:USR1@600

set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch [--nodes=N] $0 JOB.toml [arguments of dsray submit]" >&2
  exit 2
fi
job_file=$1
shift

# shellcheck source=/dev/null
source "${DSRAY_VENV:-$HOME/dsray}/bin/activate"

gcs_port=$((20000 + SLURM_JOB_ID % 5000))
dashboard_port=$((26000 + SLURM_JOB_ID % 5000))
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --all-ip-addresses | awk 'NR == 1 { print $1 }')
dashboard=http://$head_ip:$dashboard_port

# Other users of these machines reach the ports: every request needs the token of a file that only you can read.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/.dsray-token-$SLURM_JOB_ID
openssl rand -hex 32 > "$RAY_AUTH_TOKEN_PATH"
export RAY_JOB_STOP_WAIT_TIME_S=600 RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_ENABLE_PRINT_PATCH=0
# Short, because it holds unix sockets; on the node's own disk.
temp_dir=/tmp/ray-$SLURM_JOB_ID

steps=()
clean_up() {
  kill "${steps[@]}" 2> /dev/null || true
  wait
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap clean_up EXIT

stop_run() {
  echo "time is nearly over: stopping the run after its running step"
  dsray stop "$job_file" || true
}
trap stop_run USR1 TERM

srun --nodes=1 --ntasks=1 --nodelist="$head_node" \
  ray start --head --block --node-ip-address="$head_ip" --port="$gcs_port" --temp-dir="$temp_dir" \
  --dashboard-host="$head_ip" --dashboard-port="$dashboard_port" --ray-client-server-port=$((dashboard_port - 5500)) \
  --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" &
steps+=($!)

alive_nodes() {
  curl --silent --fail --noproxy '*' --header "Authorization: Bearer $(cat "$RAY_AUTH_TOKEN_PATH")" \
    "$dashboard/api/v0/nodes?limit=10000" 2> /dev/null | grep -o '"state": *"ALIVE"' | wc -l
}

wait_for_nodes() {
  local wanted=$1
  for _ in $(seq 180); do
    if [[ $(alive_nodes || true) -ge $wanted ]]; then
      return 0
    fi
    sleep 2
  done
  echo "only $(alive_nodes || true) of $wanted nodes joined the cluster in 6 minutes; see the lines above" >&2
  return 1
}

echo "waiting for Ray's head on $head_node ($dashboard) ..."
wait_for_nodes 1

if [[ $SLURM_JOB_NUM_NODES -gt 1 ]]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  echo "waiting for $others further nodes ..."
  srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head_node" \
    ray start --block --address="$head_ip:$gcs_port" \
    --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" &
  steps+=($!)
  wait_for_nodes "$SLURM_JOB_NUM_NODES"
fi

# In the background, so that the signals above are not held back until it ends.
dsray submit "$job_file" --address "$dashboard" "$@" &
submit=$!
while kill -0 "$submit" 2> /dev/null; do # a signal cuts `wait` short
  wait "$submit" || true
done
# It may have ended while a signal was answered: only now `wait` gives its exit code, which the shell has kept.
code=0
wait "$submit" || code=$?
exit "$code"
