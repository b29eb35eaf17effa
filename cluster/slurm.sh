#!/bin/bash
# sbatch cluster/slurm.sh CAPTURES RUNS [settings of train_all.py]: Ray on all nodes of the allocation, for one batch of scenes.
# The same command continues. CAPTURES and RUNS are on a disk that all nodes share; so is the virtual environment.
#SBATCH --job-name=flexgs
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
if [ $# -lt 2 ]; then echo "usage: sbatch cluster/slurm.sh CAPTURES RUNS [settings of train_all.py]" >&2; exit 2; fi
captures=$1 runs=$2; shift 2
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
source .venv/bin/activate

# Nodes are shared with other users, and Ray listens on all interfaces: a token of this job's own keeps them out.
umask 077
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray/token-$SLURM_JOB_ID" RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
mkdir -p "$HOME/.ray"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r address _ < <(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses)
port=$((20000 + SLURM_JOB_ID % 20000))

# It ends with `ray stop`, which is why the nodes are taken whole.
srun ray symmetric-run --address "$address:$port" --min-nodes "$SLURM_NNODES" --num-cpus "$SLURM_CPUS_PER_TASK" \
  --num-gpus "$SLURM_GPUS_PER_NODE" --disable-usage-stats \
  -- python -u ray_jobs/train_all.py --data-root "$captures" --storage "$runs" "$@"
