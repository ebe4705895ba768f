"How fast training is on a device: `python bench/gpu.py speed`, one table within ten minutes on a GPU"
import copy, datetime, statistics, sys, time
from pathlib import Path

import pandas as pd
import torch
from fastcore.script import anno_parser

sys.path.insert(0, str(Path(__file__).parent))
from speed import Driven, Official, OneBatch, take_turns
from step import METHODS, Plain, arithmetic, count_macs, learner

from fastrain.core import environment, save_json, seed_all
from fastrain.evaluation.tables import markdown_table
from fastrain.models.backbone import create_backbone
from fastrain.speed.fast import machine
from fastrain.speed.options import Speed

GAIN,SHARE = 5.,.4 # aims on an H200: over the official passes, and of the rate of a matmul
EPOCH,EPOCH_IMAGES = 6.,50_000 # seconds of AT, by a ResNet-18

def matmul_rate(device, dtype, n, repeats=10) -> float: # FLOP per second
    "The best of several products of two matrices of n×n values"
    a,b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        a@b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2*n**3/min(seconds)

def _wait(device):
    if device.type == 'cuda': torch.cuda.synchronize()

def chosen(method, batch, models, steps, seconds, compile) -> Speed:
    "What `to_fast` finds for a method"
    learn = learner(method, OneBatch(batch), *map(copy.deepcopy, models), steps)
    return learn.to_fast(seconds=seconds, compile=compile or None).train_cb.speed

def case(backbone, standard, bs, steps, img_size, repeats, device, rates, seconds, compile) -> list: # A row for each method
    "Each method with its choice, and the official passes of AT and TRADES in float32, in turns"
    batch = torch.rand(bs, 3, img_size, img_size, device=device),torch.randint(10, (bs,), device=device)
    models = [create_backbone(name, 10, img_size=img_size).to(device) for name in (backbone, standard)]
    macs = [count_macs(copy.deepcopy(m).eval(), batch[0]) for m in models]
    speeds = {base: chosen(base, batch, models, steps, seconds, compile) for base in ('at', 'trades')}
    forms = {base: plain(base, *map(copy.deepcopy, models), steps) for base,plain in dict(at=Plain, trades=Official).items()}
    forms |= {f'{m} fast': Driven(m, batch, models, steps, speeds[m.partition('+')[0]]) for m in METHODS}
    times = {name: statistics.median(t) for name,t in take_turns(forms, batch, repeats).items()}
    rows = []
    for m in METHODS:
        base,took = m.partition('+')[0],times[f'{m} fast']
        speed = speeds[base]
        flops = 2*bs*arithmetic(m, steps, *macs)
        rows.append(dict(backbone=backbone, batch=bs, method=m, chosen=str(speed), images_per_second=bs/took, gain=times[base]/took,
                         share=flops/took/rates[speed.precision], epoch=EPOCH_IMAGES*took/bs))
    return rows

def verdicts(rows) -> list:
    "The aims, of what was measured"
    gains = [r for r in rows if r['backbone'].startswith('wide') and r['method'].endswith('train')]
    epochs = [r['epoch'] for r in rows if (r['backbone'], r['method']) == ('resnet18', 'at')]
    found = []
    if gains:
        found.append(dict(aim=f'gain over the official passes, with TRAIN ≥ {GAIN:g}', worst=min(r['gain'] for r in gains)))
        found.append(dict(aim=f'share of the rate of a matmul, with TRAIN ≥ {SHARE:g}', worst=min(r['share'] for r in gains)))
    if epochs: found.append(dict(aim=f'AT epoch of {EPOCH_IMAGES} images ≤ {EPOCH:g} s', worst=min(epochs)))
    met = [f['worst'] <= EPOCH if '≤' in f['aim'] else f['worst'] >= (GAIN if 'gain' in f['aim'] else SHARE) for f in found]
    return [dict(f, verdict='pass' if ok else 'fail') for f,ok in zip(found, met)]

def main(
    cases:str='wide_resnet34_10:128,wide_resnet34_10:512,resnet18:512', # Model M' and batch size, comma-separated
    standard:str='resnet18', # Standard model M
    steps:int=10, # Steps of PGD
    img_size:int=32, # Side of the images in pixels
    matmul:int=8192, # Side of the matrices by which the machine is measured
    repeats:int=3, # Timed steps of each form, after one that is not
    choice:float=6., # Seconds for the choice of each method
    seconds:float=540., # No case is begun later
    compile:bool=False, # Time the attack through `torch.compile`, too
    device:str=None, # cpu, cuda, ... (default: a GPU if there is one)
    result:str=None # File for settings, figures and verdicts as JSON
) -> dict: # What is written
    "Images per second of AT and TRADES, with and without TRAIN, against the official passes in float32 and the rate of a large matmul"
    end = time.perf_counter() + seconds
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    seed_all(0)
    rates = {name: matmul_rate(device, dtype, matmul) for name,dtype in dict(fp32=torch.float32, bf16=torch.bfloat16).items()}
    rows,left_out = [],[]
    for backbone,bs in (c.rsplit(':', 1) for c in cases.split(',')):
        if time.perf_counter() > end: left_out.append(f'{backbone}:{bs}')
        else: rows += case(backbone, standard, int(bs), steps, img_size, repeats, device, rates, choice, compile)
    settings = dict(standard=standard, steps=steps, img_size=img_size, matmul=matmul, repeats=repeats, compile=compile)
    res = dict(settings=settings, date=str(datetime.date.today()), machine=machine(device), environment=environment(device), rates=rates,
               rows=rows, left_out=left_out, aims=verdicts(rows))
    if result: save_json(result, res)
    print(text(res))
    return res

def text(res) -> str:
    "The results as Markdown"
    rates = ', '.join(f'{name} {rate/1e12:.3g} TFLOP/s' for name,rate in res['rates'].items())
    about = f'{res["machine"]["device"]}, torch {res["machine"]["torch"]}, {res["date"]}'
    head = f'{about}; a matmul of side {res["settings"]["matmul"]}: {rates}'
    table = pd.DataFrame(res['rows']).round(3).set_index('backbone')
    late = f'\n\nLeft out, as the time was up: {", ".join(res["left_out"])}' if res['left_out'] else ''
    aims = pd.DataFrame(res['aims']).round(3).set_index('aim') if res['aims'] else None
    return f'{head}\n\n{markdown_table(table)}{late}' + ('' if aims is None else f'\n\n{markdown_table(aims)}')

def call(argv):
    args = vars(anno_parser(main, prog='gpu.py speed').parse_args(argv))
    main(**{k: v for k,v in args.items() if k not in ('pdb', 'xtra')})
