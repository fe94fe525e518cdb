#!/usr/bin/env bash
# bash run_all.sh         every table: sets up what is missing, prints the plan, runs what can be run with the data under DATA_ROOT,
#                         goes on where it stopped, writes results/tables.md; --plan only plans, --overwrite does finished runs again. Environment:
#                         DATA_ROOT=data     where the datasets are          SEEDS="0 1 2"        GPU=0, or GPU=cpu; without it a GPU is used if there is one
#                         ONLY="rp-main ucm" tables, datasets or runs        MINUTES=240          longest run to be started (on a GPU: no limit)
#                         CLIP="--backbone RN50 --pretrained FILE"           CLIP on photographs (default: ViT-B-16, OpenAI's weights)
#                         OPTIONS="--limit 500 --epochs 1"                   more options of both scripts, to try things out
#                         FEATURES=FILE.npz  ready embeddings (empty: none)  TEXTS=FOLDER         <dataset>.jsonl: sentences for RP, one {"text", "labels"} a line
# bash run_all.sh demo    sets up what is missing, trains RP and SSPA on the built-in scenes, prints one table, tags and explains pictures
# bash run_all.sh tag WORDS.txt PHOTOS/ [--llm URL] [--count N] [options of llm_text.py and adapter_rp.py]
#                         from a list of label names to tagged photos: sentences for the labels, an adapter, one JSON line a photo
# bash run_all.sh test    sets up what is missing, runs the test suite
# An active virtual environment is used as it is; otherwise .venv is made here. pip's own settings (PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL, pip.conf) decide where packages come from.
set -euo pipefail
CALLED_FROM="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() { sed -n '2,14s/^# //p' "$PWD/run_all.sh"; }

set_up() {
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3" >&2; exit 2; }
            echo "making .venv" >&2
            "${PYTHON:-python3}" -m venv .venv || { rm -rf .venv; echo "cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
        fi
        export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    fi
    # a torch that is already there stays: only an environment that lacks something is touched
    if ! python -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("torch", "torchvision", "open_clip", "sklearn", "PIL", "safetensors", "tqdm", "pytest")))'; then
        echo "installing requirements.txt (on Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA packages)" >&2
        local pins='.'
        if python -c 'import torch, importlib.util as u, sys; sys.exit(u.find_spec("torchvision") is None)' 2> /dev/null; then pins='^(torch|torchvision)=='; fi
        { if [ "$pins" = . ]; then cat requirements.txt; else grep -vE "$pins" requirements.txt; fi; } > "$VIRTUAL_ENV/requirements.txt"
        python -m pip install --disable-pip-version-check -q -r "$VIRTUAL_ENV/requirements.txt" || { echo "installing failed: see pip's message above" >&2; exit 2; }
    fi
}

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$CALLED_FROM/$1" ;; esac; }

case "${1:-}" in
    "" | --plan | --overwrite)
        set_up
        for name in DATA_ROOT FEATURES TEXTS; do
            if [ -n "${!name:-}" ]; then export "$name=$(absolute "${!name}")"; fi
        done
        exec python tests/tables.py "$@"
        ;;
    demo)
        set_up
        python scenes.py draw runs/demo/pictures --count 12 >&2
        python adapter_rp.py --noise-std 0.15 0 --seed 0 1 2 3 4 --output runs/demo/rp --overwrite > /dev/null
        python adapter_rp.py --checkpoint runs/demo/rp/checkpoint.safetensors --predict runs/demo/pictures --output runs/demo/rp > runs/demo/rp/predictions.jsonl
        python sspa.py --tune-image none --epochs 8 --seed 0 1 --output runs/demo/sspa --overwrite > /dev/null
        python sspa.py --checkpoint runs/demo/sspa/checkpoint.safetensors --predict runs/demo/pictures --output runs/demo/sspa > runs/demo/sspa/predictions.jsonl
        python sspa.py --checkpoint runs/demo/sspa/checkpoint.safetensors --explain runs/demo/pictures --output runs/demo/sspa > runs/demo/sspa/explain.txt
        python - << 'EOF'
import json
from statistics import mean, stdev

rp, sspa = (json.load(open(f"runs/demo/{method}/metrics.json")) for method in ("rp", "sspa"))
def line(name, learnt, runs):
    scores = [run["mAP"] for run in runs]
    f1 = "".join(f"{mean(run['threshold_0.5'][kind] for run in runs):8.1f}" for kind in ("CF1", "OF1"))
    print(f"{name:<28}{learnt:<28}{mean(scores):8.2f} ±{stdev(scores):4.2f}{f1}")
