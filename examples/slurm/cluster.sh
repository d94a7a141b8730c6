# shellcheck shell=bash disable=SC2034  # read by run.sh
# What is particular to a cluster; run.sh reads this file on the first node of a job. Edit it, or set the variables before sbatch,
# which takes the environment along.

# --- the program ------------------------------------------------------------------------------------------------------------------
: "${KD_PYTHON:=.venv/bin/python}" # the interpreter that has megatron_kd; in a container: the one in there
: "${KD_CONTAINER:=none}"          # none; pyxis: srun --container-image; apptainer: apptainer exec
: "${KD_IMAGE:=}"                  # pyxis: name or .sqsh file; apptainer: .sif file
: "${KD_LAUNCHER:=srun}"           # srun: one task per GPU; torchrun: one task per node, which starts the others
: "${KD_EXPORT:=yes}"             # no: leave a finished run's weights as they are, without a Hugging Face folder
mounts=("$PWD")                    # seen in a container under the same path; add where data, teachers and runs live
# module load ...                  # bare metal: what the interpreter needs

# --- when a job ends before its run does --------------------------------------------------------------------------------------------
: "${KD_MAX_FAILURES:=3}"    # give up after so many attempts in a row that brought the run no further
: "${KD_HEALTH_CHECK:=yes}"  # no: start at once, without tools/check_node.py
: "${KD_MIN_FREE_GB:=50}"    # on the file system of the run: two checkpoints of a 7B student take 2 x 100 GB, so raise it for large ones
: "${KD_LEAD_SECONDS:=600}"  # torchrun only: leave so long before the time limit. With srun, --signal in the script says it

# --- nothing is downloaded in a job -------------------------------------------------------------------------------------------------
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}" TRANSFORMERS_OFFLINE="${TRANSFORMERS_OFFLINE:-1}"
export WANDB_MODE="${WANDB_MODE:-offline}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# --- threads and NCCL ---------------------------------------------------------------------------------------------------------------
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# A rank that waits for a dead one must end, not hang: PyTorch's watchdog ends its process, and does not wait for NCCL to clean up, which can
# hang too. PyTorch's own default, written out; 0 would switch the watchdog off.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"
# One connection at a time keeps the order in which kernels reach a GPU: overlapped reductions need it on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}" # INFO: which network and which rings it chose
# Left to NCCL unless it chooses wrongly, which NCCL_DEBUG=INFO shows:
# export NCCL_SOCKET_IFNAME=ib0         # the interface of the first contact; also GLOO_SOCKET_IFNAME
# export NCCL_IB_HCA=mlx5_0,mlx5_1      # the adapters that carry traffic
