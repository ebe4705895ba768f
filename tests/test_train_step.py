"One step of TRAIN for each of the backbones that are promised to work, as adversarial and as standard model."
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat

from fastrain.attacks.pgd import PGD
from fastrain.training.callback import TRAINCallback
from fastrain.pieces.losses import TRADES
from fastrain.models.backbone import create_backbone
from fastrain.training.schedules import torch_sgd

QUICK = 'mobilenetv3_small_100 convnext_atto vit_tiny_patch16_224'.split()
SLOW = '''resnet18 resnet10t wide_resnet34_10 preact_resnet18 mobilenetv3_large_100 efficientnet_b0 densenet121
          vgg11_bn mixer_s32_224 deit_tiny_patch16_224'''.split()
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]

def one_batch(bs=4, size=32):
    "Loaders of a single random batch"
    x,y = torch.rand(bs, 3, size, size),torch.arange(bs)
    dl = DataLoader(list(zip(x, y)), bs=bs, num_workers=0)
    dls = DataLoaders(dl, dl)
    dls.c = 10
    return dls

def train_one_step(model, callback, dls):
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=torch_sgd, lr=.01, cbs=callback)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def changed(model, before): return sum(not torch.equal(p, before[n]) for n,p in model.named_parameters())

@pytest.mark.parametrize('name', NAMES)
def test_train_step_as_adversarial_model(name):
    torch.manual_seed(0)
    model = create_backbone(name, 10)
    before = {n: p.detach().clone() for n,p in model.named_parameters()}
    learn = train_one_step(model, TRAINCallback('resnet10t_16', attack=PGD(steps=1)), one_batch())
    assert changed(model, before) > .9*len(before)
    l_tp = learn.recorder.values[-1][learn.recorder.metric_names.index('l_tp') - 1]
    assert l_tp > 0 and torch.isfinite(torch.tensor(l_tp))

@pytest.mark.parametrize('name', ['mobilenetv3_small_100', 'vit_tiny_patch16_224', pytest.param('resnet18', marks=pytest.mark.slow)])
def test_train_step_as_standard_model(name):
    torch.manual_seed(0)
    standard = create_backbone(name, 10)
    before = {n: p.detach().clone() for n,p in standard.named_parameters()}
    train_one_step(create_backbone('resnet10t_16', 10), TRAINCallback(standard, robust=TRADES(), attack=PGD(steps=1)), one_batch())
    assert changed(standard, before) > .9*len(before)

@pytest.mark.slow
def test_models_may_differ_in_everything_but_the_batch():
    "A ViT of 192 features beside a MobileNet of 1024, on 64-pixel images"
    dls = one_batch(size=64)
    learn = train_one_step(create_backbone('mobilenetv3_small_100', 10, img_size=64),
                           TRAINCallback('vit_tiny_patch16_224', attack=PGD(steps=1)), dls)
    assert learn.train_cb.standard_learner.model.settings['img_size'] == 64
