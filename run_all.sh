#!/usr/bin/env bash
# bash run_all.sh         makes every run listed below that is not done yet, then runs/tables/tables.md. Environment:
#                         DATA_ROOT=data               where the datasets are       SEEDS="0 1 2"     GPU=0, or GPU=cpu
#                         ONLY="rp-scenes sspa-ucm"    only runs whose names begin so ("rp-scenes$": that one alone)
#                         DATASETS="voc2007 ucm"       both methods on these, instead of those listed
#                         CLIP="--backbone RN50 --pretrained FILE"      on photographs; default: ViT-B-16, OpenAI's
#                         OPTIONS="--train-count 500"  more options of both scripts; --overwrite: finished runs anew
#                         RUNS=FOLDER                  of runs and tables, for runs with other CLIP, OPTIONS or SEEDS
#                         FEATURES=FILE.npz            ready embeddings             TEXTS=FOLDER      <dataset>.jsonl
#                         UCM_ROOT=../shared/data      where ucm is, for the runs with the toy CLIP
#                         JOBS=2                       how many runs at a time; the cores are shared out
# bash run_all.sh --plan  prints the command of every run, and makes none
# bash run_all.sh demo    trains RP and SSPA on the built-in scenes, prints one table, tags and explains pictures
# bash run_all.sh tag WORDS.txt PHOTOS/ [--llm URL] [--model NAME] [--count N] [options of adapter_rp.py and tag.py, as
#                         --backbone ViT-L-14 --pretrained TAG-OR-FILE --threshold 0.6 --html --csv --xmp --output DIR]
#                         from label names, one a line, to tagged photos: sentences, an adapter, tags/tags.jsonl
# bash run_all.sh test    runs the tests; more words go to pytest
set -eo pipefail
CALLED_FROM="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")" && HERE="$PWD"
if [ "$CALLED_FROM" = "$HERE" ]; then FROM=; else FROM="$CALLED_FROM/"; fi  # short paths in recorded commands
trap 'kill -INT -- $(jobs -pr | sed s/^/-/) 2> /dev/null || :; wait; exit 130' INT HUP TERM  # ends the runs, too

