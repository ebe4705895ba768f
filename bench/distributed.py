"Times training steps of one and of several processes on this machine's cores, and counts the bytes that they send"
import json, os, statistics, subprocess, sys, tempfile, time
from contextlib import nullcontext
from pathlib import Path

import torch
from fastcore.script import anno_parser

from fastrain.core import environment, save_json
from fastrain.models.backbone import create_backbone

def measure(backbone, standard, bs, method, steps, repeats, img_size):
    "Seconds of each training step of this process, by the clock and of the processor, and the bytes that it sends in a step"
    import fastai.distributed # noqa: F401  distrib_ctx
    from fastai.callback.core import Callback, CancelFitException
    from fastrain.attacks.pgd import PGD
    from fastrain.processes import joined, n_processes
    from fastrain.runs.recipe import make_recipe, recipe_dls, recipe_learner

    class Timer(Callback):
        order = -10
        def before_fit(self): self.seconds,self.sent,self.begun = [],[],None
        def before_batch(self):
            now = time.perf_counter(),time.process_time()
            if self.begun is not None: self.seconds.append([b - a for a,b in zip(self.begun, now)])
            if len(self.seconds) > repeats: raise CancelFitException
            self.begun,sent[:] = now,[]
        def after_batch(self): self.sent.append(sum(sent))

    sent = [] # bytes that this process contributes to each message
    for name in ('all_reduce', 'all_gather'): count_bytes(name, sent)
    torch.set_num_threads(1)
    with joined(cpu=True):
        recipe = make_recipe('everyday', data='digits', backbone=backbone, standard=standard, bs=bs, warmup=0, img_size=img_size,
                             steps=steps, n_train=bs*n_processes()*(repeats + 3), holdout=.01, n_test=10)
        learn = recipe_learner(recipe, method, recipe_dls(recipe, 'cpu'), [timer := Timer()])
        learn.metrics = []
        with learn.distrib_ctx(sync_bn=False) if n_processes() > 1 else nullcontext(), learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
        nets = [learn.model, learn.train_cb.standard_learner.model] if learn.train_cb.policy else [learn.model]
        numbers = [sum(t.numel() for m in nets for t in ts(m)) for ts in (torch.nn.Module.parameters, float_buffers)]
        return dict(seconds=timer.seconds[1:], bytes=statistics.median(timer.sent[1:]), parameters=numbers[0], buffers=numbers[1])

def float_buffers(m): return [b for b in m.buffers() if b.is_floating_point()]

def count_bytes(name, sent):
    "Let torch's function note what it is given"
    f = getattr(torch.distributed, name)
    def counted(*args, **kwargs):
        t = args[-1]
        sent.append(t.numel()*t.element_size())
        return f(*args, **kwargs)
    setattr(torch.distributed, name, counted)

def run(n, args):
    "What the first of `n` processes measured"
    with tempfile.TemporaryDirectory() as folder:
        group = []
        for rank in range(n):
            env = os.environ | dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT='29577',
                                    OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
            command = [sys.executable, __file__, '--child', f'{folder}/{rank}.json', *args]
            group.append(subprocess.Popen(command, env=env))
        if any([p.wait() for p in group]): raise SystemExit('a process has failed, see above')
        return json.loads(Path(f'{folder}/0.json').read_text())

def on_paper(parameters:int, n:int, gigabytes:float=50.) -> dict:
    "What a ring of `n` devices sends in a step for the gradients of float32, and how long that takes at `gigabytes` per second"
    each = 4*parameters*2*(n - 1)/n
    return dict(parameters=parameters, devices=n, bytes_per_device=each, gigabytes_per_second=gigabytes, seconds=each/gigabytes/1e9)

def main(
    backbone:str='resnet18', # M'
    standard:str='resnet18', # M
    bs:int=16, # Images of each process
    method:str='at+train', # Method
    steps:int=10, # Of PGD
    repeats:int=5, # Steps that are timed, in each turn
    turns:int=3, # Turns of one process and two
    img_size:int=32, # Pixels
    processes:str='1,2', # Numbers of processes, one thread each
    result:str=None, # File for the record
    child:str=None # Of a process of this script: where it writes
):
    if child: return save_json(child, measure(backbone, standard, bs, method, steps, repeats, img_size))
    options = dict(backbone=backbone, standard=standard, bs=bs, method=method, steps=steps, repeats=repeats, img_size=img_size)
    args = [word for k,v in options.items() for word in (f'--{k.replace("_", "-")}', str(v))]
    counts = [int(n) for n in processes.split(',')]
    found = {n: [] for n in counts}
    for _ in range(turns):
        for n in counts: found[n].append(run(n, args))
    rows = [row(n, found[n], bs) for n in counts]
    for r in rows: r['efficiency'],r['efficiency_of_processor'] = (rows[0][k]/r[k] for k in ('fastest', 'processor_seconds'))
    n_wide = sum(p.numel() for name in ('wide_resnet34_10', 'resnet18') for p in create_backbone(name, 10).parameters())
    record = dict(settings=dict(options, turns=turns), environment=environment('cpu'), cores=os.cpu_count(),
                  load=os.getloadavg()[0], rows=rows,
                  paper=dict(on_paper(n_wide, 8), models='wide_resnet34_10 and resnet18'))
    print(json.dumps(record, indent=1))
    if result: save_json(result, record)

def row(n, found, bs):
    "Over all timed steps, and bytes against theory"
    steps = [step for f in found for step in f['seconds']]
    fastest = min(clock for clock,_ in steps) # the one that other work on the machine has disturbed least
    gradients = 4*(found[0]['parameters'] + found[0]['buffers'])*(n > 1)
    return dict(processes=n, seconds=statistics.median(clock for clock,_ in steps), fastest=fastest, images_per_second=n*bs/fastest,
                processor_seconds=statistics.median(cpu for _,cpu in steps), steps=steps,
                bytes_per_step=found[0]['bytes'], bytes_of_gradients_and_statistics=gradients)

if __name__ == '__main__':
    args = vars(anno_parser(main, prog='distributed.py').parse_args())
    main(**{k: v for k,v in args.items() if k not in ('pdb', 'xtra')})
