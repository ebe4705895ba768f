"Backbones, their stems and weights, and the features of any model"
import copy, json, pickle, warnings
from collections import OrderedDict

import pytest, timm, torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn

from conftest import make_learner, quick, quietly
from fastrain.core import save_tensors
from fastrain.models.features import FeatureCapture, find_classifier, logits_and_features, n_features, n_outputs
from fastrain.models.backbone import (
    Backbone, PixelNormalize, _create_net, _fit_to_size, backbone_splitter, create_backbone, describe_backbone)
from fastrain.models.loading import clean_state_dict, load_weights
from fastrain.models.stems import adapt_stem, excess_reduction, reduction_levels
from fastrain.training.callback import TRAINCallback

# name: width of the features, last map at 32 pixels, last map at 64 pixels
BACKBONES = dict(
    resnet18=(512, (512, 4, 4), (512, 4, 4)),
    resnet10t=(512, (512, 4, 4), (512, 4, 4)),
    wide_resnet34_10=(640, (640, 8, 8), (640, 16, 16)),
    preact_resnet18=(512, (512, 4, 4), (512, 8, 8)),
    mobilenetv3_small_100=(1024, (576, 4, 4), (576, 4, 4)),
    mobilenetv3_large_100=(1280, (960, 4, 4), (960, 4, 4)),
    efficientnet_b0=(1280, (1280, 4, 4), (1280, 4, 4)),
    convnext_atto=(320, (320, 4, 4), (320, 4, 4)),
    densenet121=(1024, (1024, 4, 4), (1024, 4, 4)),
    vgg11_bn=(4096, (512, 1, 1), (512, 2, 2)),
    regnety_002=(368, (368, 4, 4), (368, 4, 4)),
    vit_tiny_patch16_224=(192, (65, 192), (65, 192)),
    deit_tiny_patch16_224=(192, (65, 192), (65, 192)),
    deit_tiny_distilled_patch16_224=(192, (66, 192), (66, 192)),
    mixer_s32_224=(512, (64, 512), (64, 512)),
    swin_tiny_patch4_window7_224=(768, (4, 4, 768), (4, 4, 768)),
    levit_128s=(384, (16, 384), (16, 384)))
# Two heads: `forward_head` averages tokens, or has no linear layer of its own
AVERAGES = {'deit_tiny_distilled_patch16_224', 'levit_128s'}
# One of each kind of stem: convolutions and a pool, convolutions alone, patches of a convolutional net, full size,
# patches that become tokens, two heads
KINDS = {'resnet10t', 'mobilenetv3_small_100', 'convnext_atto', 'preact_resnet18', 'vit_tiny_patch16_224', 'levit_128s'}
HEAVY = {'wide_resnet34_10', 'vgg11_bn'} # Of which it takes seconds to draw the weights
def shapes_only(name, n_classes=10, img_size=32, small_images=True):
    "The `Backbone` that `create_backbone` makes, on the meta device: for shapes, without memory"
    settings = dict(name=name, n_classes=n_classes, img_size=img_size, small_images=small_images, in_chans=3)
    with torch.device('meta'):
        net = _create_net(name, False, small_images, img_size, dict(num_classes=n_classes, in_chans=3))
        model = Backbone(net, settings=settings)
        _fit_to_size(model, pretrained=False)
    return model

def n_params(model): return sum(p.numel() for p in model.parameters())

@pytest.fixture(autouse=True)
def _seed(): torch.manual_seed(0)

@pytest.fixture
def x(): return torch.rand(2, 3, 32, 32)

@pytest.fixture(scope='module')
def resnet(): return create_backbone('resnet10t_16', 10)

@pytest.mark.parametrize('name', BACKBONES)
def test_shapes(name):
    width,map32,map64 = BACKBONES[name]
    make = shapes_only if name in HEAVY else create_backbone
    small,large = make(name, 10), make(name, 10, img_size=64)
    assert describe_backbone(small)['last_map'] == map32 and describe_backbone(large)['last_map'] == map64
    assert n_features(small) == n_features(large) == width and n_outputs(small) == 10

