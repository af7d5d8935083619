#!/usr/bin/env bash
set -euo pipefail
pip install -e ".[quickstart]" && accelerate launch distill/train.py --config distill/recipes/quickstart.yaml
