#!/usr/bin/env bash
# The measurements of one GPU, as lines of JSON in OUTPUT; each group takes at most ten minutes of an H100 or H200 at 80 % of its floor.
#
#   bash bench_gpu.sh                      # all groups
#   bash bench_gpu.sh forward step         # some of: forward gradient reward step small vae
#   SMALL=1 bash bench_gpu.sh              # the same commands at the size of a CPU, to see that they run
#
# What does not fit on the GPU (14B's gradient step without --offload takes more than 80 GB) is recorded as that and skipped.
set -u
cd "$(dirname "$0")"
PYTHON=${PYTHON:-.venv/bin/python}
OUTPUT=${OUTPUT:-outputs/bench.jsonl}
mkdir -p "$(dirname "$OUTPUT")"
LARGE="--dit 14B --frames 81 --compile"
MIDDLE="--dit 1.3B --frames 81 --size 832x480 --compile"
P480="--size 832x480" P720="--size 1280x720" VAE="--size 832x480 --frames 17" ROLLOUT=40
if [ -n "${SMALL:-}" ]; then
    LARGE="--dit tiny --frames 5" MIDDLE="--dit tiny --frames 5 --size 32x32"
    P480="--size 32x32" P720="--size 64x32" VAE="--size 32x32 --frames 5 --vae_dim 4" ROLLOUT=4
fi
LORA="--lora_rank 128 --checkpoint_blocks --bf16_residual --gather no"  # one GPU has its weights gathered anyway
failed=0

bench() {
    echo "bench.py $*"
    local lines
    if lines=$("$PYTHON" bench.py "$@"); then
        printf '%s\n' "$lines" | sed '$d'
        printf '%s\n' "$lines" | tail -n 1 >> "$OUTPUT"
    else
        failed=1
    fi
}

for group in ${*:-forward gradient reward step small vae}; do
    case $group in
    forward)  # one forward of 14B at both sizes, and what is outside matrix products and attention
        bench forward $LARGE $P720 --repeats 5 --profile
        bench forward $LARGE $P480 --repeats 5 --profile
        ;;
    gradient)  # LoRA on one GPU: peak memory, and what offloading costs
        bench gradient $LARGE $P720 $LORA --offload inputs --repeats 2
        bench gradient $LARGE $P720 $LORA --repeats 2
        ;;
    reward)  # PRFL's reward phase by LoRA on one GPU, at k = 0 and 2, and from these at the mean k
        bench prfl $LARGE $P720 $LORA --offload inputs --phases reward --k 0 2 --rollout_steps $ROLLOUT --repeats 1 --warmup 1
        ;;
    step)  # a whole step at k = 2; its SFT phase is the difference to the reward phase
        bench prfl $LARGE $P720 $LORA --offload inputs --k 2 --rollout_steps $ROLLOUT --repeats 1 --warmup 1
        ;;
    small)  # 1.3B, all weights trained
        bench forward gradient reward prfl pavrm $MIDDLE --checkpoint_blocks --k 0 2 --rollout_steps $ROLLOUT --repeats 5
        bench sample $MIDDLE --rollout_steps $ROLLOUT --repeats 1 --warmup 1
        ;;
    vae)
        bench encode decode $VAE --repeats 3
        ;;
    *)
        echo "error: there is no group $group; give some of forward, gradient, reward, step, small, vae" >&2
        exit 1
        ;;
    esac
done
exit $failed
