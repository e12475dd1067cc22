#!/usr/bin/env bash
# The rows of results/from_scratch that decide most, on one GPU, from the repository's root:
#
#     experiments/from_scratch.sh DATA OUT SECONDS
#
# Four processes beside each other: recall and two tasks of MAD, Transformers, and two of language models. Rows that are
# in results/from_scratch are not made again. A row is written as soon as it is measured; add all to the page by
# `nha ablate --summarize --add OUT`. DATA holds text/ and eval/. CORPUS is a folder with the tokens of the text, used if
# it is there; NHA_QUALITY_MODEL names a .gguf for the tokenizer. TABLES is a folder whose tables take the place of the
# built-in ones, and ONLY names the processes to start, both for a trial.
set -u
DATA=$(realpath "$1") OUT=$2 LIMIT=$3
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true CUDA_DEVICE_MAX_CONNECTIONS=32
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
START=$SECONDS WORK=$(mktemp -d) CORPUS=${CORPUS:-/tmp/nha-scratch-corpus}
mkdir -p "$OUT" "$OUT-logs" "$WORK/data"
[ -n "${TABLES:-}" ] || cp -r results/from_scratch/rows "$OUT/"
left() { echo $((LIMIT - 6 - (SECONDS - START))); }
jobs_of() { # NAME OPTIONS JOB ...; a job is TABLE:SEEDS:ARMS
  local name=$1 options=$2 table seeds arms seconds
  shift 2
  for job in "$@"; do
    IFS=: read -r table seeds arms <<< "$job"
    seconds=$(left)
    [ "$seconds" -gt 40 ] || return 0
    timeout -k 5 "$seconds" python3 -m nha ablate "${TABLES:+$TABLES/}$table${TABLES:+.yaml}" --seeds "$seeds" --arms "$arms" \
      --best-lr $options --budget $((seconds - 12)) --output "$OUT" >> "$OUT-logs/$name.txt" 2>&1
  done
}
start() { [[ ",${ONLY:-$1}," != *",$1,"* ]] || jobs_of "$@" & }
start recall "--no-compile-layers --together 24" \
  "recall:0,1,2:nha 256K,window 256K,linear 256K,average of two softmaxes,gate between two softmaxes" \
  "recall:0,1,2:nha 120K,window 120K,linear 120K,nha 256K without slots,linear 128K,nha 255K 96 slots" \
  "copying:0,1,2:nha,window,linear" "in-context:0,1,2:nha,window,linear"
start full "" "recall:0,1,2:transformer" "in-context:0:transformer" "copying:1,2:transformer"
if [[ ",${ONLY:-language}," == *,language,* ]]; then
  python3 - "${NHA_QUALITY_MODEL:-smollm2}" "$WORK/tokenizer" > "$OUT-logs/tokenizer.txt" 2>&1 << 'P'
import sys
from experiments.second_model import load_tokenizer
load_tokenizer(sys.argv[1]).save_pretrained(sys.argv[2])
P
  [ -f "$CORPUS/meta.json" ] || python3 -m nha train "$WORK/run" --tokenizer "$WORK/tokenizer" --text "$DATA/text/train.jsonl.xz" \
    --corpus "$CORPUS" --prepare-only > "$OUT-logs/corpus.txt" 2>&1
  ln -s "$DATA"/eval/* "$DATA/text/heldout.jsonl.xz" "$WORK/data/"
  TEXT="--reserve 24 --tokenizer $WORK/tokenizer --corpus $CORPUS --data $WORK/data"
  for i in 1 2; do
    (jobs_of "language-$i" "$TEXT --shard $i/2" "language:1,2:nha,transformer,linear,window" \
      "windows:0:random windows,window 64" "language:1,2:average of two softmaxes") &
  done
fi
wait
tail -n 3 "$OUT"-logs/*.txt
