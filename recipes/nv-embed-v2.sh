#!/usr/bin/env bash
# All training data of nv-embed-v2.yaml by one command: each set of the catalogue is built with its corpus, cleaned of
# repeats and of what leaks from your evaluation sets, and mined in its corpus under each row's own instruction.
#   EVAL=FOLDER LLM_URL=http://HOST/v1 LLM_MODEL=NAME recipes/nv-embed-v2.sh
# Kill it at any time and start it again: a step whose file is there by the same settings is not done again. Where EVAL
# holds other files than before, all is cleaned and mined again; a change in SOURCES is not seen.
#   EVAL       what must not leak: files, and BEIR folders, of the test sets (docs/cleaning.md)
#   OUT        where the data goes (data/nv-embed-v2): retrieval/ is read by stage 1, retrieval/ and others/ by stage 2
#   SHARE      of each set's number of samples, and of its corpus: 0.001 is a rehearsal (1)
#   TEACHER    model that mines (intfloat/e5-mistral-7b-instruct, the paper's)
#   LAUNCH     put before the mining: "torchrun --nproc-per-node 8 --no-python" for 8 GPUs (nothing)
#   LLM_URL, LLM_MODEL   server that writes synthetic data, an OpenAI-compatible one; LLM_URL=none leaves them out
#   SOURCES    folder of local copies: SOURCES/NAME is read instead of the hub. reddit_s2s and stackexchange_s2s are on no hub
#   SETS       names of sets (all of `embedwright data list`)
#   VERSION    v2, or v1: the sets of nv-embed-v1.yaml, labels by their texts, no synthetic data (v2)
# Also in OUT: raw/ corpus/ clean/ mined/, and beside each file what its command reported (*.report.json) and the commands
# that led to it (*.made); a command that runs writes FILE.report.part; vectors/ may go once all is mined.
set -uo pipefail
: "${EVAL:?set it to the folder of evaluation data that must not leak into training}"
version=${VERSION:-v2} share=${SHARE:-1} teacher=${TEACHER:-intfloat/e5-mistral-7b-instruct}
out=${OUT:-data/nv-embed-$version}
[ "$version" = v1 ] && LLM_URL=none
: "${LLM_URL:?set it to a server for synthetic data, or to none}"
[ "$LLM_URL" = none ] || : "${LLM_MODEL:?set it to the model, as the server names it}"
trap 'exit 130' INT TERM
list=$(embedwright data list --version "$version") || exit
names=${SETS:-$(awk 'NR > 1 { print $1 }' <<<"$list")}
held_out=$(find -L "$EVAL" -type f -exec cksum {} + 2>/dev/null | sort | cksum)
mkdir -p "$out"/{raw,corpus,clean,mined,retrieval,others} || exit

# Called with the file that a command writes (last word), the command runs, unless the file is there by this command and
# those before it. `made` is the text of all commands of a set so far, so that another setting does all later steps again.
step() { # COMMAND... FILE
  local file=${*: -1}
  [ "$1" = clean ] && made+="EVAL holds $held_out"$'\n'
  made+="$*"$'\n'
  if [ -s "$file" ] && [ "$(cat "$file.made" 2>/dev/null)" = "${made%$'\n'}" ]; then return; fi
  echo "$(date +%T) $1 $file"
  rm -f "$file.made"
  "$@" >"$file.report.part" || return
  mv "$file.report.part" "$file.report.json"
  printf %s "${made%$'\n'}" >"$file.made.part" && mv "$file.made.part" "$file.made"
}

build() { embedwright data build "${@:1:$#-1}" --out "${*: -1}"; }
clean() { embedwright data clean "${@:1:$#-1}" --out "${*: -1}"; }
mine() { ${LAUNCH:-} embedwright mine "${@:1:$#-1}" --vectors "$out/vectors" --precision float16 --out "${*: -1}"; }
synth() { embedwright synth --base-url "$LLM_URL" "${@:1:$#-1}" --out "${*: -1}"; }

