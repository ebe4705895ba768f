"Trains and evaluates methods within a time limit, and goes on where it stopped when it is called again"
import json, random, sys, tarfile, tempfile, time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback, CancelFitException
from fastcore.script import anno_parser
from fastprogress import fastprogress

from fastrain.core import environment, save_json, save_text, seed_all
from fastrain.evaluation.evaluate import evaluate
from fastrain.evaluation.tables import markdown_table, results_table
from fastrain.runs.evaluate import assess
from fastrain.runs.recipe import make_recipe, monitor, recipe_backbone, recipe_dls, recipe_fit, recipe_learner
from fastrain.runs.run import Run, method_folder, read_run
from fastrain.runs.train import History
from fastrain.training.checkpoint import Checkpoint
from fastrain.training.methods import parse_method

EPOCHS = 30 # at most, if their number is left open
MARGIN = 1.1 # by which estimates of time are stretched
ATTACKS = 'natural', 'pgd20', 'cw20'

# -- time --------------------------------------------------------------------------------------------------------------------
class Clock:
    "The time limit"
    def __init__(self, seconds): self.end = time.perf_counter() + seconds
    @property
    def left(self): return self.end - time.perf_counter()
    def fits(self, seconds): return MARGIN*seconds <= self.left

def now(device):
    "Seconds, once the device has done what it was given"
    if device.type == 'cuda': torch.cuda.synchronize()
    return time.perf_counter()

class StepTimer(Callback):
    "Seconds per training step, after which it ends the fit"
    order = -10 # a step starts before any callback has touched the batch
    def __init__(self, skip, steps): self.skip,self.steps = skip,steps
    def before_batch(self):
        if self.iter == self.skip: self.start = now(self.dls.device)
        if self.iter == self.skip + self.steps: self.stop(self.steps)
    def after_train(self): self.stop(len(self.dls.train) - self.skip)
    def stop(self, steps):
        self.seconds = (now(self.dls.device) - self.start)/steps
        raise CancelFitException

# -- training ----------------------------------------------------------------------------------------------------------------
def fresh(dls, seed):
    "Every method starts from the same random numbers, those that shuffle included"
    seed_all(seed)
    for dl in dls.loaders: dl.rng = random.Random(seed)

def bench_learner(recipe, method, dls, cbs=()):
    "A recipe's learner, with channels last on a GPU"
    fresh(dls, recipe.seed)
    learn = recipe_learner(recipe, method, dls, cbs)
    return learn.add_cb(ChannelsLast()) if dls.device.type == 'cuda' else learn

class Turn(Callback):
    "Lets a fit advance to epoch `until`, but start no epoch that would end after the time limit, and notes each one"
    order = Checkpoint.order+1 # once it has skipped the epochs of earlier turns, and saved this one
    def __init__(self, clock, until, pace, note):
        self.clock,self.until = clock,until
        self.pace,self.note = pace,note
        self.done,self.start = 0,None
    def before_epoch(self):
        if self.epoch >= self.until or not self.clock.fits(self.pace): raise CancelFitException
        self.start = time.perf_counter()
    def after_epoch(self):
        self.done = self.epoch + 1
        if self.start is None: return # of an earlier turn, shown again
        self.pace,rec = time.perf_counter() - self.start,self.learn.recorder
        row = {n: v for n,v in zip(rec.metric_names[1:], rec.values[-1]) if n != 'time'}
        self.note(dict(epoch=self.done, seconds=self.pace, lr=self.learn.opt.hypers[-1]['lr'], **row))

def turn(folder, recipe, method, dls, cb):
    "Train `method` from where it is, until `cb` ends it"
    learn = bench_learner(recipe, method, dls, [History(folder/'history.csv', method)])
    with learn.no_bar(), learn.no_logging():
        recipe_fit(recipe, learn, [Checkpoint(method_folder(folder, method), monitor(learn), resume=True), cb])

def note_in(file, **about):
    "A function that adds a line to `file`"
    def note(row):
        with file.open('a') as f: f.write(json.dumps(dict(**about, **row), default=float) + '\n')
        print(*about.values(), *(f'{k} {v:.4g}' for k,v in row.items() if v is not None), flush=True)
    return note

