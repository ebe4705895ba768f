"""The digits table over several seeds, as `fastrain train` makes it for one:
`python bench/digits.py --out runs/seeds --result bench/results/digits.json`.

A folder that exists is resumed, so an interrupted measurement continues."""
import sys
from pathlib import Path

from fastcore.script import call_parse
from fastprogress import fastprogress

from fastrain.core import environment, save_json
from fastrain.runs.recipe import make_recipe
from fastrain.runs.train import resume_run, train_run

@call_parse
def main(
    out:str='runs/seeds', # Folder for a run per seed
    result:str='runs/digits.json', # File for all records
    seeds:str='1,2,3', # Seeds, comma-separated
    methods:str='standard,at,at+train,trades,trades+train' # Methods, comma-separated
):
    "Train the digits recipe with each seed and collect the records"
    fastprogress.NO_BAR = not sys.stdout.isatty() # in a log file, only the rows
    records = []
    for seed in map(int, seeds.split(',')):
        folder = Path(out)/str(seed)
        run = resume_run(folder) if (folder/'settings.json').exists() else train_run(folder, make_recipe(seed=seed), methods.split(','))
        records += [dict(r, seed=seed) for r in run]
    save_json(result, dict(recipe=make_recipe().settings(), environment=environment(), records=records))
