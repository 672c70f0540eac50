#!/usr/bin/env bash
# The ranks of this machine in a job of several machines. Run it on each of them with the same words:
#
#   HEAD=node1 NODES=4 RANKS=8 JOB=my-run bash launch/node.sh launch/pretrain.py --config C --run_dir /shared/runs/my-run
#
# HEAD       name or address of the machine where they meet, one of them
# PORT       a free port there (29500)
# NODES      machines;  RANKS  processes on each, one a GPU
# JOB        a name that no other job uses
# RESTARTS   how often torchrun starts the ranks again after a failure (3)
# JOIN_S     seconds that a machine waits for the others, also when ranks are started again (600)
# STOP_S     seconds that the ranks have for saving after a signal, before torchrun kills them (600)
# ADDRESS    this machine's own address, where its name does not lead to it
# INTERFACE  network interface of the job, where a machine has several
# TORCHRUN   the command (.venv/bin/torchrun beside this folder, else torchrun)
set -euo pipefail
: "${HEAD:?the machine where the others meet}" "${NODES:?number of machines}"
: "${RANKS:?processes on each machine}" "${JOB:?name of the job}"
here=$(cd "$(dirname "$0")/.." && pwd)
torchrun=${TORCHRUN:-$here/.venv/bin/torchrun}
[ -x "$torchrun" ] || torchrun=torchrun
# what asks torchrun to stop goes to the ranks, which save; by itself it is deaf to Slurm's --signal=USR1, and dies of it
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_S:-600}
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
exec "$torchrun" --nnodes="$NODES" --nproc_per_node="$RANKS" --max-restarts="${RESTARTS:-3}" \
    --rdzv_backend=c10d --rdzv_endpoint="$HEAD:${PORT:-29500}" --rdzv_id="$JOB" \
    --rdzv_conf="join_timeout=${JOIN_S:-600}" ${ADDRESS:+--local_addr="$ADDRESS"} "$@"