experiments() {
    # the longest first, so that none is left over in the end: SSPA whole, tuned on UCM, and its learning curve
    seeds="0 1 2"
    sspa scenes --tune-image none --save-all
    sspa ucm-toy-tuned --tune-image full --backbone scenes --lr 6e-3
    once curve curve.json experiments/curve.py --seed ${SEEDS:-$seeds}

    for dataset in scenes features ${DATASETS:-voc2007 coco2014 nuswide}; do  # RP: noise, magnitude, number of texts
        seeds="0 1 2 3 4"
        for noise in "" "--noise-std 0"; do rp "$dataset${noise// /-}" $noise; done
        seeds="0 1 2"
        for noise in 0.05 0.1 0.2; do rp "$dataset--noise-std-$noise" --noise-std $noise; done
        for noise in "" "--noise-std 0"; do rp "$dataset-unit${noise// /-}" --normalize $noise; done
        if [ "$dataset" = features ]; then steps=960 option=--train-count; else steps=480 option=--text-count; fi
        for count in 250 4000; do  # as many steps as the main run, of 512 texts each
            rp "$dataset-$count-texts" $option $count --epochs $((steps/((count+511)/512)))
        done
    done
    rp scenes-uniform --noise-law uniform
    rp scenes-sphere --noise-law sphere
    for noise in "" "--noise-std 0"; do rp "features-linear${noise// /-}" --adapter linear $noise; done

    # what scores and probabilities are worth: docs/probabilities.md
    for dataset in scenes features; do rp "$dataset--gamma-neg-0" --gamma-neg 0; done
    for count in 1 4; do
        words "first-$count-drawn.txt" $(echo sun star bird car | cut -d " " -f "1-$count")
        rp "scenes-first-$count" --dataset scenes --labels "$RUNS/first-$count-drawn.txt"
        words "first-$count-seen.txt" $(echo car dog chair bottle | cut -d " " -f "1-$count")
        rp "features-first-$count" --labels "$RUNS/first-$count-seen.txt"
    done
    if ! [ "$plan" ] && wanted rp-scenes-templates; then
        python llm_text.py sentences --dataset scenes --llm template --count 8000 --out "$RUNS/templates.jsonl" --quiet
    fi
    rp scenes-templates --texts "$RUNS/templates.jsonl"
    once thresholds-features thresholds.json experiments/thresholds.py --features "$FEATURES" --seed ${SEEDS:-$seeds}
    once thresholds-scenes thresholds.json experiments/thresholds.py --seed ${SEEDS:-$seeds}

    drawn=("sun cloud balloon mushroom car apple" "moon bird tree umbrella boat cup" "star kite flower house fish ball")
    seen=("aeroplane boat car cow horse pottedplant train" "bicycle bottle cat diningtable motorbike sheep tvmonitor" \
          "bird bus chair dog person sofa")
    seeds=0
    for third in 0 1 2; do  # labels that training never sees
        rp scenes-unseen-$third --head label-embedding --unseen ${drawn[third]}
        rp features-unseen-$third --head label-embedding --unseen ${seen[third]}
        sspa scenes-unseen-$third --tune-image none --train-count 2000 --epochs 8 --unseen ${drawn[third]}
    done
    seeds="0 1 2"

    # what one would try first
    once baselines-features baselines.json experiments/baselines.py --features "$FEATURES"
    once baselines-scenes baselines.json experiments/baselines.py
    aerial=(--dataset ucm --data-root "$UCM_ROOT" --backbone scenes)
    once baselines-ucm-toy baselines.json experiments/baselines.py "${aerial[@]}"

    # UCM, whole, aerial photos, with the toy CLIP, which knows drawn things alone
    if ! [ "$plan" ]; then  # a sentence a line
        python -c 'import json, sys; print(*json.load(sys.stdin)["descriptions"].values(), sep="\n")' \
            < assets/descriptions/ucm.json > "$RUNS/ucm-descriptions.txt"
    fi
    rp ucm-toy --backbone scenes
    rp ucm-toy-descriptions --backbone scenes --texts "$RUNS/ucm-descriptions.txt" --epochs 480
    sspa ucm-toy --tune-image none --backbone scenes --lr 6e-3
    sspa ucm-toy--lr-5e-5 --tune-image none --backbone scenes --lr 5e-5

    # SSPA on scenes: ablations, where maps point
    ablations=("" "--fusion knowledge" "--fusion context" "--fusion concat" "--no-dsf" "--no-gate" "--alignment none" \
               "--descriptions none" "--aggregator mean" "--branches global")
    for ablation in "${ablations[@]}"; do
        sspa "scenes-short${ablation// /-}" --tune-image none --train-count 2000 --epochs 8 --save-all $ablation
    done
    wait  # for the models
    for run in scenes scenes-short scenes-short--alignment-none; do maps $run; done

    wait  # times are measured alone
    once rp-cost benchmark.json experiments/benchmark.py cost
    wait

    # photographs
    for dataset in ${DATASETS:-voc2007 coco2014 nuswide pa100k rapv1 peta multiscene mlrsnet ucm}; do
        sspa "$dataset" --tune-image none
        sspa "$dataset-tuned" --tune-image full --gpu "${GPU:-0}"  # without a GPU it says so, and is not started
    done
    for dataset in ${DATASETS:-voc2007}; do
        for noise in "" "--noise-std 0"; do
            rp "$dataset-llm${noise// /-}" --texts "$TEXTS/$dataset"*.jsonl* $noise
        done
        for ablation in "${ablations[@]:1}"; do
            sspa "$dataset-tuned${ablation// /-}" --tune-image full --gpu "${GPU:-0}" $ablation
        done
    done
}