@pytest.mark.parametrize('name', ['resnet10t', 'test_vit'])
def test_shapes_without_memory_are_those_with(name):
    real,meta = create_backbone(name, 10, img_size=64), shapes_only(name, 10, img_size=64)
    assert describe_backbone(real) == describe_backbone(meta) and real.stem == meta.stem

FAMILIES = [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in BACKBONES]

@pytest.mark.parametrize('name', FAMILIES)
def test_backbone(name, x):
    width,last_map,_ = BACKBONES[name]
    model = create_backbone(name, 10).eval()
    x.requires_grad_()
    logits,feats = logits_and_features(model, x)
    assert logits.shape == (2, 10) and logits.isfinite().all()
    assert feats.shape == (2, width) == (2, n_features(model)) and n_outputs(model) == 10
    fmap = model.net.forward_features(model.normalize(x))
    assert fmap.shape[1:] == last_map
    if name not in AVERAGES: torch.testing.assert_close(feats, model.net.forward_head(fmap, pre_logits=True))
    grad, = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([1, 2])), x)
    assert (grad != 0).float().mean() > .99

@pytest.mark.parametrize('name, n_classes, params', [
    ('wide_resnet34_10', 10, 46_160_474), ('wide_resnet34_10', 100, 46_218_164),
    ('wide_resnet28_10', 10, 36_479_194), ('preact_resnet18', 10, 11_172_170)])
def test_registered(name, n_classes, params):
    assert name in timm.list_models()
    with torch.device('meta'): net = timm.create_model(name, num_classes=n_classes)
    assert n_params(net) == params
    assert net.num_features == net.head_hidden_size == net.get_classifier().in_features
    assert net.num_classes == n_classes
    assert net.default_cfg['classifier'] == 'fc' and net.pretrained_cfg['first_conv'] == 'conv1'

def test_registered_protocol(x):
    net = timm.create_model('preact_resnet18', num_classes=0)
    assert isinstance(net.get_classifier(), nn.Identity) and net(x).shape == (2, 512)
    net.reset_classifier(7, 'max')
    assert net(x).shape == (2, 7) and net.global_pool.pool_type == 'max'
    assert timm.create_model('preact_resnet18', in_chans=1)(x[:, :1]).shape == (2, 10)
    with pytest.raises(RuntimeError, match='pretrained'): timm.create_model('preact_resnet18', pretrained=True)

def test_preact_initialisation():
    net = timm.create_model('wide_resnet28_10', widths=(16, 16, 640), depth=2)
    w = net.block3.layer[1].conv1.weight
    assert w.std().item() == pytest.approx((2/(9*640))**.5, rel=.01)
    assert net.fc.bias.count_nonzero() == 0 and (net.bn1.weight == 1).all()

# Stems

def test_cifar_resnet_size(): assert n_params(shapes_only('resnet18', 100)) == 11_220_132

def test_stem_off():
    model = shapes_only('resnet18', small_images=False)
    assert model.stem == {} and model.net.conv1.stride == (2, 2) and isinstance(model.net.maxpool, nn.MaxPool2d)
    assert describe_backbone(model)['last_map'] == (512, 1, 1)
    assert create_backbone('resnet10t', 10, img_size=96).stem == {}
    assert create_backbone('resnet18', 10, img_size=64, small_images=True).stem == {'conv1': '7x7/2 -> 3x3/1'}
    assert create_backbone('resnet10t', 10, small_images=False).stem == {}

@pytest.mark.parametrize('size', [16, 28, 40, 48])
@pytest.mark.parametrize('name', ['resnet10t', 'test_vit', 'test_convnext', 'regnety_002'])
def test_other_sizes(name, size):
    model = create_backbone(name, 3, img_size=size)
    assert model(torch.rand(2, 3, size, size)).shape == (2, 3)

def test_excess():
    assert excess_reduction([2, 4, 8, 16, 32], 224) == 1
    assert excess_reduction([14]*4, 32) == 3.5

def test_levels_change_together():
    levels = reduction_levels(timm.create_model('regnety_002'), 128)
    assert set(levels[0]) == {'stem.conv'} and set(levels[1]) == {'s1.b1.conv2.conv', 's1.b1.downsample.conv'}

