#!/usr/bin/env bash
# bash run_all.sh         makes every run listed below that is not done yet, then results/tables.md. Environment:
#                         DATA_ROOT=data               where the datasets are       SEEDS="0 1 2"     GPU=0, or GPU=cpu
#                         ONLY="rp-scenes sspa-ucm"    only runs whose names begin so ("rp-scenes$": that one alone)
#                         DATASETS="voc2007 ucm"       both methods on these, instead of those listed
#                         CLIP="--backbone RN50 --pretrained FILE"      on photographs; default: ViT-B-16, OpenAI's
#                         OPTIONS="--limit 500"        more options of both scripts; --overwrite: finished runs anew
#                         RUNS=FOLDER                  of runs and tables, for runs with other CLIP, OPTIONS or SEEDS
#                         FEATURES=FILE.npz            ready embeddings             TEXTS=FOLDER      <dataset>.jsonl
# bash run_all.sh --plan  prints the command of every run, and makes none
# bash run_all.sh demo    trains RP and SSPA on the built-in scenes, prints one table, tags and explains pictures
# bash run_all.sh tag WORDS.txt PHOTOS/ [--llm URL] [--model NAME] [--count N] [then any options of adapter_rp.py, as
#                         --backbone ViT-L-14 --pretrained TAG-OR-FILE --threshold 0.6 --top-k 5 --html FILE]
#                         from label names, one a line, to tagged photos: sentences, an adapter, a JSON line a photo
# bash run_all.sh test    runs the tests; more words go to pytest
set -eo pipefail
CALLED_FROM="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")" && HERE="$PWD"
trap 'exit 130' INT  # else the next run would begin

experiments() {
    for dataset in scenes features ${DATASETS:-voc2007 coco2014 nuswide}; do
        rp "$dataset" --noise-std 0.15 0 0.05 0.1 0.2
        rp "$dataset-unit" --normalize --noise-std 0.15 0 0.05 0.1 0.2
        rp "$dataset-uniform" --noise-law uniform
        rp "$dataset-sphere" --noise-law sphere
        if [ "$dataset" = features ]; then steps=960; else steps=480; fi  # of its main run; a batch has 512
        for count in 250 500 1000 2000 4000; do
            rp "$dataset-$count-texts" --text-count $count --epochs $((steps/((count+511)/512))) --noise-std 0.15 0
        done
    done
    rp features-8000-texts --text-count 8000 --epochs 60 --noise-std 0.15 0
    drawn=("sun cloud balloon mushroom car apple" "moon bird tree umbrella boat cup" "star kite flower house fish ball")
    seen=("aeroplane boat car cow horse pottedplant train" "bicycle bottle cat diningtable motorbike sheep tvmonitor" \
          "bird bus chair dog person sofa")
    for third in 0 1 2; do  # labels that training never sees
        rp scenes-unseen-$third --head label-embedding --unseen ${drawn[third]}
        rp features-unseen-$third --head label-embedding --unseen ${seen[third]}
        sspa scenes-unseen-$third --tune-image none --limit 4000 --epochs 8 --unseen ${drawn[third]}
    done
    [ -f "$RUNS/baselines/baselines.json" ] || run baselines experiments/baselines.py --features "$FEATURES"
    [ -f "$RUNS/rp-cost/benchmark.json" ] || run rp-cost experiments/benchmark.py cost
    sspa scenes --tune-image none --save-all
    for count in 50 100 250 500 1000 4000; do  # 1,240 batches of up to 64 for each; the whole, above, has 6,240
        sspa scenes-$count-photos --tune-image none --photo-count $count --epochs $((1240/(count<64 ? 1 : count/64)))
    done
    sspa scenes-ablations --ablate --limit 4000 --epochs 8 --save-all
    sspa scenes-tuned --tune-image full --limit 4000 --epochs 8 --save-all
    # not all ablations: with a tuned tower the pictures are drawn anew in every epoch, which takes most of the time
    sspa scenes-tuned-ablations --ablate "no gate" "no GDMA" --tune-image full --limit 1000 --epochs 8 --save-all
    for models in scenes scenes-ablations scenes-tuned scenes-tuned-ablations; do
        [ -f "$RUNS/maps-$models/localize.json" ] || \
            run "maps-$models" experiments/localize.py --limit 400 --checkpoint "$RUNS/sspa-$models/checkpoints"
    done
    for dataset in ${DATASETS:-voc2007 coco2014 nuswide pa100k rapv1 peta multiscene mlrsnet ucm}; do
        sspa "$dataset" --tune-image none
        sspa "$dataset-tuned" --tune-image full --gpu "${GPU:-0}"  # without a GPU it says so, and is not started
    done
    for dataset in ${DATASETS:-voc2007}; do
        rp "$dataset-llm" --texts "$TEXTS/$dataset"*.jsonl* --noise-std 0.15 0
        sspa "$dataset-ablations" --ablate
    done
}

