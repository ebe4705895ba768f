"What benchmarks share: alternatives that take turns, ratios of medians, and a result that says where and when it was measured"
import datetime, platform, statistics, time
from pathlib import Path

import pandas as pd
import torch

from fastrain.core import environment, save_json
from fastrain.evaluation.tables import markdown_table

def timed(f) -> float:
    "Seconds of a call, until the device is done with it"
    _wait()
    start = time.perf_counter()
    f()
    _wait()
    return time.perf_counter() - start

def _wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def take_turns(
    forms:dict, # `{name: function}`
    repeats:int # Timed rounds; one more, which warms up, is not counted
) -> dict: # `{name: seconds of each round}`
    "All forms in each round, so that a machine that slows down slows all of them"
    seconds = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name,f in forms.items(): seconds[name].append(timed(f))
    return {name: times[1:] for name,times in seconds.items()}

def ratio(over, under) -> dict:
    "The ratio of medians, and what the rounds span"
    rounds = [a/b for a,b in zip(over, under)]
    return dict(ratio=statistics.median(over)/statistics.median(under), low=min(rounds), high=max(rounds))

def judged(name, over, under, target, at_least=False, **about) -> dict:
    "A target with its verdict; over and under are seconds of each round"
    found = ratio(over, under)
    met = found['ratio'] >= target if at_least else found['ratio'] <= target
    limit = f'{"≥" if at_least else "≤"} {target:g}'
    return dict(measured=name, **found, target=limit, verdict='pass' if met else 'fail', **about)

def machine() -> str:
    "The processor, as the system calls it"
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{names[0]}, {len(names)} cores' if names else platform.processor()

def report(result:str, settings:dict, rows:list, about:str, **more) -> dict: # What is written
    "Print the rows, and write them to the file `result` with machine, versions and date"
    res = dict(settings=settings, machine=machine(), date=str(datetime.date.today()), environment=environment(), rows=rows, **more)
    if result: save_json(result, res)
    table = pd.DataFrame(rows, dtype=object)
    print(f'{about}; {res["machine"]}, {res["environment"]["device"]}, torch {res["environment"]["torch"]}\n')
    print(markdown_table(table.map(_short).set_index(table.columns[0])))
    return res

def _short(o):
    if isinstance(o, float): return f'{o:.3f}' if o == o else ''
    return '' if o is None else o