def test_pretrained_kernel_keeps_its_answer_to_a_flat_colour():
    net = timm.create_model('resnet18').eval()
    flat = torch.rand(1, 3, 1, 1).expand(1, 3, 33, 33)
    before = net.conv1(flat)[..., 8, 8]
    adapt_stem(net, 32, pretrained=True)
    torch.testing.assert_close(net.conv1(flat)[..., 16, 16], before)

def test_zero_init_on_request():
    assert not create_backbone('resnet18', 10, zero_init_last=True).net.layer1[0].bn2.weight.any()
    assert create_backbone('resnet18', 10).net.layer1[0].bn2.weight.all()

def test_pretrained(monkeypatch):
    made,create = [],timm.create_model
    def fake(name, pretrained=False, **kwargs):
        made.append(pretrained)
        return create(name, **kwargs)
    monkeypatch.setattr(timm, 'create_model', fake)
    model = create_backbone('resnet10t', 10, pretrained=True)
    assert made == [True] and model.stem == {} and model.settings['mean'] == timm.get_pretrained_cfg('resnet10t').mean
    def fails(*args, **kwargs): raise ConnectionError('no network')
    monkeypatch.setattr(timm, 'create_model', fails)
    with pytest.raises(RuntimeError, match='Could not get the pretrained weights'):
        create_backbone('resnet18', 10, pretrained=True)

# Normalisation and the wrapper

def test_normalisation(x):
    mean,std = [.4, .5, .6], [.2, .3, .4]
    model = create_backbone('resnet10t_16', 10, mean=mean, std=std).eval()
    manual = (x-torch.tensor(mean).view(3, 1, 1))/torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(model(x), model.net(manual))
    assert isinstance(create_backbone('resnet10t_16', 10).normalize, nn.Identity)
    assert not [k for k in model.state_dict() if 'normalize' in k]

def test_bad_normalisation():
    for mean,std in (([.5], [.5, .5]), ([.5], [0.])):
        with pytest.raises(ValueError, match='mean and std'): PixelNormalize(mean, std)

def test_copies(x):
    model = create_backbone('resnet10t_16', 10, mean=[.5]*3, std=[.2]*3).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other.settings == model.settings
    again = create_backbone(**json.loads(json.dumps(model.settings)))
    assert torch.equal(load_weights(again, model.state_dict()).eval()(x), model(x))

def test_channels_last(x, resnet):
    model = copy.deepcopy(resnet).eval().to(memory_format=torch.channels_last)
    logits = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, resnet.eval()(x), atol=1e-4, rtol=1e-4)

def test_repr_says_what_changed(resnet): assert 'maxpool: removed' in repr(resnet)

@pytest.mark.parametrize('kwargs, msg', [
    (dict(name='resnet181', n_classes=10), "'resnet18'"),
    (dict(name='resnet18', n_classes=1), 'n_classes=1: expected a whole number of classes ≥ 2'),
    (dict(name='resnet18', n_classes=10, img_size=4), 'img_size=4: expected a whole height and width in pixels ≥ 8'),
    (dict(name='resnet18', n_classes=10, mean=[.5]*3), 'go together'),
    (dict(name='inception_v3', n_classes=10, small_images=False), 'cannot take images of 32x32'),
    (dict(name='crossvit_tiny_240', n_classes=10), 'cannot take images of 32x32')])
def test_bad_arguments(kwargs, msg):
    with pytest.raises(ValueError, match=msg): create_backbone(**kwargs)

# Weights

@pytest.fixture
def small(): return lambda n=10: timm.create_model('wide_resnet34_10', num_classes=n, widths=(4, 8, 16), depth=2)

