#!/usr/bin/env bash
# The measurements of one GPU, as lines of JSON in OUTPUT. Each group takes at most ten minutes of an H100 or
# H200 that reaches 80 % of its floor.
#
#   bash tools/bench_gpu.sh                    # all groups
#   bash tools/bench_gpu.sh forward step       # only some of forward gradient reward step small vae
#   SMALL=1 bash tools/bench_gpu.sh            # the same commands at a size for CPUs, to see that they run
#
# What does not fit on the GPU (14B's gradient step without --offload needs more than 80 GB) is recorded as
# such and skipped.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUTPUT=${OUTPUT:-outputs/bench.jsonl}
mkdir -p "$(dirname "$OUTPUT")"

LARGE="--dit 14B --frames 81"
MIDDLE="--dit 1.3B --frames 81 --size 832x480"
P480="--size 832x480"
P720="--size 1280x720"
VAE="--size 832x480 --frames 17"
STEPS=40
if [ -n "${SMALL:-}" ]; then
    LARGE="--dit tiny --frames 5"
    MIDDLE="--dit tiny --frames 5 --size 32x32"
    P480="--size 32x32"
    P720="--size 64x32"
    VAE="--size 32x32 --frames 5 --vae_dim 4"
    STEPS=4
fi
LORA="--lora_rank 128 --activation_checkpointing --bf16_residual"
ONCE="--repeats 1 --warmup 1"
failed=0

bench() {
    echo "python -m tools.bench $*"
    local lines
    if lines=$("$PYTHON" -m tools.bench "$@"); then
        printf '%s\n' "$lines" | sed '$d'
        printf '%s\n' "$lines" | tail -n 1 >> "$OUTPUT"
    else
        failed=1
    fi
}

for group in ${*:-forward gradient reward step small vae}; do
    case $group in
    forward)  # one forward of 14B at both sizes, and the share outside matrix products and attention
        bench forward $LARGE $P720 --repeats 5 --profile
        bench forward $LARGE $P480 --repeats 5 --profile
        bench forward $LARGE $P480 --repeats 5 --profile --no-compile
        ;;
    gradient)  # LoRA on one GPU: peak memory, and what offloading costs
        bench gradient $LARGE $P720 $LORA --offload inputs reward --repeats 2
        bench gradient $LARGE $P720 $LORA --repeats 2
        ;;
    reward)  # PRFL's reward phase by LoRA on one GPU, at k = 0 and 2, and extrapolated to the mean k
        bench prfl $LARGE $P720 $LORA --offload inputs reward --phases reward --k 0 2 --solver_steps $STEPS $ONCE
        ;;
    step)  # a whole step at k = 2: SFT phase and reward phase
        bench prfl $LARGE $P720 $LORA --offload inputs reward --k 2 --solver_steps $STEPS $ONCE
        ;;
    small)  # 1.3B, all weights trained
        bench forward gradient reward prfl pavrm $MIDDLE --activation_checkpointing --k 0 2 \
            --solver_steps $STEPS --repeats 5
        bench sample $MIDDLE --solver_steps $STEPS $ONCE
        ;;
    vae)
        bench encode decode $VAE --repeats 3
        ;;
    *)
        echo "error: $group is not a group; give some of forward, gradient, reward, step, small, vae" >&2
        exit 1
        ;;
    esac
done
exit $failed
