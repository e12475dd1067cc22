#!/usr/bin/env bash
# All of results/generality on one GPU, from the repository's root:
#
#     experiments/generality.sh DATA OUT SECONDS [further options of experiments.second_model]
#
# Three processes beside each other. Two train an original of 20m each (a Llama, an NHAForCausalLM) and then measure, in
# this order, the original, control and hybrid of `constant` and of `balanced`, and `constant` at twice and at half the
# learning rates with a control of the same rates. The third trains shapes of 0.4B and 1B with random weights at the recipes' rates, then at the rate of
# width 576. A run is written as soon as it is measured and not made again. MODELS, CASES and WORK change what is made;
# CORPUS is a folder with the tokens of the text, used if it is there. NHA_QUALITY_MODEL names a .gguf for the tokenizer.
set -u
DATA=$1 OUT=$2 LIMIT=$3
shift 3
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-3} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORK=${WORK:-/tmp/nha-second} BUDGET=$((LIMIT - 8))
COMMON=(--data "$DATA" --work "$WORK" --budget-s "$BUDGET" ${CORPUS:+--corpus "$CORPUS"})
mkdir -p "$OUT/generality/runs" "$OUT/logs"
for MODEL in ${MODELS-llama-20m nha-20m}; do
  timeout -k 3 $((LIMIT - 6)) python3 -m experiments.second_model "${COMMON[@]}" --output "$OUT/$MODEL" --models "$MODEL" \
    --recipes constant,balanced,constant:2,constant:0.5 "$@" > "$OUT/logs/$MODEL.txt" 2>&1 &
  sleep 1
done
if [ -n "${CASES-0.4B-x1,1B-x1,1B-unscaled,0.4B-unscaled}" ]; then
  timeout -k 3 $((LIMIT - 6)) python3 -m experiments.wide_rates "${COMMON[@]}" --output "$OUT/generality" \
    --cases "${CASES-0.4B-x1,1B-x1,1B-unscaled,0.4B-unscaled}" --batch-size "${RATES_BATCH:-2}" ${RATES_STEPS:+--steps $RATES_STEPS} > "$OUT/logs/rates.txt" 2>&1 &
fi
wait
for MODEL in ${MODELS-llama-20m nha-20m}; do cp "$OUT/$MODEL"/runs/*.json "$OUT/generality/runs/" 2> /dev/null; done
python3 -m experiments.second_model --report "$OUT/generality"
tail -n 4 "$OUT"/logs/*.txt