def _published(net):
    state = {f'module.{k}': v for k,v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    return state | {f'module.sub_{k[7:]}': v for k,v in state.items() if k.startswith('module.block1')}

WRAPPINGS = dict(
    bare=lambda s: s,
    state_dict=lambda s: {'state_dict': s, 'epoch': 3},
    model=lambda s: {'model': OrderedDict(s)},
    nested=lambda s: {'model': {'state_dict': s}},
    compiled=lambda s: {k.replace('module.', 'module._orig_mod.'): v for k,v in s.items()})

@pytest.mark.parametrize('wrap', WRAPPINGS.values(), ids=WRAPPINGS)
def test_published_weights(wrap, small, x, tmp_path):
    net,path = small().eval(),tmp_path/'w.pt'
    state = _published(net)
    assert 'module.sub_block1.layer.0.convShortcut.weight' in state
    save_tensors(path, wrap(state))
    assert torch.equal(load_weights(small(), path).eval()(x), net(x))
    assert torch.equal(load_weights(Backbone(small()), path).eval()(x), net(x))

def test_published_keys():
    with torch.device('meta'): keys = set(timm.create_model('wide_resnet34_10', num_classes=10).state_dict())
    assert {'conv1.weight', 'block1.layer.0.bn1.weight', 'block1.layer.0.conv1.weight',
            'block1.layer.0.convShortcut.weight', 'block3.layer.4.conv2.weight', 'bn1.running_mean',
            'fc.weight', 'fc.bias'} <= keys

def test_checkpoint_argument(tmp_path, x):
    a = create_backbone('test_resnet', 10)
    save_tensors(tmp_path/'a.pt', {'state_dict': a.state_dict()})
    b = create_backbone('test_resnet', 10, checkpoint=tmp_path/'a.pt')
    assert torch.equal(a.eval()(x), b.eval()(x)) and 'checkpoint' not in b.settings

def test_backbone_state_into_bare_net(resnet, x):
    net = create_backbone('resnet10t_16', 10).net
    assert torch.equal(load_weights(net, resnet.state_dict()).eval()(x), resnet.eval()(x))

def test_misfits(small, tmp_path):
    net = small(10)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(ValueError, match=r'fc.weight \(100, 16\) instead of \(10, 16\).*another number of classes'):
        load_weights(net, small(100).state_dict())
    with pytest.raises(ValueError, match='missing .*unknown .*another architecture'):
        load_weights(net, timm.create_model('resnet10t_16').state_dict())
    with pytest.raises(ValueError, match='no state dict'): load_weights(net, {'epoch': 3})
    with pytest.raises(ValueError, match='no state dict'): load_weights(net, {})
    (tmp_path/'junk.pt').write_text('not a checkpoint')
    with pytest.raises(ValueError, match='junk.pt'): load_weights(net, tmp_path/'junk.pt')
    with pytest.raises(FileNotFoundError): load_weights(net, tmp_path/'none.pt')
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_own_prefix_stays():
    net = nn.Sequential(OrderedDict(model=nn.Linear(2, 3)))
    assert set(clean_state_dict(net.state_dict(), net.state_dict())) == {'model.weight', 'model.bias'}
    load_weights(net, {f'module.{k}': v for k,v in net.state_dict().items()})

# Features

class Tokens(nn.Module):
    "Classifies each position and averages"
    def __init__(self):
        super().__init__()
        self.conv,self.fc = nn.Conv2d(3, 6, 4, 4),nn.Linear(6, 5)
    def forward(self, x): return self.fc(self.conv(x).flatten(2).transpose(1, 2)).mean(1)

class Declares(nn.Module):
    "Its classifier is not the last linear layer"
    def __init__(self):
        super().__init__()
        self.head,self.body = nn.Linear(8, 5),nn.Linear(3, 8)
    def forward(self, x): return self.head(self.body(x.mean((2, 3))).relu())
    def get_classifier(self): return self.head

def _torchvision():
    from torchvision.models import resnet18
    return resnet18(num_classes=5)

def _squeezenet():
    from torchvision.models import squeezenet1_0
    return squeezenet1_0(num_classes=5)

def _fastai_timm():
    from fastai.vision.learner import create_timm_model
    return create_timm_model('resnet10t_16', 5, pretrained=False)[0]

def _fastai_xresnet():
    from fastai.vision.models.xresnet import xresnet18
    return xresnet18(n_out=5)

def _conv_classifier(): return timm.create_model('resnetv2_50', num_classes=5, channels=(8, 16, 16, 32), stem_chs=8)

def _sequence():
    return nn.Sequential(PixelNormalize([.5]*3, [.2]*3), timm.create_model('test_vit', num_classes=5, img_size=32))

def _parallel(): return nn.DataParallel(timm.create_model('test_resnet', num_classes=5))

def _plain(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7), nn.ReLU(), nn.Linear(7, 5))

