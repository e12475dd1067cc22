#!/usr/bin/env bash
# The rows of results/from_scratch that decide most, on one GPU, from the repository's root:
#
#     ONLY=language experiments/from_scratch.sh DATA OUT SECONDS
#
# ONLY names the parts, of which each fills most of a GPU for ten minutes: recall (MQAR and two tasks of MAD), language
# (20 M parameters, three seeds), large (60 M, and one model for every window), layer (choices of the layer), and peers, where
# flash-linear-attention is installed. Without ONLY all but the peers share the GPU; the rows of 60 M are safest alone, by
# ONLY=large. Rows that are in results/from_scratch are not made again. A row is written as soon as it is measured; add all to the
# page by `nha ablate --summarize --add OUT`. DATA holds text/ and eval/. CORPUS is a folder with the tokens of the text, used if
# it is there; NHA_QUALITY_MODEL names a .gguf for the tokenizer. TABLES is a folder whose tables take the place of the built-in
# ones, for a trial.
set -u
DATA=$(realpath "$1") OUT=$2 LIMIT=$3
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true CUDA_DEVICE_MAX_CONNECTIONS=32
export OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=4
START=$SECONDS WORK=$(mktemp -d) CORPUS=${CORPUS:-/tmp/nha-scratch-corpus} PARTS=,${ONLY:-recall,language,large,layer},
mkdir -p "$OUT" "$OUT-logs" "$WORK/data"
[ -n "${TABLES:-}" ] || cp -r results/from_scratch/rows "$OUT/"
left() { echo $((LIMIT - 6 - (SECONDS - START))); }
jobs_of() { # NAME OPTIONS JOB ...; a job is TABLE:SEEDS:MODELS, without MODELS for all models of the table
  local name=$1 options=$2 table seeds models seconds
  shift 2
  for job in "$@"; do
    IFS=: read -r table seeds models <<< "$job"
    seconds=$(left)
    [ "$seconds" -gt 40 ] || return 0
    timeout -k 5 "$seconds" python3 -m nha ablate "${TABLES:+$TABLES/}$table${TABLES:+.yaml}" --seeds "$seeds" ${models:+--models "$models"} \
      --best-lr $options --budget $((seconds - 8)) --output "$OUT" >> "$OUT-logs/$name.txt" 2>&1
  done
}
has() { [[ $PARTS == *",$1,"* ]]; }
RECALL="--no-compile-layers --together 24"
has recall && jobs_of recall "$RECALL" \
  "recall:0,1,2:transformer,nha 256K,window 256K,linear 256K,nha 255K 124 slots,nha 256K random windows" \
  "copying:0,1,2:transformer,nha,window,linear" "in-context:0,1,2:transformer,nha,window,linear" \
  "recall:0,1,2:nha 120K,window 120K,linear 120K,nha 119K 48 slots,nha 256K without slots,linear 128K" &
has layer && jobs_of layer-recall "$RECALL" "layer-recall:0,1:" &
has peers && jobs_of peers "$RECALL" "recall:0:gated deltanet,gla,gsa" &
if has language || has large || has layer; then
  python3 - "${NHA_QUALITY_MODEL:-smollm2}" "$WORK/tokenizer" > "$OUT-logs/tokenizer.txt" 2>&1 << 'P'
import sys
from experiments.second_model import load_tokenizer
load_tokenizer(sys.argv[1]).save_pretrained(sys.argv[2])
P
  [ -f "$CORPUS/meta.json" ] || python3 -m nha train "$WORK/run" --tokenizer "$WORK/tokenizer" --text "$DATA/text/train.jsonl.xz" \
    --corpus "$CORPUS" --prepare-only > "$OUT-logs/corpus.txt" 2>&1
  ln -s "$DATA"/eval/* "$DATA/text/heldout.jsonl.xz" "$WORK/data/"
  TEXT="--reserve 20 --tokenizer $WORK/tokenizer --corpus $CORPUS --data $WORK/data"
  for i in 1 2 3; do
    has language && jobs_of "language-$i" "$TEXT --shard $i/3" "language-muon:0,1,2:" &
  done
  has large && { # rows of 60 M one after another: beside other processes they ended with launch failures
    jobs_of large "$TEXT" "language-60m:0:nha,transformer,linear,window"
    for i in 1 2; do jobs_of "large-$i" "$TEXT --shard $i/2" "windows:0:" & done
    wait
  } &
  for i in 1 2; do
    has layer && jobs_of "layer-$i" "$TEXT --shard $i/2" "layer:0:" "layer:1,2:plain,qk norm,convolution" &
  done
fi
wait
tail -n 3 "$OUT"-logs/*.txt
