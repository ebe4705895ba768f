"""Images per second of the loaders: small images in memory against fastai's `ImageDataLoaders`, large ones in folders
against timm and torchvision.

`python bench/data.py --result bench/results/data.json`; the images are made for it, and removed afterwards."""
import sys, tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from fastai.vision.augment import Flip, RandomCrop, RandomResizedCrop
from fastai.vision.data import ImageDataLoaders
from fastcore.script import call_parse
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parent))
from turns import judged, report, take_turns

from fastrain.core import seed_all
from fastrain.data import pixels
from fastrain.data.sources import get_dls

SMALL,LARGE = 20.,1. # targets: images per second of ours over those of the others

# -- the images --------------------------------------------------------------------------------------------------------------
def write_folder(folder, n, height, width, suffix, classes=4):
    "Images of smooth noise, as photographs are, in class folders; as many again for the test"
    rng = np.random.default_rng(0)
    for part in ('train', 'valid'):
        for i in range(n if part == 'train' else max(classes, n//10)):
            home = folder/part/f'class{i % classes}'
            home.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 255, (height//8, width//8, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(home/f'{i}.{suffix}')

@contextmanager
def own_cache(folder):
    "Decoded images are kept there and not in the user's folder"
    before = pixels.cache_dir
    pixels.cache_dir = lambda: folder
    try: yield
    finally: pixels.cache_dir = before

# -- the loaders: an epoch of training batches -------------------------------------------------------------------------------
def an_epoch(loader):
    def run():
        for x,y in loader: pass
    return run

def by_fastrain(folder, bs, device, workers, img_size=None):
    return get_dls(folder, bs=bs, img_size=img_size, device=device, num_workers=workers).train

def by_fastai(folder, bs, device, workers, img_size=None):
    "Random crops and flips, as ours"
    if img_size: args = dict(item_tfms=RandomResizedCrop(img_size), batch_tfms=Flip())
    else: args = dict(item_tfms=RandomCrop(32), batch_tfms=Flip())
    return ImageDataLoaders.from_folder(folder, bs=bs, device=device, num_workers=workers, **args).train

def by_timm(folder, bs, device, workers, img_size):
    dataset = create_dataset('', root=folder/'train')
    return create_loader(dataset, (3, img_size, img_size), bs, is_training=True, color_jitter=0., num_workers=workers, device=device,
                         use_prefetcher=device.type == 'cuda', mean=(0.,)*3, std=(1.,)*3, persistent_workers=False)

def by_torchvision(folder, bs, device, workers, img_size):
    tfms = transforms.Compose([transforms.RandomResizedCrop(img_size), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    loader = DataLoader(datasets.ImageFolder(folder/'train', tfms), bs, shuffle=True, drop_last=True, num_workers=workers)
    return ((x.to(device), y.to(device)) for x,y in loader) if device.type == 'cuda' else loader

def compared(kind, loaders, n, repeats, target) -> list:
    "The rate of ours over that of each other loader"
    seconds = take_turns({name: an_epoch(loader) for name,loader in loaders.items()}, repeats)
    rates = {name: n/sorted(times)[len(times)//2] for name,times in seconds.items()}
    return [judged(f'{kind}: fastrain / {name}', seconds[name], seconds['fastrain'], target, at_least=True,
                   fastrain_per_second=round(rates['fastrain']), other_per_second=round(rates[name]))
            for name in loaders if name != 'fastrain']

@call_parse
def main(
    n_small:int=5000, # Images of 32x32 pixels
    n_large:int=384, # Images of 375x500 pixels
    bs:int=128, # Batch size of small images
    large_bs:int=32, # Batch size of large images
    img_size:int=224, # Side to which large images are cropped
    workers:int=2, # Processes that open images, for all loaders alike
    repeats:int=5, # Timed epochs
    device:str=None, # cpu, cuda, ... (default: a GPU if there is one)
    tiny:bool=False, # Seconds, to see that it runs
    result:str=None # File for the results as JSON
):
    "Time an epoch of training batches, without training"
    if tiny: n_small,n_large,bs,large_bs,img_size,workers,repeats = 80,16,16,4,64,0,1
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    seed_all(0)
    with tempfile.TemporaryDirectory() as tmp, own_cache(Path(tmp)/'cache'):
        small,large = Path(tmp)/'small',Path(tmp)/'large'
        write_folder(small, n_small, 32, 32, 'png')
        write_folder(large, n_large, 375, 500, 'jpg')
        both = dict(fastrain=by_fastrain, fastai=by_fastai)
        in_memory = {name: make(small, bs, device, workers) for name,make in both.items()}
        rows = compared('small images', in_memory, n_small, repeats, SMALL)
        all_four = dict(both, timm=by_timm, torchvision=by_torchvision)
        opened = {name: make(large, large_bs, device, workers, img_size) for name,make in all_four.items()}
        rows += compared(f'folder at {img_size}', opened, n_large, repeats, LARGE)
    settings = dict(n_small=n_small, n_large=n_large, bs=bs, large_bs=large_bs, img_size=img_size, workers=workers, repeats=repeats,
                    device=str(device))
    return report(result, settings, rows, 'Images per second of an epoch of training batches, ratios of medians')
