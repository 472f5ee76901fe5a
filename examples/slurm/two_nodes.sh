#!/usr/bin/env bash
# Trains on two machines. Each runs `accelerate launch` once, which starts a process for each of its GPUs.
#
#   sbatch examples/slurm/two_nodes.sh examples/accelerate/fsdp2.yaml train.py [arguments of train.py]
#
#SBATCH --job-name=spec_kd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${machines[0]}
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000)) # another one for each job
export NUM_PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))

# Single quotes: each machine fills in its own SLURM_NODEID.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch \
  --config_file "$0" \
  --num_machines "$SLURM_NNODES" \
  --machine_rank "$SLURM_NODEID" \
  --num_processes "$NUM_PROCESSES" \
  --main_process_ip "$MAIN_ADDRESS" \
  --main_process_port "$MAIN_PORT" \
  "$@"' "$@"
