# shellcheck shell=bash disable=SC2034  # read by run.sh
# Settings of a cluster. run.sh reads this file on the first node of a job. Edit it, or set the
# variables before sbatch, which passes the environment on.

# --- the program ------------------------------------------------------------------------------------
: "${KD_PYTHON:=.venv/bin/python}" # interpreter with megatron_kd, inside the container if there is one
: "${KD_CONTAINER:=none}"          # none, pyxis (srun --container-image) or apptainer (apptainer exec)
: "${KD_IMAGE:=}"                  # pyxis: name or .sqsh file; apptainer: .sif file
: "${KD_LAUNCHER:=srun}"           # srun: one task per GPU; torchrun: one task per node, which starts the others
: "${KD_EXPORT:=yes}"             # no: do not export the weights of a finished run
mounts=("$PWD")                    # mounted in a container under the same path; add data, teachers and runs
# module load ...                  # bare metal: what the interpreter needs

# --- jobs that end before their run -----------------------------------------------------------------
: "${KD_MAX_FAILURES:=3}"    # give up after so many attempts in a row without progress
: "${KD_HEALTH_CHECK:=yes}"  # no: start without tools/check_node.py
: "${KD_MIN_FREE_GB:=50}"    # on the run's file system; two checkpoints of a 7B student take 200 GB
: "${KD_LEAD_SECONDS:=600}"  # torchrun: stop so long before the time limit (srun: --signal)

# --- jobs download nothing --------------------------------------------------------------------------
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"
export TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# --- threads and NCCL -------------------------------------------------------------------------------
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# A rank that waits for a dead one must end, not hang: PyTorch's watchdog ends its process without
# waiting for the clean-up of NCCL, which can hang too. 3 is PyTorch's default, 0 turns it off.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# With one connection kernels reach a GPU in order. Overlapped reductions need that on GPUs before
# Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO: log its choice of network and rings
# NCCL chooses these. Set them if NCCL_DEBUG=INFO shows a wrong choice:
# export NCCL_SOCKET_IFNAME=ib0         # the interface of the first contact; also GLOO_SOCKET_IFNAME
# export NCCL_IB_HCA=mlx5_0,mlx5_1      # the adapters that carry traffic