def noted(file, seed) -> pd.DataFrame:
    "The lines of `file` on one seed"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return pd.DataFrame([r for r in rows if r['seed'] == seed], columns=['method', 'epoch', 'seconds'])

# -- evaluation --------------------------------------------------------------------------------------------------------------
def evaluated(folder, recipe, method, dls) -> dict:
    "The last and the best checkpoint on the test set, in float32"
    run = Run(folder, dls.device)
    run.dls = dls # the same for all seeds
    record,_ = assess(run, method, ATTACKS)
    history = pd.read_csv(folder/'history.csv')
    return dict(method=method, seed=recipe.seed, **record, seconds_per_epoch=history[history.method == method].seconds.median())

# -- speed -------------------------------------------------------------------------------------------------------------------
def speed(recipe, methods, dls, steps) -> dict:
    "What a training step of each method takes, and what follows for the parts of the measurement"
    natural = replace(recipe, backbone=recipe.standard, precision='fp32') # as the standard model warms up
    steps_of = {m: step_seconds(recipe, m, dls, steps) for m in methods}
    warm = step_seconds(natural, 'standard', dls, steps)
    validation,n = validation_seconds(recipe, methods[0], dls),len(dls.train)
    return dict(environment=environment(dls.device), steps={m: dict(ms=1000*s, images_per_second=recipe.bs/s) for m,s in steps_of.items()},
                epoch={m: n*s + validation for m,s in steps_of.items()}, warmup_epoch=n*warm, evaluation=evaluation_seconds(recipe, dls))

def step_seconds(recipe, method, dls, steps) -> float:
    n = len(dls.train)
    timer,learn = StepTimer(min(5, n-1), steps),bench_learner(replace(recipe, warmup=0), method, dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, recipe.lr/100, cbs=timer)
    return timer.seconds

def validation_seconds(recipe, method, dls) -> float:
    learn = bench_learner(recipe, method, dls)
    start = now(dls.device)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    return now(dls.device) - start

def evaluation_seconds(recipe, dls) -> float:
    "Of two checkpoints, by a batch"
    batch = dls.test.one_batch()
    model = recipe_backbone(recipe, dls).to(dls.device).eval()
    attacks = {n: recipe.eval_attack(n) for n in ATTACKS}
    for _ in range(2): res = evaluate(model, [batch], attacks, checks=False, progress=False) # the first one is slow
    return 2*res.seconds*len(dls.test)

def epochs_that_fit(warmup, methods, cost, seconds, n_seeds) -> int:
    "As many as leave time to evaluate, at most `EPOCHS`"
    with_standard = sum(has_standard(m) for m in methods)
    fixed = len(methods)*cost['evaluation'] + with_standard*(warmup or 0)*cost['warmup_epoch']
    each = sum(cost['epoch'][m] for m in methods)
    if warmup is None: each += with_standard*cost['warmup_epoch'] # as many epochs of warm-up as of training
    return max(1, min(EPOCHS, int((seconds/MARGIN/n_seeds - fixed)/each)))

def has_standard(method): return parse_method(method).needs_standard

