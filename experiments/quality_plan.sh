# The next runs of `experiments.quality` on one GPU, two at once; a card of 40 GB is enough.
#
#     DATA=DATA MODEL=/path/SmolLM2-135M-Instruct.gguf OUT=OUT bash experiments/quality_plan.sh
#     FIRST=constant_teacher OTHER=4full_mixed ... bash experiments/quality_plan.sh     # the second pair
#     FIRST=1full_mixed OTHER=none EXTRA="--tokens 1full=50e6" ... bash experiments/quality_plan.sh    # one recipe alone
#     FIRST=1full_half,1full_int8 OTHER=none FILES= ...    # states in float32, then in int8; no small files
#     FIRST=1full_mixed OTHER=none EXTRA="--tokens 1full=50e6" CONTROLS=--only-controls ...            # its control
#
# What is to run next: second seeds of the rows of 16 and 128 slots and of exact ones, two on a card, and the rows with 22 and 2 full heads
# at seed 2; the control of the first is there, the other's is not. `constant_slow` and `shipped_slow` measure a trained `constant_long`
# of the same WORK with slower gates:
#     FIRST=constant_slots16 OTHER=constant_slots128 FIRST_EXTRA="--seeds 1" OTHER_EXTRA="--seeds 1" EXTRA="--tokens constant=50e6" SECONDS_GIVEN=780
#     FIRST=constant_exact_long FIRST_EXTRA="--seeds 1" OTHER=none EXTRA="--tokens constant=50e6" SECONDS_GIVEN=620
#     FIRST=4full_floor FIRST_EXTRA="--seeds 2" OTHER=1full_floor OTHER_EXTRA="--seeds 2" FILES= SECONDS_GIVEN=400
#     FIRST=constant_long,constant_slow,shipped_slow FIRST_EXTRA="--seeds 3" OTHER=none EXTRA="--tokens constant=50e6" SECONDS_GIVEN=900
# With 100e6 tokens a hybrid beside its control took 979 and 900 seconds of training on one card.
# A control in rows of 32,768 tokens (constant_far) trains at 60,000 tokens a second alone on a card.
#
# Seconds of 1full_half alone on an H200 with an empty cache of compiled kernels: model and tokens ready 47, teacher of 12.5 M tokens
# 97 (37 of them until its first step), conversion and alignment 65, compile of heads of three kinds 139 (before layers of any
# windows shared graphs), 12.5 M tokens in long sequences 62 (204,000 a second), evaluation: perplexity 7, near clozes 8, far ones 15,
# SQuAD 7, needles to 8K 7, LAMBADA to COPA 25, HellaSwag 30, needles of 32K 17. A run that ends early is kept with the parts that
# it has. The same command again, with the same $WORK, makes what is missing.
export NHA_QUALITY_MODEL=$MODEL TOKENIZERS_PARALLELISM=false PYTHONPATH=src:.:$PYTHONPATH
S=${SECONDS_GIVEN:-620} W=${WORK:-/tmp/nha-quality}
mkdir -p "$OUT"
run() { # recipes, folder, options, controls
    mkdir -p "$OUT/$2"
    # shellcheck disable=SC2086
    timeout -k 5 $((S - 2)) python3 -m experiments.quality --data "$DATA" --output "$OUT/$2" --known /none --work "$W" \
        $4 ${FILES---files} --long-needle-count 4 --budget-s $((S - 15)) --runs "$1" $3 $EXTRA >"$OUT/log-$2.txt" 2>&1
}
run "${FIRST:-constant_recall}" first "${LONG---long-needles} $FIRST_EXTRA" "${CONTROLS:---no-controls}" &
[ "${OTHER:-}" = none ] || run "${OTHER:-1full_mixed}" other "$OTHER_EXTRA" "${OTHER_CONTROLS:-${CONTROLS:---no-controls}}" &
wait
for file in "$OUT"/log-*.txt; do tail -n 2 "$file"; done
