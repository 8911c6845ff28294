#!/usr/bin/env bash
# Prepares all data of flagship-135m.yaml in runs/flagship-data, below the folder that it is started in. No neural model
# takes part: pairs are made by rules, negatives are mined by BM25, and the second stage mines again inside the run.
#   EMBEDWRIGHT_DATA=FOLDER recipes/flagship/data.sh     FOLDER/train has labelled files, FOLDER/dev what must not leak
# Needs apt (Debian or Ubuntu, no root) for the texts; texts.py says what to do elsewhere. It took 40 minutes on two busy cores.
# DOCS documents of each text become passages (default 10000), ASKED of them questions (default 20000).
# What is there already is not made again: after a stop, start it again. README.md says what each file is for.
#   text/NAME.jsonl       documents, with text/NAME.licence
#   raw/, clean/, mine/   examples, then without repeats and without what leaks from FOLDER/dev
#   1/NAME.jsonl          stage retrieval: one BM25 negative a row
#   2/NAME.jsonl          stage generalist: other rows, which the run mines by the model; labels by example; scored pairs
set -euo pipefail
: "${EMBEDWRIGHT_DATA:?set it to the folder that has train/ and dev/}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=runs/flagship-data
docs=${DOCS:-10000} asked=${ASKED:-20000}
mkdir -p $out/{text,some,raw,clean,mine,1,2}

say() { echo "$(date +%T) $*"; }

put() { # TO, whole or not at all, from standard input
  cat >"$1.part" && mv "$1.part" "$1"
}

some() { # NAME COUNT: the first so many documents, which are a sample
  head -n "$2" "$out/text/$1.jsonl" | put "$out/some/$1.jsonl"
}

made() { # NAME TEXT COUNT WAYS [MORE...]: examples of a text's documents, clean
  [ -s "$out/clean/$1.jsonl" ] && return
  say "pairs $1"
  some "$2" "$3"
  embedwright data pairs "$out/some/$2.jsonl" --how "$4" --name "$2" --out "$out/raw/$1.jsonl" \
    --licence "$(cat "$out/text/$2.licence")" "${@:5}" >"$out/raw/$1.json"
  clean "$1"
}

clean() { # NAME [REPEATS]: raw/ to clean/
  [ -s "$out/clean/$1.jsonl" ] && return
  say "clean $1"
  embedwright data clean "$out/raw/$1.jsonl" --against "$EMBEDWRIGHT_DATA/dev" --language en \
    --repeats "${2:-both}" --out "$out/clean/$1.jsonl" >"$out/clean/$1.json"
}

taken() { # STAGE NAME FROM COUNT: COUNT rows of clean/NAME from row FROM on, in an order that is drawn
  local from=$out/clean/$2.jsonl
  [ ! -e "$from.tasks.jsonl" ] || cp "$from.tasks.jsonl" "$out/$1/$2.jsonl.tasks.jsonl"
  shuf --random-source="$from" "$from" | awk -v first="$3" -v count="$4" 'NR >= first && NR < first + count' |
    put "$out/$1/$2.jsonl"
}

whole() { # STAGE NAME [COUNT]: rows that are not mined: they have negatives, or need none
  [ -s "$out/$1/$2.jsonl" ] || taken "$1" "$2" 1 "${3:-1000000}"
}

lemmas() { # TEXT: sentences that differ in one word; such pairs repeat each other by design
  if [ ! -s "$out/clean/$1-lemma.jsonl" ]; then
    say "pairs $1-lemma"
    some "$1" 4000
    embedwright data pairs "$out/some/$1.jsonl" --how lemma --name "$1" --out "$out/raw/$1-lemma.jsonl" \
      --licence "$(cat "$out/text/$1.licence")" --wordnet $out/text/apt/files/wordnet-base/usr/share/wordnet \
      >"$out/raw/$1-lemma.json"
    clean "$1-lemma" none
  fi
  whole 2 "$1-lemma" 2000
}

staged() { # NAME COUNT: the first COUNT rows (of few, half) for the second stage, all others for the first, by BM25
  local half count=$2
  half=$(($(wc -l <"$out/clean/$1.jsonl") / 2))
  count=$((half < count ? half : count))
  whole 2 "$1" "$count"
  [ -s "$out/1/$1.jsonl" ] && return
  taken mine "$1" "$((count + 1))" 1000000
  say "mine $1"
  embedwright mine "$out/mine/$1.jsonl" --teacher bm25 --negatives 1 --out "$out/1/$1.jsonl" >"$out/1/$1.json"
}

labelled() { # NAME FILE COUNT: a labelled file of FOLDER/train as examples: of the same class, against others
  if [ ! -s "$out/clean/$1.jsonl" ]; then
    say "labels $1"
    gzip -dc "$EMBEDWRIGHT_DATA/train/$2" | put "$out/some/$1.jsonl"
    embedwright data labels "$out/some/$1.jsonl" --form example --negatives 4 --task "$1" --out "$out/raw/$1.jsonl" \
      >"$out/raw/$1.json"
    clean "$1"
  fi
  whole 2 "$1" "$3"
}

say "texts"
python "$here/texts.py" $out/text
[ -s $out/text/news.jsonl ] || gzip -dc "$EMBEDWRIGHT_DATA/train/newsgroups20.labeled.jsonl.gz" | put $out/text/news.jsonl
echo unknown >$out/text/news.licence

for text in debian manuals prose terms; do
  made $text $text "$docs" title,crops,sentence
  staged $text 800
  made $text-asked $text "$asked" cloze,templates --per-document 2
  staged $text-asked 800
  made $text-swap $text "$asked" swap
  whole 2 $text-swap 1000
done
for text in wordnet gcide; do
  made $text $text "$docs" title,gloss,templates
  staged $text 1200
done
lemmas prose
lemmas manuals
made news news "$docs" crops
staged news 800
for text in debian manuals prose news; do # BM25 as the teacher: these rows have its negatives
  made $text-bm25 $text "$((docs / 2))" bm25 --negatives 4
  whole 1 $text-bm25
done
for text in debian wordnet gcide; do
  made $text-classes $text "$((docs / 2))" classes --negatives 4
  whole 2 $text-classes 2000
done

if [ ! -s $out/raw/docstrings.jsonl ]; then
  say "docstrings"
  embedwright data build docstrings --out $out/docstrings >/dev/null
  cp $out/docstrings/train/pairs.jsonl.tasks.jsonl $out/raw/docstrings.jsonl.tasks.jsonl
  cp $out/docstrings/train/pairs.jsonl $out/raw/docstrings.jsonl
fi
clean docstrings
staged docstrings 300
if [ ! -s $out/raw/perlfaq.jsonl ]; then
  gzip -dc "$EMBEDWRIGHT_DATA/train/perlfaq.pairs.jsonl.gz" | put $out/raw/perlfaq.jsonl
fi
clean perlfaq
staged perlfaq 100

labelled clinc150 clinc150.labeled.jsonl.gz 4000
labelled newsgroups newsgroups20.labeled.jsonl.gz 4000
labelled sentiment review-sentiment.labeled.jsonl.gz 4000
[ -s $out/raw/sts.jsonl ] || gzip -dc "$EMBEDWRIGHT_DATA/train/sts12-13.scored.jsonl.gz" | put $out/raw/sts.jsonl
clean sts none
whole 2 sts
rows() { cat $out/"$1"/*.jsonl | grep -c positives; } # without the tasks beside them
say "done: $(rows 1) rows of the first stage, $(rows 2) of the second"
