#!/usr/bin/env bash
# Prepares the data of all ablations here in runs/ablation-data, below the folder that it is started in.
#   EMBEDWRIGHT_DATA=FOLDER recipes/ablations/data.sh      FOLDER/train has the files, FOLDER/dev what must not leak
# ROWS of each file (default 3000; 0: all) and DOCS docstrings (default 3000). What is there already is not made again.
#   clean/NAME.parquet          pairs without negatives, for mining.yaml, which mines in the run
#   data/NAME.parquet           pairs with 4 mined negatives; labelled texts by example, or by label where there are two
#   data/NAME-label.parquet     labelled texts by label, for labels.yaml
#   docs/                       the demo's docstrings with 7 negatives, and 1000 questions held out, for second-stage.yaml
set -euo pipefail
: "${EMBEDWRIGHT_DATA:?set it to the folder that has train/ and dev/}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=runs/ablation-data
export ROWS=${ROWS:-3000}
OUT=$out TRAIN=0 "$here/../offline.sh"

for name in clinc150 newsgroups; do
  if [ ! -s "$out/data/$name-label.parquet" ]; then
    echo "== labels $name, by label"
    embedwright data labels "$out/raw/$name.jsonl" --form label --negatives 4 --task "$name" \
      --out "$out/raw/$name-label.parquet"
    embedwright data clean "$out/raw/$name-label.parquet" --against "$EMBEDWRIGHT_DATA/dev" --language en \
      --out "$out/data/$name-label.parquet"
  fi
done

docs=$out/docs
if [ ! -e "$docs" ]; then
  echo "== docstrings"
  python -c "
from pathlib import Path
from embedwright.demo.docstrings import build
build(Path('$docs'), heldout_share=0.2, max_train=${DOCS:-3000}, max_queries=1000)"
fi
if [ ! -s "$docs/heldout/second-stage.yaml" ]; then
  python "$here/within_library.py" "$docs/heldout"
fi
if [ ! -s "$docs/train/mined.jsonl" ]; then
  embedwright mine "$docs/train/pairs.jsonl" --teacher minilm --negatives 7 --out "$docs/train/mined.jsonl" \
    --task "Given the summary of a Python function or class, retrieve the rest of its documentation"
fi
