# The next runs of `experiments.quality` on one GPU, two at once; a card of 40 GB is enough.
#
#     DATA=DATA MODEL=/path/SmolLM2-135M-Instruct.gguf OUT=OUT bash experiments/quality_plan.sh
#     FIRST=constant_teacher OTHER=4full_mixed ... bash experiments/quality_plan.sh     # the second pair
#     FIRST=1full_mixed OTHER=none EXTRA="--tokens 1full=50e6" ... bash experiments/quality_plan.sh    # one arm alone
#     FIRST=1full_half,1full_int8 OTHER=none FILES= ...    # states in float32, then in int8; no small files (80 s)
#     FIRST=1full_mixed OTHER=none EXTRA="--tokens 1full=50e6" CONTROLS=--only-controls ...            # its control
#
# constant_recall: for the file to ship; its teacher reads 5 M tokens, answers weigh 0.75 and end where they end.
# 1full_mixed:     12 heads of 3,600 tokens and 8 of 720 at the bytes of one full layer; its teacher reads 10 M tokens.
# constant_teacher, with answers that end; 4full_mixed: 6 full heads and 14 of 7,008 at the bytes of four full layers.
#
# Seconds on an H200 that nothing else uses. Measured: model and tokens ready 32, teacher of 10 M tokens 58 (26 of them
# compile). Estimated: align 15; compile 30 to 40; training 132 and 108, both at once 240; files 5; evaluation of both at
# once: perplexity 14, near clozes 14, far ones 25, SQuAD 24, needles to 8K 24 (then some 480), LAMBADA to COPA 40, needles
# to 128K 30, HellaSwag 70 (then some 620). A run that ends early is kept with the parts that it has, and its hybrid as a
# file of 10 MB in $OUT/*/ship. The same command again, with the same $WORK, makes what is missing.
export NHA_QUALITY_MODEL=$MODEL TOKENIZERS_PARALLELISM=false PYTHONPATH=src:.:$PYTHONPATH
S=${SECONDS_GIVEN:-620} W=${WORK:-/tmp/nha-quality}
mkdir -p "$OUT"
run() { # arm, folder, options
    mkdir -p "$OUT/$2"
    # shellcheck disable=SC2086
    timeout -k 5 $((S - 2)) python3 -m experiments.quality --data "$DATA" --out "$OUT/$2" --known /none --work "$W" \
        ${CONTROLS:---no-controls} ${FILES---files} --long-needle-count 4 --budget-s $((S - 30)) --arms "$1" $3 $EXTRA >"$OUT/log-$2.txt" 2>&1
}
run "${FIRST:-constant_recall}" first "${LONG---long-needles}" &
[ "${OTHER:-}" = none ] || run "${OTHER:-1full_mixed}" other "" &
wait
for file in "$OUT"/log-*.txt; do tail -n 2 "$file"; done
