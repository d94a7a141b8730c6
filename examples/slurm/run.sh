# shellcheck shell=bash
# Functions of all jobs, sourced by the sbatch scripts: plan, check the nodes, start, and requeue or
# stop. README.md has the table of codes, files and signals. Values are only passed as words of an
# array. No command is built from strings.
set -euo pipefail

REQUEUE=85 NEVER_AGAIN=93

say() { printf 'slurm: %s\n' "$*"; }
# refuse REASON: report bad settings, which no restart repairs. Exits with 2 on a login node. In a job
# it ends the chain too.
refuse() {
    printf 'slurm: error: %s\n' "$*" >&2
    if [[ -n ${SLURM_JOB_ID:-} ]]; then give_up "$*"; fi
    exit 2
}
# check_printable NAME VALUE...: refuse newlines and other control characters in paths and names.
check_printable() {
    local name="$1" value
    shift
    for value in "$@"; do
        [[ $value != *[[:cntrl:]]* ]] || refuse "$name has a newline or another control character: $(printf '%q' "$value")"
    done
}
check_number() { [[ $2 =~ ^[1-9][0-9]{0,6}$ ]] || refuse "$1 must be a whole number above 0, got $(printf '%q' "$2")"; }

# --- the job and its nodes --------------------------------------------------------------------------

# header NAME: print the value of #SBATCH --NAME=... in the script, for a dry run on a login node.
header() { sed -n "s/^#SBATCH --$1=//p" "$script" | head -n 1; }

# begin SCRIPT ARGUMENT...: read the settings of the job. Sets nodes, per_node, ranks, restarts,
# dry_run and overrides.
begin() {
    script="$1" dry_run=no overrides=() directory=""
    shift
    if [[ ${1:-} == --dry-run ]]; then
        dry_run=yes
        shift
    fi
    overrides=("$@")
    check_printable "an argument" "$@"
    check_printable "the working directory" "$PWD"
    check_printable "the job's name" "${SLURM_JOB_NAME:-}" "${KD_CHAIN:-}"
    # A job that is submitted from inside a chain inherits its variable.
    [[ ${KD_CHAIN:-} == "${SLURM_JOB_NAME:-}" ]] || unset KD_CHAIN
    mounts=("$PWD")
    # shellcheck source=examples/slurm/cluster.sh
    source examples/slurm/cluster.sh
    check_printable "a setting of cluster.sh" "$KD_PYTHON" "$KD_CONTAINER" "$KD_IMAGE" "$KD_LAUNCHER" "${mounts[@]}"
    check_number KD_MAX_FAILURES "$KD_MAX_FAILURES"
    check_number KD_LEAD_SECONDS "$KD_LEAD_SECONDS"
    [[ $KD_EXPORT == yes || $KD_EXPORT == no ]] || refuse "KD_EXPORT must be yes or no, got $KD_EXPORT"
    [[ $KD_LAUNCHER == srun || $KD_LAUNCHER == torchrun ]] || refuse "KD_LAUNCHER must be srun or torchrun, got $KD_LAUNCHER"
    restarts="${SLURM_RESTART_COUNT:-0}"
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        [[ $dry_run == yes ]] || refuse "submit this from the repository's root: sbatch $script; or see what it would do: bash $script --dry-run"
        nodes="$(header nodes)" per_node="$(header ntasks-per-node)"
    else
        nodes="$SLURM_JOB_NUM_NODES" per_node="${SLURM_NTASKS_PER_NODE:-1}"
    fi
    nodes="${nodes:-1}" per_node="${per_node:-1}"
    ranks=$((nodes * per_node))
    [[ ${SLURM_NTASKS:-$ranks} == "$ranks" ]] ||
        refuse "Slurm gave $SLURM_NTASKS tasks for $nodes nodes of $per_node: say --nodes and --ntasks-per-node, not --ntasks"
    if [[ $dry_run == no ]]; then rendezvous; fi
    # The tasks get the signal too and save. This shell stays to see how they end.
    trap 'say "SIGTERM: waiting for the tasks to save"' TERM
    trap 'say "SIGUSR1 to the batch shell: waiting for the tasks"' USR1
}

# rendezvous: set the address at which the ranks connect. The port depends on the job, so that jobs on
# one node use different ports, and on the restart, so that a port in use is not tried again.
rendezvous() {
    local hosts
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
    first_node="${hosts%%$'\n'*}"
    MASTER_ADDR="$first_node"
    if ! getent hosts "$MASTER_ADDR" >/dev/null; then # Slurm knows addresses of names that do not resolve
        MASTER_ADDR="$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
    fi
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 977 * restarts) % 30000))
    export MASTER_ADDR MASTER_PORT
}