MODELS = { # name: how it is made, width of its features
    'torchvision': (_torchvision, 512), 'convolutional classifier': (_conv_classifier, 32),
    'convolution over a map': (_squeezenet, 512), 'fastai timm': (_fastai_timm, 512),
    'fastai xresnet': (_fastai_xresnet, 512), 'sequence': (_sequence, 64), 'parallel': (_parallel, 96),
    'tokens': (Tokens, 6), 'declared': (Declares, 8), 'plain': (_plain, 7)}
@pytest.mark.parametrize('make, width', MODELS.values(), ids=MODELS)
def test_features_of_any_model(make, width):
    model,x = make().eval(),torch.rand(2, 3, 32, 32)
    logits,feats = logits_and_features(model, x)
    assert logits.shape == (2, 5) and feats.shape == (2, width)
    assert n_features(model) == width and n_outputs(model) == 5
    assert feats.requires_grad and torch.allclose(logits, model(x), atol=1e-5)
    assert not find_classifier(model)._forward_pre_hooks

def test_one_forward_one_mask(x):
    model = create_backbone('resnet10t_16', 10, drop_rate=.5)
    calls = []
    model.net.register_forward_hook(lambda *a: calls.append(1))
    logits,feats = logits_and_features(model, x)
    torch.testing.assert_close(logits, model.net.fc(feats))
    assert len(calls) == 1 and (feats == 0).float().mean() > .3
    assert model.net.bn1.num_batches_tracked == 1

def test_distilled():
    model = create_backbone('deit_tiny_distilled_patch16_224', 10)
    assert find_classifier(model) is model.net.head
    assert len(backbone_splitter(model)[1]) == 4

def test_feature_gradient_reaches_body(resnet, x):
    _,feats = logits_and_features(resnet, x)
    g, = torch.autograd.grad(feats.sum(), resnet.net.layer1[0].conv1.weight)
    assert g.abs().sum() > 0

def test_hook_is_removed_after_an_error(resnet):
    with pytest.raises(RuntimeError):
        with FeatureCapture(resnet): resnet(torch.rand(2, 5, 32, 32))
    assert not find_classifier(resnet)._forward_pre_hooks

def _convolutions(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
def _body(): return timm.create_model('test_vit', num_classes=0)
def _normalised_body(): return nn.Sequential(PixelNormalize([.5]*3, [.5]*3), _body())

@pytest.mark.parametrize('make', [_convolutions, _body, _normalised_body])
def test_no_classifier(make):
    with pytest.raises(ValueError, match='has no classifier to take features from'): find_classifier(make())
    assert n_outputs(make()) is None

def test_unused_classifier():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
        def forward(self, x): return x.mean((2, 3))@self.fc.weight.T
    with pytest.raises(RuntimeError, match='was not called'): logits_and_features(Unused(), torch.rand(2, 3, 8, 8))

# fastai

@pytest.fixture
def dls():
    data = [(torch.rand(3, 32, 32), torch.tensor(i%2)) for i in range(8)]
    return DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device='cpu')

def test_learner(dls, tmp_path):
    model = create_backbone('test_resnet', 2, mean=[.5]*3, std=[.3]*3)
    learn = Learner(dls, model, loss_func=F.cross_entropy, splitter=backbone_splitter, path=tmp_path)
    learn.freeze()
    assert model.get_classifier().weight.requires_grad
    assert not any(m.weight.requires_grad for m in model.net.modules() if isinstance(m, nn.Conv2d))
    learn.unfreeze()
    assert all(p.requires_grad for p in model.parameters())
    learn.remove_cb(ProgressCallback)
    learn.fit(1, 1e-3)
    assert len(learn.opt.param_lists) == 2

def test_splitter_covers_every_parameter_once():
    for model in (create_backbone('test_resnet', 2), _plain()):
        got = [id(p) for group in backbone_splitter(model) for p in group]
        assert sorted(got) == sorted(map(id, model.parameters()))

# --- images of another size than the model was made for

def _warned(model, *sizes):
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter('always')
        for height,width in sizes: model(torch.rand(2, model.settings['in_chans'], height, width))
    return [str(w.message) for w in seen]

