# Cold start and speed of `nha distill` on one GPU: windows per head (one window for most heads, 20 heads of three wider kinds), then
# one window for all, each with empty caches of compiled kernels and then with those. A command that has not begun to train after its
# seconds is stopped; its stages say where the time went.
#
#     TEXT=train.jsonl MODEL=/path/SmolLM2-135M-Instruct.gguf OUT=OUT bash experiments/distill_speed.sh 400
#     ... bash experiments/distill_speed.sh 400 --steps 4 --step-tokens 640 --seq-len 320 --batch-size 2     # further options
#
# An H200 whose host ran other jobs needed 25 to 29 s from the command to a converted model and 17 to 30 s to align layers with windows
# per head; allow 200 s for the first command. Rows go to OUT/heads/distill_speed.jsonl and OUT/equal/distill_speed.jsonl as they are known.
L=$((${1:-400} - 4)) B=$(date +%s)
shift
left() { echo $((L - $(date +%s) + B)); }
W=$(mktemp -d)
export TOKENIZERS_PARALLELISM=true
WIDE=0.0=896,6.1=896,7.2=2144,8.0=2144,14.1=2144,15.2=2144,17.1=896,18.2=-1,19.1=2144,20.1=2144,20.2=2144,21.0=896,21.2=2144,22.1=896
WIDE=${WINDOWS-$WIDE,23.0=-1,23.2=2144,24.0=896,24.2=896,28.0=896,29.2=2144}
go() { # folder, at most so many seconds, command, further options
    local folder=$1 seconds=$2 name=$3
    shift 3
    [ "$(left)" -gt "$seconds" ] || seconds=$(left)
    [ "$seconds" -gt 20 ] || { echo "$folder $name not run: $seconds s are left"; return; }
    mkdir -p "$OUT/$folder"
    timeout -k 5 $((seconds + 3)) python3 -m experiments.distill_speed --model "$MODEL" --text "$TEXT" --output "$OUT/$folder" \
        --work "$W/$folder" --budget-s "$seconds" --commands "$name" --steps 40 "$@" 2>&1 | tee -a "$OUT/log.txt"
    [ ! -d "$W/$folder/base" ] || MODEL=$W/$folder/base
}
go heads 220 cold --windows "$WIDE" "$@"
go equal 130 cold "$@"
go heads 90 warm --windows "$WIDE" "$@"
go equal 90 warm "$@"
rm -rf "$W"
