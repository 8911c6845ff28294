#!/usr/bin/env bash
# The whole chain on local files: build, clean and decontaminate, labels, mine, then the two stages of offline.yaml.
#   EMBEDWRIGHT_DATA=FOLDER recipes/offline.sh      FOLDER/train has the files, FOLDER/dev what must not leak from it
# ROWS of each file (default 1500, drawn with a fixed seed; 0: all). What is there already is not made again.
# TRAIN=0 stops before the training, and OUT is where the data goes (recipes/ablations/data.sh uses both).
set -euo pipefail
: "${EMBEDWRIGHT_DATA:?set it to the folder that has train/ and dev/}"
out=${OUT:-runs/offline}
mkdir -p $out/raw $out/clean $out/data

build() { # NAME FILE
  [ -s "$out/raw/$1.jsonl" ] && return
  echo "== build $1"
  gzip -dc "$EMBEDWRIGHT_DATA/train/$2" |
    if [ "${ROWS:-1500}" = 0 ]; then cat; else shuf -n "${ROWS:-1500}" --random-source=<(yes); fi >"$out/raw/$1.part"
  wc -l <"$out/raw/$1.part"
  mv "$out/raw/$1.part" "$out/raw/$1.jsonl"
}

clean() { # FROM TO: repeats, other languages, what leaks from dev
  [ -s "$2" ] && return
  echo "== clean $1"
  embedwright data clean "$1" --against "$EMBEDWRIGHT_DATA/dev" --language en --out "$2"
}

mined() { # NAME FILE INSTRUCTION
  build "$1" "$2"
  clean "$out/raw/$1.jsonl" "$out/clean/$1.parquet"
  [ -s "$out/data/$1.parquet" ] && return
  echo "== mine $1"
  embedwright mine "$out/clean/$1.parquet" --teacher minilm --negatives 4 --task "$3" --out "$out/data/$1.parquet"
}

labelled() { # NAME FILE
  build "$1" "$2"
  if [ ! -s "$out/raw/$1.parquet" ]; then
    echo "== labels $1"
    embedwright data labels "$out/raw/$1.jsonl" --negatives 4 --task "$1" --out "$out/raw/$1.parquet"
  fi
  clean "$out/raw/$1.parquet" "$out/data/$1.parquet"
}

mined debian debian-packages.pairs.jsonl.gz "Given the short description of a software package, retrieve its long description"
mined foldoc foldoc.pairs.jsonl.gz "Given a term of computing, retrieve its definition"
mined wordnet wordnet-glosses.pairs.jsonl.gz "Given a word, retrieve its definition"
mined perlfaq perlfaq.pairs.jsonl.gz "Given a question about Perl, retrieve its answer"
mined sts sts12-13.scored.jsonl.gz "Retrieve semantically similar text"
labelled clinc150 clinc150.labeled.jsonl.gz
labelled newsgroups newsgroups20.labeled.jsonl.gz
labelled sentiment review-sentiment.labeled.jsonl.gz
[ "${TRAIN:-1}" = 0 ] && exit
echo "== train"
embedwright train recipes/offline.yaml