# --- starting ---------------------------------------------------------------------------------------

# container: set `srun_options` and `prefix`, the words before the program, for the container of
# cluster.sh.
container() {
    local mount joined="" binds=()
    srun_options=() prefix=()
    [[ $KD_CONTAINER == none ]] && return
    [[ -n $KD_IMAGE ]] || refuse "KD_CONTAINER=$KD_CONTAINER needs KD_IMAGE"
    for mount in "${mounts[@]}"; do
        [[ $mount != *[,:]* ]] || refuse "a path with ',' or ':' cannot be mounted: $mount"
        joined+="${joined:+,}$mount:$mount"
        binds+=(--bind "$mount:$mount")
    done
    case "$KD_CONTAINER" in
        pyxis) srun_options=("--container-image=$KD_IMAGE" "--container-mounts=$joined" "--container-workdir=$PWD") ;;
        apptainer) prefix=(apptainer exec --nv "${binds[@]}" --pwd "$PWD" "$KD_IMAGE") ;;
        *) refuse "KD_CONTAINER must be none, pyxis or apptainer, got $KD_CONTAINER" ;;
    esac
}

# run_once WORD...: run a command on the first node, in the container. In a dry run on a login node it
# runs there.
run_once() {
    container
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        [[ $KD_CONTAINER == none || -x $KD_PYTHON ]] || refuse "a dry run needs KD_PYTHON outside the container: set it for this command"
        "$@"
        return
    fi
    srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$first_node" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --mpi=none \
        "${srun_options[@]}" "${prefix[@]}" "$@"
}

# ranks_command WORD...: set `command` to the program on all ranks, with the launcher of cluster.sh.
ranks_command() {
    local cpus="${SLURM_CPUS_PER_TASK:-1}" shared=(--mpi=none --kill-on-bad-exit=1 --wait=60 --label --unbuffered)
    container
    if [[ $KD_LAUNCHER == srun ]]; then
        command=(srun "--nodes=$nodes" "--ntasks=$ranks" "--ntasks-per-node=$per_node" "--cpus-per-task=$cpus" "${shared[@]}"
            "${srun_options[@]}" "${prefix[@]}" "$KD_PYTHON" "$@")
        return
    fi
    command=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 "--cpus-per-task=$((cpus * per_node))" "${shared[@]}"
        "${srun_options[@]}" "${prefix[@]}" "$KD_PYTHON" -m torch.distributed.run "--nnodes=$nodes" "--nproc-per-node=$per_node"
        --rdzv-backend=c10d "--rdzv-endpoint=${MASTER_ADDR:-FIRST_NODE}:${MASTER_PORT:-PORT}" "--rdzv-id=${SLURM_JOB_ID:-JOB}-$restarts"
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2" "$@")
}

# start: run `command`, write its output to the job's log and to the log of this attempt, set `code`.
start() {
    local pid
    # tee must survive the signals that make the tasks save.
    "${command[@]}" > >(trap '' TERM USR1 USR2 && tee -a -- "$notes/job-$SLURM_JOB_ID-restart-$restarts.log") 2>&1 &
    pid=$!
    # A signal to this shell ends a wait, not the job.
    while true; do
        code=0
        wait "$pid" || code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
}

# plan WORD...: print the plan of the job, and read `directory` and `tokenizer` with the program's own
# reading of run file and overrides.
plan() {
    local values=() answer
    say "$nodes nodes x $per_node tasks = $ranks ranks, launcher $KD_LAUNCHER, container $KD_CONTAINER, restart $restarts"
    code=0
    answer="$(run_once "$KD_PYTHON" tools/check_run.py --ranks "$ranks" --print run.directory data.tokenizer "$@")" || code=$?
    if [[ $code -ne 0 ]]; then
        [[ $dry_run == yes || $code -ne 2 ]] || refuse "the run file, its overrides or its inputs cannot work; the reason is above"
        if [[ $dry_run == no ]]; then
            # For example a file system that is not mounted. No folder exists yet to count attempts in.
            ((restarts < KD_MAX_FAILURES)) || give_up "the run file could not be checked (code $code), at the restart $restarts"
            say "the run file could not be checked (code $code)"
            requeue
        fi
        # The commands are printed all the same.
        trap 'exit 2' EXIT
        answer=RUN_DIRECTORY
    fi
    mapfile -t values <<<"$answer"
    directory="${values[0]}" tokenizer="${values[1]:-}"
}