rp() { train adapter_rp.py "rp-$1" "$@"; }
sspa() { train sspa.py "sspa-$1" "$@"; }
maps() { once "maps-$1" localize.json experiments/localize.py --test-count 400 --checkpoint "$RUNS/sspa-$1/checkpoints"
}
wanted() { [[ "$1" =~ ^(${ONLY// /|}) ]]; }
words() { [ "$plan" ] || printf '%s\n' "${@:2}" > "$RUNS/$1"; }  # FILE WORDS
once() { [ -f "$RUNS/$1/$2" ] || run "$1" "${@:3}"; }  # NAME RESULT SCRIPT WORDS
train() {  # SCRIPT NAME DATASET[-VARIANT] OPTIONS
    case "${3%%-*}" in
        scenes) where=() ;;
        features) where=(--features "$FEATURES") ;;
        ucm) where=(--dataset ucm --data-root "$DATA_ROOT" $CLIP)
            if [[ "$3" = ucm-toy* ]]; then where=(--dataset ucm --data-root "$UCM_ROOT"); fi ;;
        *) where=(--dataset "${3%%-*}" --data-root "$DATA_ROOT" $CLIP) ;;
    esac
    run "$2" "$1" "${where[@]}" "${@:4}" --seed ${SEEDS:-$seeds} ${GPU:+--gpu $GPU} $OPTIONS
}
run() {  # NAME SCRIPT WORDS, while less than $JOBS others run
    wanted "$1" || return 0
    if [ "$plan" ]; then printf '%q ' python "${@:2}" --output "$RUNS/$1"; echo; return; fi
    while [ "$(jobs -pr | wc -l)" -ge "$JOBS" ]; do wait -n || :; done
    set -m  # a process group of its own, which Ctrl-C ends by the trap above
    finish "$RUNS/$1" python "${@:2}" --output "$RUNS/$1" &
    set +m
}
finish() {  # AT COMMAND. AT: the run; AT.log: what it said; AT.reason: why it came to nothing
    if "${@:2}" > "$1.log" 2>&1; then rm -f "$1.reason"; echo "$1: done"; return; fi
    tail -n 1 "$1.log" > "$1.reason"
    echo "$1: $(cat "$1.reason")"
}
fail() { echo "run_all.sh: $1" >&2; exit 2; }
absolute() { case "$1" in "") echo "$2" ;; /*) echo "$1" ;; *) echo "$FROM$1" ;; esac; }  # PATH DEFAULT
set_up() {  # an active virtual environment is used as it is, else .venv is made; a torch that is there stays
    [ "$VIRTUAL_ENV" ] || [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv \
        || { rm -rf .venv; fail "cannot make .venv; on Debian and Ubuntu: apt install python3-venv"; }
    export VIRTUAL_ENV="${VIRTUAL_ENV:-$HERE/.venv}" PATH="${VIRTUAL_ENV:-$HERE/.venv}/bin:$PATH"
    python -c 'import sys, importlib.util as of; sys.exit(None in map(of.find_spec, sys.argv[1:]))' \
        torch torchvision open_clip sklearn PIL safetensors tqdm filelock pytest && return
    echo "installing; without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares gigabytes" >&2
    if python -c 'import torch, torchvision' 2> /dev/null; then kept='^torch'; else kept='^$'; fi
    grep -v "$kept" requirements.txt > "$VIRTUAL_ENV/requirements.txt"
    python -m pip install --disable-pip-version-check -q -r "$VIRTUAL_ENV/requirements.txt" || fail "pip failed"
}

case "$1" in "" | demo | tag | test) set_up ;; esac
case "$1" in
    "" | --plan)
        plan="$1" RUNS="${RUNS:-runs/tables}"
        DATA_ROOT="$(absolute "$DATA_ROOT" data)" TEXTS="$(absolute "$TEXTS" assets/texts)"
        UCM_ROOT="$(absolute "$UCM_ROOT" ../shared/data)"
        FEATURES="$(absolute "$FEATURES" ../shared/data/photo_embeddings/voc2007_even.npz)"
        if [ "$GPU" = cpu ]; then export CUDA_VISIBLE_DEVICES= GPU=; fi
        [ "$plan" ] || mkdir -p "$RUNS"
        JOBS="${JOBS:-2}"
        [ "$GPU" ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + JOBS - 1) / JOBS))}"
        experiments
        wait
        [ "$plan" ] || python experiments/tables.py --runs "$RUNS"
        ;;
    demo)
        at=runs/demo rp=runs/demo/rp/checkpoint.safetensors sspa=runs/demo/sspa/checkpoint.safetensors
        rm -rf $at
        echo "1 of 3: RP learns from 8,000 sentences, with noise and without; about a minute" >&2
        python adapter_rp.py --seed 0 1 2 --output $at/rp > /dev/null
        python adapter_rp.py --noise-std 0 --seed 0 1 2 --output $at/rp-no-noise > /dev/null
        python experiments/tables.py --demo $at
        echo "2 of 3: SSPA learns from 10,000 labelled pictures, which are drawn first; about two minutes" >&2
        python sspa.py --tune-image none --train-count 10000 --epochs 8 --output $at/sspa > /dev/null
        echo "3 of 3: both tag 12 pictures, and SSPA shows where it saw their labels; half a minute" >&2
        python scenes.py draw $at/pictures --count 12 >&2
        python tag.py $rp $at/pictures --output $at/rp/tags > /dev/null
        python tag.py $sspa $at/pictures --output $at/sspa/tags > /dev/null
        python explain.py $sspa $at/pictures --output $at/sspa/explain > /dev/null
        python experiments/tables.py --demo $at
        ;;
    tag)
        cd "$CALLED_FROM"
        [ "$3" ] || fail "tag needs a label file and a folder of photos, before any option; see -h"
        [ -f "$2" ] || fail "label file $2: no such file; write one, a name a line"
        [ -e "$3" ] || fail "photos $3: no such file or folder; give a folder of photos, before any option"
        words="$2" photos="$3" author=() learn=() tag=()
        PYTHONPATH="$HERE" python -c 'import sys, data
try: data.list_photos(sys.argv[1])
except data.UsageError as error: sys.exit(f"run_all.sh: {error}")' "$photos" || exit 2
        shift 3
        into=learn
        for word in "$@"; do  # whose option it is; a word that is none belongs to the option before it
            case "${word%%=*}" in
                --llm | --model | --count) into=author ;;
                --threshold | --top-k | --html | --csv | --xmp | --stdout | --output) into=tag ;;
                --gpu | --cpu | --cache | --workers | --quiet) into=both ;;
                --*) into=learn ;;
            esac
            case $into in author) author+=("$word") ;; tag | both) tag+=("$word") ;; esac
            case $into in learn | both) learn+=("$word") ;; esac
        done
        if [[ "${author[*]}" = *--llm* ]]; then  # all else is tried before a model writes for an hour
            bash "$HERE/run_all.sh" tag "$words" "$photos" --count 100 "${learn[@]}" "${tag[@]}" --stdout > /dev/null
        fi
        source="$(sed 's/--count[ =]*[0-9]*//' <<< "${author[*]}")"  # more sentences are the same source
        folder="$HERE/runs/tag/$(cat "$words" - <<< "$source" | cksum | cut -d ' ' -f 1)"
        python "$HERE/llm_text.py" sentences --labels "$words" --out "$folder/texts.jsonl" --quiet "${author[@]}" >&2
        python "$HERE/adapter_rp.py" --backbone ViT-B-32 --cache "$HERE/runs/cache" --output "$folder" --overwrite \
            --labels "$words" --texts "$folder/texts.jsonl" "${learn[@]}" >&2
        python "$HERE/tag.py" "$folder/checkpoint.safetensors" "$photos" --cache "$HERE/runs/cache" "${tag[@]}"
        ;;
    test) python -m pytest -q -rs tests "${@:2}" ;;
    -h | --help) sed -n '2,17s/^# //p' run_all.sh ;;
    *) fail "no command '$1'; -h lists them" ;;
esac