mined() { # NAME [--corpus FILE]
  local by=$teacher
  [[ $version = v1 && $family = sts ]] && by=bm25 # the paper, of v1
  step clean "$out/raw/$1.parquet" --against "$EVAL" "$out/clean/$1.parquet" &&
    step mine "$out/clean/$1.parquet" "${@:2}" --teacher "$by" --negatives 7 "$out/mined/$1.parquet" &&
    # negatives come from the whole corpus: once more for equal and nearly equal texts, not for repeats of rows
    step clean "$out/mined/$1.parquet" --against "$EVAL" --repeats none --bm25 0 "$place/$1.parquet"
}

one() { # NAME: a set of the catalogue
  local kind family place=$out/others options=(--share "$share")
  kind=$(awk -F '  +' -v name="$1" '$1 == name { print $5 }' <<<"$list")
  family=$(awk -F '  +' -v name="$1" '$1 == name { print $2 }' <<<"$list")
  [ "$family" = retrieval ] && place=$out/retrieval
  made=
  [ -e "${SOURCES:-/none}/$1" ] && options+=(--source "$SOURCES/$1")
  if [ "$kind" = labelled ]; then
    [ "$version" = v1 ] && options+=(--form label)
    step build "$1" "${options[@]}" "$out/raw/$1.parquet" &&
      step clean "$out/raw/$1.parquet" --against "$EVAL" "$place/$1.parquet"
  else
    step build "$1" "${options[@]}" --corpus-out "$out/corpus/$1.arrow" "$out/raw/$1.parquet" &&
      mined "$1" --corpus "$out/corpus/$1.arrow"
  fi
}

# What the language model writes: a third of each type. Two types come with a negative of its own and keep it. Those of
# short-short have none: they are mined among their own positives, apart, so that a label is no negative of a question.
written() {
  local family=retrieval place=$out/retrieval count
  count=$(awk -v share="$share" 'BEGIN { n = int(40000 * share + 0.5); print n < 20 ? 20 : n }')
  made=
  step synth --count $((2 * count)) --model "$LLM_MODEL" --types short-long,long-short "$out/raw/synthetic.parquet" &&
    step clean "$out/raw/synthetic.parquet" --against "$EVAL" "$place/synthetic.parquet" || return
  made=
  step synth --count "$count" --model "$LLM_MODEL" --types short-short "$out/raw/synthetic_short.parquet" &&
    mined synthetic_short
}

failed=()
for name in $names; do one "$name" || failed+=("$name"); done
[ "$LLM_URL" = none ] || { names+=" synthetic synthetic_short" && written; } || failed+=(synthetic)

python3 - "$out" $names <<'PYTHON'
import json, sys
from pathlib import Path

folder, *names = sys.argv[1:]


def report(path):
    path = Path(folder, f"{path}.parquet.report.json")
    text = path.read_text() if path.exists() else "{}"
    return json.loads(text[text.index("{") :])  # lines of progress come first


columns = ["rows", "drawn", "corpus", "bad", "repeats", "leaks", "clean", "negatives", "cut", "out"]
lines = [["set", *columns]]
total = dict.fromkeys(columns, 0)
for name in names:
    raw, mined = report(f"raw/{name}"), report(f"mined/{name}")
    last = report(f"retrieval/{name}") or report(f"others/{name}")
    clean = report(f"clean/{name}") or last
    removed = clean.get("rows_removed", {})
    row = {
        "rows": raw.get("rows", raw.get("asked", 0)),
        "drawn": raw.get("examples", raw.get("written", 0)),
        "corpus": raw.get("corpus", 0),
        "bad": raw.get("quarantined", 0),
        "repeats": sum(count for reason, count in removed.items() if reason.startswith("repeated")),
        "leaks": removed.get("leaked", 0),
        "clean": clean.get("kept", 0),
        "negatives": mined.get("negatives", 0),
        "cut": last.get("passages_cut", {}).get("leaked", 0) if mined else 0,
        "out": last.get("kept", 0),
    }
    total = {key: total[key] + row[key] for key in columns}
    lines.append([name, *(f"{row[key]:,}" for key in columns)])
lines.append(["all", *(f"{total[key]:,}" for key in columns)])
widths = [max(map(len, column)) for column in zip(*lines)]
for line in lines:
    print("  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(line, widths))))
PYTHON
[ $? = 0 ] || failed+=("the table")
[ ${#failed[@]} = 0 ] || { echo "not done: ${failed[*]} (see above; start it again)" >&2; exit 1; }