# show TITLE: print `command`, quoted for a shell.
show() {
    printf 'slurm: %s:\n ' "$1"
    printf ' %q' "${command[@]}"
    printf '\n'
}

# check_health: check devices, disk, clocks and an all-reduce on all ranks before the job starts.
check_health() {
    [[ $KD_HEALTH_CHECK == yes ]] || return 0
    ranks_command tools/check_node.py --directory "$notes" --min-free-gb "$KD_MIN_FREE_GB" --exclude-file "$notes/exclude"
    show "health check"
    [[ $dry_run == yes ]] && return
    start
    [[ $code -eq 0 ]] || finish_attempt failed "the health check failed$(bad_nodes)"
}
bad_nodes() { [[ ! -s $notes/exclude ]] || printf '; to leave the bad nodes out: sbatch --exclude=%s ...' "$(<"$notes/exclude")"; }

# --- the end of an attempt --------------------------------------------------------------------------

# field NAME: print a field of status.json, which rank 0 writes atomically. Quotes inside its message
# are escaped, so they cannot end a name.
field() { [[ ! -r $directory/status.json ]] || sed -n "s/^ *\"$1\": *\"\{0,1\}\([a-z0-9]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$directory/status.json" | head -n 1; }

# progress: print a number that grows with the work: steps of a run, finished shards of a cache.
progress() {
    local shards=()
    case "$kind" in
        run) field step ;;
        cache) shopt -s nullglob; shards=("$output"/*.arrow); printf '%s\n' "${#shards[@]}" ;;
        other) printf '0\n' ;;
    esac
}

# attempt_result CODE STATUS_BEFORE: print finished, requeue, stopped or failed. status.json wins over
# the launcher's exit code, which torchrun and --kill-on-bad-exit replace. A status that this attempt
# did not write is ignored.
attempt_result() {
    local code="$1" before="$2" state=""
    if [[ $kind == run && -r $directory/status.json && $(<"$directory/status.json") != "$before" ]]; then state="$(field state)"; fi
    case "$state" in
        finished | requeue | stopped) printf '%s\n' "$state" && return ;;
    esac
    case "$code" in
        0) if [[ $kind == run ]]; then printf 'failed\n'; else printf 'finished\n'; fi ;;
        2 | "$NEVER_AGAIN") printf 'stopped\n' ;;
        "$REQUEUE") printf 'requeue\n' ;;
        *) printf 'failed\n' ;;
    esac
}

# stalled_attempts: print how many of the last attempts of this job or chain made no progress.
stalled_attempts() {
    local job from to word rest count=0
    while read -r job from to word rest; do
        [[ $word != finished && $job == "${KD_CHAIN:-$SLURM_JOB_ID}" ]] || continue
        if [[ $from == "$to" ]]; then count=$((count + 1)); else count=0; fi
    done <"$notes/history"
    printf '%s\n' "$count"
}

# finish_attempt RESULT REASON: record the attempt, then end or requeue the job.
finish_attempt() {
    local word="$1" reason="$2" step count
    step="$(progress)"
    printf '%s %s %s %s restart %s: %s\n' "${KD_CHAIN:-$SLURM_JOB_ID}" "$began" "${step:-0}" "$word" "$restarts" "$reason" >>"$notes/history"
    say "$word at ${step:-0}: $reason"
    case "$word" in
        finished) return 0 ;;
        stopped) give_up "$reason" ;;
    esac
    count="$(stalled_attempts)"
    if ((count >= KD_MAX_FAILURES)); then
        give_up "$count attempts in a row have brought it no further; see $notes"
    fi
    requeue
}

# give_up REASON: end so that the job is not started again, and cancel the rest of its chain.
give_up() {
    say "not to be started again: $1"
    if [[ -n ${KD_CHAIN:-} && -n ${notes:-} ]]; then printf '%s\n' "$KD_CHAIN" >"$notes/never-again"; fi
    end_chain
    exit "$NEVER_AGAIN"
}

# end_chain: cancel the rest of a chain. chain.sh makes its name of letters without a meaning for
# scancel.
end_chain() { [[ -z ${KD_CHAIN:-} ]] || scancel --state=PENDING --user="$(id -un)" --name="$KD_CHAIN" || true; }

# requeue: start this job once more. In a chain the next job does it.
requeue() {
    local state name="$SLURM_JOB_ID"
    [[ -z ${KD_CHAIN:-} ]] || exit "$REQUEUE"
    # The last task of an array has the number of the array, which would requeue all of its tasks.
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || name="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    # A job that was cancelled, or that Slurm itself requeues, is no longer running.
    state="$(squeue --noheader --format=%T --jobs="$name" || true)"
    if [[ $state == RUNNING ]]; then
        say "requeue"
        # Slurm ends this shell before the sleep is over.
        scontrol requeue "$name" && sleep 60
    fi
    exit "$REQUEUE"
}

# --- kinds of jobs ----------------------------------------------------------------------------------

# prepare KIND FOLDER: make the folder of the logs and the history of this job.
prepare() {
    kind="$1" notes="$2/slurm"
    mkdir -p -- "$notes"
    touch -- "$notes/history"
    began="$(progress)" began="${began:-0}"
    if [[ -n ${KD_CHAIN:-} && -r $notes/never-again && $(<"$notes/never-again") == "$KD_CHAIN" ]]; then
        give_up "an earlier link of this chain said so, see $notes/history"
    fi
}

# minutes_left: print the minutes until KD_LEAD_SECONDS before the time limit. torchrun needs it, because
# it kills workers half a minute after it forwards a signal.
minutes_left() {
    local end left
    end="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' | head -n 1)"
    [[ $end != Unknown && -n $end ]] || return 0
    left=$(($(date -d "$end" +%s) - $(date +%s) - KD_LEAD_SECONDS))
    ((left > 0)) || refuse "KD_LEAD_SECONDS ($KD_LEAD_SECONDS) is longer than the job's time limit"
    printf '%d.%02d\n' $((left / 60)) $((left % 60 * 100 / 60))
}

# train CONFIG EXPORT: run the program until its run is finished, then export the weights to the Hugging
# Face folder EXPORT, unless that is empty.
train() {
    local config="$1" export_to="$2" limit=() before="" minutes
    check_printable "a path" "$config" "$export_to"
    plan --config "$config" "${overrides[@]}"
    notes="$directory/slurm"
    if [[ $dry_run == no ]]; then
        prepare run "$directory"
        if [[ $KD_LAUNCHER == torchrun ]]; then
            minutes="$(minutes_left)"
            [[ -z $minutes ]] || limit=(--train.minutes "$minutes")
        fi
    fi
    check_health
    ranks_command -m megatron_kd.pretrain --config "$config" "${overrides[@]}" "${limit[@]}"
    show "training"
    if [[ $dry_run == no ]]; then
        if [[ -r $directory/status.json ]]; then before="$(<"$directory/status.json")"; fi
        start
        finish_attempt "$(attempt_result "$code" "$before")" "the program ended with code $code"
    fi
    if [[ -n $export_to && $KD_EXPORT == yes ]]; then export_weights "$export_to"; fi
    if [[ $dry_run == no ]]; then end_chain; fi
}

# export_weights FOLDER: export to transformers' format, unless an earlier attempt has done it.
export_weights() {
    local words=(tools/convert_checkpoint.py to-huggingface "$directory" --output "$1")
    if [[ -n $tokenizer ]]; then words+=(--tokenizer "$tokenizer"); fi
    command=("$KD_PYTHON" "${words[@]}")
    show "export"
    [[ $dry_run == no ]] || return 0
    if [[ -e $1 ]]; then
        say "kept from an earlier attempt: $1"
        return
    fi
    code=0
    run_once "${command[@]}" || code=$?
    [[ $code -eq 0 ]] || finish_attempt "$(kind=other attempt_result "$code" "")" "the export ended with code $code"
}

# extract CONFIG OUTPUT: write this array task's share of a teacher cache.
extract() {
    local config="$1" workers="${SLURM_ARRAY_TASK_COUNT:-1}" worker=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))
    output="$2"
    check_printable "a path" "$config" "$output"
    plan --extraction --config "$config" "${overrides[@]}"
    notes="$output/.work/task-$worker/slurm"
    if [[ $dry_run == no ]]; then prepare cache "$output/.work/task-$worker"; fi
    check_health
    ranks_command tools/cache_teacher.py --config "$config" --output "$output" --workers "$workers" --worker "$worker" "${overrides[@]}"
    show "extraction"
    [[ $dry_run == no ]] || return 0
    start
    finish_attempt "$(attempt_result "$code" "")" "the extraction ended with code $code"
}

# once TITLE FOLDER WORD...: run a program on all ranks with the restarts of any other job. Its logs go
# below FOLDER.
once() {
    local title="$1" folder="$2"
    shift 2
    check_printable "a path or an option" "$folder" "$@"
    if [[ $dry_run == no ]]; then prepare other "$folder"; fi
    ranks_command "$@"
    show "$title"
    [[ $dry_run == no ]] || return 0
    start
    finish_attempt "$(attempt_result "$code" "")" "$title ended with code $code"
}
