# The next runs of `experiments.quality` on one GPU, two at once; a card of 40 GB is enough.
#
#     DATA=DATA MODEL=/path/SmolLM2-135M-Instruct.gguf OUT=OUT bash experiments/quality_plan.sh
#     FIRST=constant_teacher OTHER=4full_mixed ... bash experiments/quality_plan.sh     # the second pair
#     FIRST=1full_mixed OTHER=none EXTRA="--tokens 1full=50e6" ... bash experiments/quality_plan.sh    # one arm alone
#     FIRST=1full_half,1full_int8 OTHER=none FILES= ...    # states in float32, then in int8; no small files (80 s)
#     FIRST=1full_mixed OTHER=none EXTRA="--tokens 1full=50e6" CONTROLS=--only-controls ...            # its control
#
# constant_recall, 1full_mixed, constant_teacher and 4full_mixed are in results/quality. What is to run next, each alone on a card:
#     FIRST=1full_half,1full_int8 OTHER=shipped FILES= SECONDS_GIVEN=560
#     FIRST=4full_half,4full_int8 OTHER=none FILES= SECONDS_GIVEN=560
# 1full_half: 2 full heads, 10 of 2,144 tokens and 8 of 896 (18.2 MB with states in int8); all answers of its recall text were right
# after 10 M of its tokens; it was not evaluated. 4full_half: 6 full heads and 14 of 7,008 (53 MB in int8). `shipped` is the
# file in this package.
#
# Seconds of 1full_half alone on an H200 with an empty cache of compiled kernels: model and tokens ready 38, teacher of 12.5 M tokens
# 85, conversion and alignment 73, compile of heads of three kinds 170, 12.5 M tokens in long sequences 60 (203,000 a second),
# evaluation: perplexity 5, near clozes 10, far ones 15, SQuAD 8, needles to 8K 8, LAMBADA to COPA 25, HellaSwag 30, needles to 128K
# 30. The small files that --files writes take 80 each. A run that ends early is kept with the parts that it has. The same command
# again, with the same $WORK, makes what is missing.
export NHA_QUALITY_MODEL=$MODEL TOKENIZERS_PARALLELISM=false PYTHONPATH=src:.:$PYTHONPATH
S=${SECONDS_GIVEN:-620} W=${WORK:-/tmp/nha-quality}
mkdir -p "$OUT"
run() { # arms, folder, options, controls
    mkdir -p "$OUT/$2"
    # shellcheck disable=SC2086
    timeout -k 5 $((S - 2)) python3 -m experiments.quality --data "$DATA" --out "$OUT/$2" --known /none --work "$W" \
        $4 ${FILES---files} --long-needle-count 4 --budget-s $((S - 20)) --arms "$1" $3 $EXTRA >"$OUT/log-$2.txt" 2>&1
}
run "${FIRST:-constant_recall}" first "${LONG---long-needles} $FIRST_EXTRA" "${CONTROLS:---no-controls}" &
[ "${OTHER:-}" = none ] || run "${OTHER:-1full_mixed}" other "$OTHER_EXTRA" "${OTHER_CONTROLS:-${CONTROLS:---no-controls}}" &
wait
for file in "$OUT"/log-*.txt; do tail -n 2 "$file"; done
