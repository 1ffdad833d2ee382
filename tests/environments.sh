#!/usr/bin/env bash
# The two clusters for real, on a machine without a GPU: the extra `teacher-cpu` alone collects, without DeepSpeed, and
# the extra `student` alone trains on what was collected, without vLLM and without the teacher's files.
# `make test-environments`: needs no input, leaves nothing behind, takes some minutes and 6 GB, in clones of what is
# committed.
set -euo pipefail
unset PYTHONPATH MAKEFLAGS

root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
PATH=${PATH//"$root/.venv/bin:"/} # which make has put first
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

environment() { # EXTRA MODULE: a clone with that extra alone, in which there is no MODULE
  cd "$work"
  git clone --quiet "$root" "$1"
  cd "$1"
  make setup EXTRAS="$1"
  if .venv/bin/python -c "import $2" 2>/dev/null; then
    echo "error: the extra $1 brings $2" >&2
    exit 1
  fi
  echo "the extra $1: $(.venv/bin/uv pip list --python .venv/bin/python 2>/dev/null | tail -n +3 | wc -l) packages, no $2"
}

environment teacher-cpu deepspeed
.venv/bin/python - "$work" <<'END'
import sys
from pathlib import Path

import yaml

from tests.fixtures.random_teacher import save_random_teacher
from tests.fixtures.toy_run import make_tokenizer, toy_config

work = Path(sys.argv[1])
make_tokenizer(work / "tokenizer")
save_random_teacher(work / "tokenizer", work / "teacher")
tree = yaml.safe_load(toy_config(work).read_text())
tree["teacher"] |= {"dtype": "float32", "max_sequence_tokens": 256, "kv_cache_gib": 1, "enforce_eager": True}
rule = {"temperature": 0, "max_response_tokens": 16}
tree["collect"] |= {
    "prompts": "configs/prompts/demo.jsonl",
    "decoding": [{"split": "train", **rule}, {"split": "held_out", **rule}],
}
tree["student"]["max_sequence_tokens"] = 256
tree["train"] |= {"steps": 10, "max_sequence_tokens": 256, "deepspeed": "configs/deepspeed/zero2.json"}
(work / "toy.yaml").write_text(yaml.safe_dump(tree))
END
make collect-logits EXTRAS=teacher-cpu CONFIG="$work/toy.yaml"
.venv/bin/shards validate "$work/runs/toy/shards"

mkdir -p "$work/student-runs/toy"
mv "$work/runs/toy/shards" "$work/student-runs/toy/shards"
rm -rf "$work/runs" "$work/teacher" "$work/tokenizer"
environment student vllm
make train EXTRAS=student CONFIG="$work/toy.yaml" ARGS="--set runs=$work/student-runs"
.venv/bin/student report "$work/toy.yaml" --set runs="$work/student-runs"
.venv/bin/student generate "$work/student-runs/toy/student/final" --prompt "go on" --length 8
echo "both environments work"
