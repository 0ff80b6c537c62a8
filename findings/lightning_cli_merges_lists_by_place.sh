#!/usr/bin/env bash
# jsonargparse 4.53.0 (the parser of LightningCLI), lightning 2.6.6: a later configuration file does
# not replace a list of classes of an earlier one. Entries of the same class at the same place are
# merged.
#
# a.yaml lists EarlyStopping(monitor=loss, patience=10), b.yaml EarlyStopping(monitor=accuracy), whose
# default patience is 3. `--config b.yaml` gives patience 3. `--config a.yaml --config b.yaml` gives
# EarlyStopping(monitor=accuracy, patience=10): the callback of b with an argument of a, which b does
# not mention. Nothing is printed.
# Seen: patience 3 alone, 10 behind a.yaml. Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6 \
  'jsonargparse[signatures]==4.53.0'
cd "$folder"
cat > a.yaml <<'YAML'
callbacks:
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: loss, patience: 10}
YAML
cat > b.yaml <<'YAML'
callbacks:
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: accuracy}
YAML
venv/bin/python - <<'PYTHON'
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

parser = ArgumentParser()
parser.add_argument("--config", action="config")
parser.add_argument("--callbacks", type=list[Callback])
alone = parser.parse_args(["--config", "b.yaml"]).callbacks[0].init_args
behind = parser.parse_args(["--config", "a.yaml", "--config", "b.yaml"]).callbacks[0].init_args
print(f"b.yaml alone: monitor {alone.monitor}, patience {alone.patience}")
print(f"a.yaml, then b.yaml: monitor {behind.monitor}, patience {behind.patience}")
assert (alone.patience, behind.patience) == (3, 10), "the behaviour has changed"
PYTHON
