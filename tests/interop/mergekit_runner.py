"""Runs mergekit on configurations, in whatever Python has it: `python mergekit_runner.py JOBS.json`.

JOBS.json: [[config.yml, output folder], ...]. Only its published entry points are used.
"""

import json
import sys

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

with open(sys.argv[1]) as file:
    for config, out in json.load(file):
        with open(config) as text:
            parsed = MergeConfiguration.model_validate(yaml.safe_load(text))
        run_merge(parsed, out, options=MergeOptions(copy_tokenizer=True, write_model_card=False, lora_merge_cache=out + "-cache"))