rp() { train adapter_rp.py "rp-$1" "$@"; }
sspa() { train sspa.py "sspa-$1" "$@"; }
train() {  # SCRIPT NAME DATASET[-VARIANT] OPTIONS
    case "${3%%-*}" in
        scenes) where=() ;;
        features) where=(--features "$FEATURES") ;;
        *) where=(--dataset "${3%%-*}" --data-root "$DATA_ROOT" $CLIP) ;;
    esac
    run "$2" "$1" "${where[@]}" "${@:4}" --seed ${SEEDS:-0 1 2} ${GPU:+--gpu $GPU} $OPTIONS
}
run() {  # NAME SCRIPT WORDS. $RUNS/NAME: the run; NAME.log: what it said; NAME.reason: why it came to nothing
    [[ "$1" =~ ^(${ONLY// /|}) ]] || return 0
    local at="$RUNS/$1"
    set -- python "${@:2}" --output "$at"
    if [ "$plan" ]; then printf '%q ' "$@"; echo; return; fi
    printf '%s: ' "$at"
    if "$@" > "$at.log" 2>&1; then rm -f "$at.reason"; echo "done"; else tail -n 1 "$at.log" | tee "$at.reason"; fi
}
fail() { echo "run_all.sh: $1" >&2; exit 2; }
absolute() { case "$1" in "") echo "$2" ;; /*) echo "$1" ;; *) echo "$CALLED_FROM/$1" ;; esac; }  # PATH DEFAULT
set_up() {  # an active virtual environment is used as it is, else .venv is made; a torch that is there stays
    [ "$VIRTUAL_ENV" ] || [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv \
        || { rm -rf .venv; fail "cannot make .venv; on Debian and Ubuntu: apt install python3-venv"; }
    export VIRTUAL_ENV="${VIRTUAL_ENV:-$HERE/.venv}" PATH="${VIRTUAL_ENV:-$HERE/.venv}/bin:$PATH"
    python -c 'import sys, importlib.util as of; sys.exit(None in map(of.find_spec, sys.argv[1:]))' \
        torch torchvision open_clip sklearn PIL safetensors tqdm pytest && return
    echo "installing; without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares gigabytes" >&2
    if python -c 'import torch, torchvision' 2> /dev/null; then kept='^torch'; else kept='^$'; fi
    grep -v "$kept" requirements.txt > "$VIRTUAL_ENV/requirements.txt"
    python -m pip install --disable-pip-version-check -q -r "$VIRTUAL_ENV/requirements.txt" || fail "pip failed"
}

case "$1" in "" | demo | tag | test) set_up ;; esac
case "$1" in
    "" | --plan)
        plan="$1" RESULTS="${RUNS:-results}/tables.md" RUNS="${RUNS:-runs/tables}"
        DATA_ROOT="$(absolute "$DATA_ROOT" data)" TEXTS="$(absolute "$TEXTS" assets/texts)"
        FEATURES="$(absolute "$FEATURES" ../shared/data/photo_embeddings/voc2007_even.npz)"
        if [ "$GPU" = cpu ]; then export CUDA_VISIBLE_DEVICES= GPU=; fi
        [ "$plan" ] || mkdir -p "$RUNS"
        experiments
        [ "$plan" ] || python experiments/tables.py --runs "$RUNS" --results "$RESULTS"
        ;;
    demo)
        rp=runs/demo/rp sspa=runs/demo/sspa pictures=runs/demo/pictures
        python scenes.py draw $pictures --count 12 >&2
        python adapter_rp.py --noise-std 0.15 0 --seed 0 1 2 3 4 --output $rp --overwrite > /dev/null
        python sspa.py --tune-image none --epochs 8 --seed 0 1 --output $sspa --overwrite > /dev/null
        python adapter_rp.py --checkpoint $rp/checkpoint.safetensors --predict $pictures > $rp/predictions.jsonl
        python sspa.py --checkpoint $sspa/checkpoint.safetensors --predict $pictures > $sspa/predictions.jsonl
        python sspa.py --checkpoint $sspa/checkpoint.safetensors --explain $pictures > $sspa/explain.txt
        python experiments/tables.py --demo runs/demo
        ;;
    tag)
        cd "$CALLED_FROM"
        [ -f "$2" ] && [ -e "$3" ] || fail "tag needs a label file and a folder of photos, before any option; see -h"
        words="$2" photos="$3" author=()
        PYTHONPATH="$HERE" python -c 'import sys, data
try: data.list_photos(sys.argv[1])
except data.UsageError as error: sys.exit(f"run_all.sh: {error}")' "$photos" || exit 2
        shift 3
        while [[ "$1" =~ ^--(llm|model|count)$ ]]; do
            author+=("$1=$2")
            shift 2 || fail "tag: $1 needs a value"
        done
        if [[ "${author[*]}" = *--llm* ]]; then  # all else is tried before a model writes for an hour
            bash "$HERE/run_all.sh" tag "$words" "$photos" --count 100 "$@" > /dev/null
        fi
        folder="$HERE/runs/tag/$(cat "$words" - <<< "${author[*]/--count=*/}" | cksum | cut -d ' ' -f 1)"
        set -- --backbone ViT-B-32 --cache "$HERE/runs/cache" --output "$folder" "$@"
        python "$HERE/llm_text.py" sentences --labels "$words" --out "$folder/texts.jsonl" --quiet "${author[@]}" >&2
        python "$HERE/adapter_rp.py" --labels "$words" --texts "$folder/texts.jsonl" --overwrite "$@" >&2
        python "$HERE/adapter_rp.py" --checkpoint "$folder/checkpoint.safetensors" --predict "$photos" "$@"
        ;;
    test) python -m pytest -q -rs tests "${@:2}" ;;
    -h | --help) sed -n '2,15s/^# //p' run_all.sh ;;
    *) fail "no command '$1'; -h lists them" ;;
esac