def test_small_stem_on_large_images_says_so_once():
    m = create_backbone('resnet10t_16', 10).eval()
    message, = _warned(m, (128, 128), (128, 128), (64, 64))
    assert 'made for images of 32x32 pixels and is shown 128x128' in message and 'up to 16 times longer' in message
    assert "create_backbone('resnet10t_16', 10, img_size=128)" in message
    assert _warned(create_backbone('resnet10t_16', 10, img_size=128).eval(), (128, 128), (224, 224)) == []

@pytest.mark.parametrize('made_for, seen', [(32, (28, 28)), (32, (32, 32)), (32, (40, 40)), (64, (64, 64)), ((32, 48), (32, 48))])
def test_sizes_that_fit_are_let_pass(made_for, seen):
    assert _warned(create_backbone('resnet10t_16', 10, img_size=made_for).eval(), seen) == []

def test_large_stem_on_small_images_says_so():
    message, = _warned(create_backbone('resnet10t_16', 10, img_size=128).eval(), (32, 32))
    assert 'little of them is left' in message
    assert _warned(create_backbone('resnet10t_16', 10, small_images=False).eval(), (32, 32), (96, 96)) == [] # as it was asked for

def test_backbones_saved_before_are_quiet():
    m = create_backbone('resnet10t_16', 10).eval()
    del m.__dict__['size'] # they lack it
    assert _warned(m, (128, 128)) == []

@pytest.mark.parametrize('name', ['resnet10t_16', 'vit_tiny_patch16_224', 'preact_resnet18'])
def test_size_of_two_sides(name):
    m = create_backbone(name, 10, img_size=(32, 48), in_chans=1).eval()
    assert m(torch.rand(2, 1, 32, 48)).shape == (2, 10) and m.settings['img_size'] == (32, 48)
    again = create_backbone(**m.settings)
    assert again.stem == m.stem and describe_backbone(m)['params'] > 0
    square = create_backbone(name, 10, img_size=(32, 32))
    assert square.settings['img_size'] == 32 and square.stem == create_backbone(name, 10).stem

@pytest.mark.parametrize('size', [(3,), (32, 4), (1, 2, 3), '32', None, 3.5, (32, 'a')])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match='img_size='): create_backbone('resnet10t_16', 10, img_size=size)

def _shaped_dls(chans, height, width):
    g = torch.Generator().manual_seed(0)
    items = list(zip(torch.rand(16, chans, height, width, generator=g), torch.arange(16)%10))
    return DataLoaders(*(TfmdDL(items, bs=8, num_workers=0) for _ in range(2)), device='cpu')

@pytest.mark.parametrize('chans, height, width', [(1, 32, 32), (3, 32, 48), (1, 48, 32), (4, 40, 40)])
@pytest.mark.parametrize('kwargs', [dict(), dict(strategy='las:net=resnet10t_16')])
def test_standard_model_by_name_takes_channels_and_size_from_the_batch(chans, height, width, kwargs):
    size = height if height == width else (height, width)
    main = create_backbone('resnet10t_16', 10, img_size=size, in_chans=chans)
    cb = TRAINCallback('resnet10t_16', attack=quick(), **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quietly(make_learner(_shaped_dls(chans, height, width), main, cb))
    made = cb.standard_learner.model.settings
    assert made['in_chans'] == chans and made['img_size'] == size

def test_channels_that_differ():
    three,one = (create_backbone('resnet10t_16', 10, in_chans=n) for n in (3, 1))
    for main,standard,who in ((three, 'resnet10t_16', 'adversarial'), (one, three, 'standard')):
        learn = make_learner(_shaped_dls(1, 32, 32), main, TRAINCallback(standard, attack=quick()))
        match = f'The {who} model takes images of 3 channels.*have 1. Create it with in_chans=1'
        with pytest.raises(ValueError, match=match): quietly(learn)
    grey = create_backbone('resnet10t_16', 10, mean=[.5]*3, std=[.3]*3) # makes three channels of one
    quietly(make_learner(_shaped_dls(1, 32, 32), grey, TRAINCallback(None, attack=quick())))