print(f"\nscenes: {sspa['photo_count']:,} test pictures, {sspa['label_count']} labels, toy CLIP; ± over {len(rp['seeds'])} (RP) and {len(sspa['seeds'])} (SSPA) seeds\n")
print(f"{'':<28}{'learnt from':<28}{'mAP %':>14}{'CF1 %':>8}{'OF1 %':>8}")
print(f"{'zero-shot CLIP (cosine)':<28}{'nothing':<28}{sspa['zero_shot_mAP']:8.2f}")
for std in (0, 0.15):
    line(f"RP, noise {std}" if std else "RP, no noise", f"{rp['text_count']:,} sentences", [run for run in rp["runs"] if run["noise_std"] == std])
line("SSPA, image tower frozen", f"{sspa['train_count']:,} labelled pictures", sspa["runs"])
EOF
        echo
        echo "pictures: runs/demo/rp/predictions.png, runs/demo/sspa/predictions.png   (12 test pictures with what each method says of them)"
        echo "          runs/demo/sspa/explain/*.png   (where SSPA saw it)      everything else: runs/demo/{rp,sspa}/metrics.json"
        ;;
    tag)
        case " $* " in *" -h "* | *" --help "*) usage; echo "the options: python llm_text.py --help, python adapter_rp.py --help"; exit 0 ;; esac
        case "${2:--}${3:--}" in -* | *-) echo "run_all.sh tag: needs a label file and a folder of photos, before any option" >&2; usage >&2; exit 2 ;; esac
        words="$(absolute "$2")" photos="$(absolute "$3")"
        shift 3
        llm=(--quiet) identity='' adapter=(--quiet) backbone=ViT-B-32 pretrained=openai url=template
        while [ $# -gt 0 ]; do
            name="${1%%=*}" value="${2:-}" taken=2
            case "$1" in --*=*) value="${1#*=}" taken=1 ;; esac
            case "$name" in
                --llm) url="$value" llm+=(--llm "$value") identity+=" $name $value" ;;
                --model | --request-options | --max-labels | --per-request | --temperature | --language | --instruction) llm+=("$name" "$value") identity+=" $name $value" ;;
                --synonyms) value="$(absolute "$value")" llm+=("$name" "$value") identity+=" $name $value" ;;
                --count | --concurrency | --timeout | --tries | --retry-wait | --patience) llm+=("$name" "$value") ;;
                --words) llm+=("$1" "${2:-}" "${3:-}") identity+=" $*" taken=3 ;;
                --co-occurrence) llm+=("$name") identity+=" $name" taken=1 ;;
                --overwrite) llm+=("$name") taken=1 ;;
                --backbone) backbone="$value" ;;
                --pretrained) if [ -f "$(absolute "$value")" ]; then value="$(absolute "$value")"; fi; pretrained="$value" ;;
                --texts | --captions | --labels | --predict | --dataset | --output | --checkpoint) echo "run_all.sh tag: $name is chosen here; use adapter_rp.py for that" >&2; exit 2 ;;
                *) adapter+=("$1") taken=1 ;;
            esac
            shift $(( taken < $# ? taken : $# ))
        done
        if [ "$url" = template ]; then echo "no --llm: template sentences, written by a fixed grammar and not by a language model" >&2; else echo "sentences by the language model at ${url##*@}" >&2; fi
        set_up
        # one folder for one label list and one author: another list begins a new one, the same goes on
        folder="$PWD/runs/tag/$( { cat -- "$words" 2> /dev/null || true; echo "$identity"; } | cksum | cut -d ' ' -f 1)"
        output="$folder/$(basename "$photos")-$(echo "$photos $backbone" | cksum | cut -d ' ' -f 1)"
        adapter=(--backbone "$backbone" --labels "$words" --texts "$folder/texts.jsonl" --predict "$photos" --output "$output" --overwrite "${adapter[@]}")
        [ "$backbone" = scenes ] || adapter+=(--pretrained "$pretrained")
        # options, labels, photos and weights are looked at before a model writes for an hour
        python - "$words" "$photos" "$url" "${adapter[@]}" << 'EOF'
import sys

import adapter_rp
import data
import llm_text

words, photos, url, *adapter = sys.argv[1:]
try:
    config = adapter_rp.parse(adapter)
    data.read_labels(words), data.list_photos(photos)
    if url != "template":
        llm_text.Server(url, "any")
    data.load_clip(config.backbone, config.pretrained)
except data.UsageError as error:
    data.say(f"run_all.sh tag: {error}")
    sys.exit(2)
EOF
        python llm_text.py sentences --labels "$words" --out "$folder/texts.jsonl" "${llm[@]}" >&2
        python adapter_rp.py "${adapter[@]}"
        echo "texts: $folder/texts.jsonl   pictures: $output/predictions.png" >&2
        ;;
    test)
        set_up
        shift
        python -m pytest -q -rs tests "$@"
        ;;
    -h | --help | help) usage ;;
    *) echo "run_all.sh: unknown command '$1'" >&2; usage >&2; exit 2 ;;
esac