# -- a seed ------------------------------------------------------------------------------------------------------------------
def measure(out, recipe, methods, dls, clock, cost, chunk, show) -> bool: # Whether everything is done
    "Train the methods in turns of `chunk` epochs, the one that is furthest behind first, and evaluate each when it is trained"
    folder,records = out/f'seed{recipe.seed}',out/'records.jsonl'
    results,rows = read_results(folder),noted(records, recipe.seed)
    done = {m: int((rows.method == m).sum()) for m in methods if m not in {r['method'] for r in results}}
    pace = {**cost['epoch'], **rows.groupby('method').seconds.last().to_dict()}
    while done:
        m = min(done, key=done.get)
        until = min(recipe.epochs, (done[m]//chunk + 1)*chunk)
        warm_up = recipe.warmup*cost['warmup_epoch'] if has_standard(m) and not done[m] else 0
        if done[m] < recipe.epochs and not clock.fits(pace[m] + warm_up): return False
        cb = Turn(clock, until, pace[m], note_in(records, seed=recipe.seed, method=m))
        turn(folder, recipe, m, dls, cb)
        done[m],pace[m] = cb.done,cb.pace
        if done[m] < until: return False
        if done[m] < recipe.epochs: continue
        if not clock.fits(cost['evaluation']): return False
        results.append(evaluated(folder, recipe, m, dls))
        save_json(folder/'results.json', results)
        show()
        del done[m]
    return True

def read_results(folder): return read_json(folder/'results.json') or []
def read_json(file): return json.loads(file.read_text()) if file.exists() else None

def settle(folder, recipe, methods):
    "Write down the settings of a folder; an error if it was begun with others"
    if (folder/'settings.json').exists():
        old,new = read_run(folder)[0].settings(),recipe.settings()
        other = ', '.join(f'{k}={old[k]!r}' for k in new if old[k] != new[k])
        if other: raise ValueError(f'{folder} was begun with {other}: give the same settings, or another folder')
    else: save_json(folder/'settings.json', dict(recipe=recipe.settings(), methods=methods, environment=environment()))

# -- results -----------------------------------------------------------------------------------------------------------------
def write_results(out, recipe, methods, seeds, cost):
    "`results.json` and `results.md`, of what is evaluated so far"
    results = [r for s in seeds for r in read_results(out/f'seed{s}')]
    finished = len(results) == len(methods)*len(seeds)
    about = dict(finished=finished, recipe=recipe.settings(), seeds=seeds, environment=environment(), speed=cost)
    save_json(out/'results.json', dict(about, results=results))
    save_text(out/'results.md', text(recipe, results, cost, finished))

def text(recipe, results, cost, finished) -> str:
    "The page"
    env = cost['environment']
    lines = [f'{recipe.backbone} with {recipe.standard} as standard model, {Path(recipe.data).name}, {recipe.epochs} epochs, '
             f'bs {recipe.bs}, PGD-{recipe.steps}, {recipe.precision}; {env["device"]}, torch {env["torch"]}, fastai {env["fastai"]}.',
             '', '## Speed of training', '', markdown_table(speed_table(cost))]
    for which in ('last', 'best') if results else ():
        lines += ['', f'## Test accuracy in %, {which} epoch', '', markdown_table(table(results, which))]
    return '\n'.join(lines + ['' if finished else '\nNot finished.', ''])

def speed_table(cost) -> pd.DataFrame:
    rows = [{'method': m, 'ms per step': f'{s["ms"]:.1f}', 'images/s': f'{s["images_per_second"]:.0f}'} for m,s in cost['steps'].items()]
    return pd.DataFrame(rows).set_index('method')

def table(results, which) -> pd.DataFrame:
    "A row per method and seed, then their mean and standard deviation if there are several seeds"
    tables = {s: results_table([r for r in results if r['seed'] == s], which) for s in dict.fromkeys(r['seed'] for r in results)}
    if len(tables) == 1: return next(iter(tables.values()))
    rows = pd.concat([t.rename(index=lambda m: f'{m}, seed {s}') for s,t in tables.items()])
    by_method = pd.concat(tables.values()).apply(pd.to_numeric, errors='coerce').groupby(level=0, sort=False)
    spread = by_method.mean().map('{:.4g}'.format) + ' ± ' + by_method.std().map('{:.2g}'.format)
    return pd.concat([rows, spread.rename_axis('method')])

# -- run ---------------------------------------------------------------------------------------------------------------------
def image_folder(data, out):
    "`data` as it is; an archive is unpacked in `out`, once"
    if not Path(data).is_file(): return data
    folder = out/'data'/Path(data).name.partition('.')[0]
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=out) as tmp, tarfile.open(data) as tar:
            tar.extractall(tmp, filter='data')
            found = next(p for p in (Path(tmp), *Path(tmp).iterdir()) if (p/'train').is_dir())
            folder.mkdir(parents=True)
            for part in found.iterdir(): part.rename(folder/part.name)
    return str(folder)

def main(
    data:str='cifar10', # Folder with train/<class>/ and test/<class>/, an archive of one, or a data set by name
    out:str='runs/gpu', # Folder of the measurement; it is continued if it exists
    methods:str='at,at+train,trades,trades+train', # Methods, comma-separated; `standard` lends all the same model for L_TP
    backbone:str='resnet18', # Adversarial model
    standard:str='resnet18', # Standard model
    seconds:float=540, # Time limit of this call
    epochs:int=None, # Epochs (default: as many as fit in the time limit with everything else, at most 30)
    chunk:int=5, # Epochs that a method advances before it is another's turn
    seeds:str='1', # Seeds, comma-separated, one after the other
    bs:int=None, # Batch size (default 128)
    lr:float=None, # Highest learning rate (default 0.1)
    steps:int=None, # Steps of PGD in training (default 10)
    lam:float=None, # Weight of the topology loss (default 5)
    lam_schedule:str=None, # constant, printed or ramp (default constant)
    warmup:int=None, # Epochs that the standard model first trains alone (default: as many as epochs)
    n_train:int=None, # Use so many training images (default all)
    n_test:int=None, # Use so many test images (default all)
    n_valid:int=None, # Held-out images that are attacked after each epoch (default 1000)
    precision:str=None, # fp32, bf16 or fp16 (default: bf16 on a GPU)
    device:str=None, # cpu, cuda, ... (default: a GPU if there is one)
    timed_steps:int=20 # Steps by which the speed is measured
) -> bool: # Whether everything is done
    "Train and evaluate methods until all is done or the time is up; the same call then goes on"
    clock,out,methods,seeds = Clock(seconds),Path(out),methods.split(','),[int(s) for s in seeds.split(',')]
    out.mkdir(parents=True, exist_ok=True)
    methods.sort(key=lambda m: m != 'standard') # it must be trained before L_TP of the others is measured against it
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    recipe = make_recipe(
        'everyday', data=image_folder(data, out), backbone=backbone, standard=standard, bs=bs, lr=lr, steps=steps, lam=lam,
        lam_schedule=lam_schedule, warmup=warmup, n_train=n_train, n_test=n_test, n_valid=n_valid, seed=seeds[0],
        precision=precision or ('bf16' if device.type == 'cuda' else 'fp32'))
    dls = recipe_dls(recipe, device)
    cost = measured_speed(out, recipe, methods, dls, timed_steps)
    epochs = epochs or begun(out/f'seed{seeds[0]}') or epochs_that_fit(warmup, methods, cost, clock.left, len(seeds))
    recipe = replace(recipe, epochs=epochs, warmup=epochs if warmup is None else warmup)
    show = lambda: write_results(out, recipe, methods, seeds, cost)
    for s in seeds: settle(out/f'seed{s}', replace(recipe, seed=s), methods)
    finished = all(measure(out, replace(recipe, seed=s), methods, dls, clock, cost, chunk, show) for s in seeds)
    show()
    print((out/'results.md').read_text() + ('' if finished else f'\nStopped with {clock.left:.0f} s left. The same command goes on.'))
    return finished

def measured_speed(out, recipe, methods, dls, steps) -> dict:
    "`speed`, or what an earlier call has found"
    file = out/'speed.json'
    cost = read_json(file)
    if cost is None or any(m not in cost['steps'] for m in methods):
        cost = speed(recipe, methods, dls, steps)
        save_json(file, cost)
    return cost

def begun(folder): return read_run(folder)[0].epochs if (folder/'settings.json').exists() else None

if __name__ == '__main__':
    fastprogress.NO_BAR = not sys.stdout.isatty() # in a log file, only the lines
    if sys.argv[1:2] == ['speed']:
        from gpu_speed import call
        sys.exit(call(sys.argv[2:]))
    args = vars(anno_parser(main, prog='gpu.py').parse_args())
    main(**{k: v for k,v in args.items() if k not in ('pdb', 'xtra')})
