"The published layouts, the fast path against the plain one, reproducible batches, fastai's tools, and every kind of bad input"
import functools, http.server, io, os, pickle, shutil, struct, tarfile, threading, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import TfmdDL
from fastai.interpret import Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorImage
from fasttransform import Transform
from PIL import Image
from torch import nn

from fastrain.data import cifar, pixels, sources
from fastrain.core import seed_all
from fastrain.data.cifar import _load_pickle, _SafeUnpickler, read_cifar
from fastrain.data.folders import list_images
from fastrain.data.parts import pick_balanced
from fastrain.data.pixels import CropFlip, crop_flip, decode_images
from fastrain.data.sources import get_dls, read_tiny

pytestmark = pytest.mark.filterwarnings('ignore:.*holds .* training and test images', 'ignore:load_learner')

@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))

def draw(path, n, size=32, seed=0, ext='png', mode='RGB'):
    "`n` different images in the new folder `path`"
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    for i in range(n):
        im = Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8))
        im.convert(mode).save(path/f'{i:04d}.{ext}')
    return path

@pytest.fixture
def folder(tmp_path):
    for c in 'abc':
        draw(tmp_path/'im'/'train'/c, 12)
        draw(tmp_path/'im'/'test'/c, 5, seed=1)
    return tmp_path/'im'

def small(name, **kwargs): return get_dls(name, **{'bs': 8, 'device': 'cpu', **kwargs})

def tiny_net(c, side=32): return nn.Sequential(nn.AvgPool2d(side//4), nn.Flatten(), nn.Linear(48, c))

# --- layouts

def cifar_dict(n, k, seed, labels=b'labels'):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n, 3072)).astype(np.uint8)
    return {b'data': x, labels: [i % k for i in range(n)], b'filenames': [b'x.png']*n}

def write_cifar10(root):
    d = root/'cifar-10-batches-py'
    d.mkdir(parents=True)
    names = [*(f'data_batch_{j}' for j in range(1, 6)), 'test_batch']
    for i, name in enumerate(names): (d/name).write_bytes(pickle.dumps(cifar_dict(20, 10, i), 2))
    (d/'batches.meta').write_bytes(pickle.dumps({b'label_names': [b'c%d' % i for i in range(10)]}, 2))
    return d

def test_cifar10_pickles_and_archive_agree(tmp_path):
    d = write_cifar10(tmp_path/'a')
    (tmp_path/'b').mkdir()
    with tarfile.open(tmp_path/'b'/'cifar-10-python.tar.gz', 'w:gz') as tar: tar.add(d, d.name)
    dls = [small('cifar10', path=p) for p in (tmp_path/'a', d, tmp_path/'b', tmp_path/'b'/'cifar-10-python.tar.gz')]
    for o in dls:
        assert [len(l.dataset) for l in o.loaders] == [100, 20] and o.valid_is_test
        assert list(o.vocab) == [f'c{i}' for i in range(10)]
        assert torch.equal(o.valid.images.x, dls[0].valid.images.x)
    first = torch.from_numpy(cifar_dict(20, 10, 0)[b'data'][3]).view(3, 32, 32)
    assert torch.equal(dls[0].train.images.x[3], first) and dls[0].train.images.label(3) == 'c3'

def test_cifar100_pickles_and_str_keys(tmp_path):
    d = tmp_path/'cifar-100-python'
    d.mkdir()
    for i, n in enumerate(['train', 'test']):
        (d/n).write_bytes(pickle.dumps({k.decode(): v for k, v in cifar_dict(200, 100, i, b'fine_labels').items()}))
    meta = {'fine_label_names': [f'f{i}' for i in range(100)], 'coarse_label_names': []}
    (d/'meta').write_bytes(pickle.dumps(meta))
    assert small('cifar100', path=tmp_path).c == 100

def test_cifar100_folders_are_nested(tmp_path):
    for part in ('train', 'test'):
        for sup, cs in dict(fish=['ray', 'shark'], flowers=['rose']).items():
            for c in cs: draw(tmp_path/part/sup/c, 4)
    assert list(small('cifar100', path=tmp_path).vocab) == ['ray', 'rose', 'shark']

def write_tiny(root):
    d, wnids = root/'tiny-imagenet-200', ['n02', 'n01', 'n03']
    for w in wnids: draw(d/'train'/w/'images', 4, size=64, ext='JPEG')
    draw(d/'val'/'images', 6, size=64, ext='JPEG')
    (d/'wnids.txt').write_text('\n'.join(wnids)+'\n')
    (d/'words.txt').write_text('n01\tgoldfish\n')
    lines = [f'{i:04d}.JPEG\t{wnids[i%3]}\t0\t32\t44\t62\n' for i in range(6)]
    (d/'val'/'val_annotations.txt').write_text(''.join(lines))
    return d

def test_tiny_imagenet(tmp_path):
    d = write_tiny(tmp_path)
    a, b = small('tiny-imagenet', path=tmp_path), small('tiny-imagenet', path=d, img_size=64)
    assert list(a.vocab) == ['n01', 'n02', 'n03'] and a.valid_is_test
    assert [len(o.dataset) for o in a.loaders] == [12, 6]
    assert a.train.images.x.shape[-1] == 32 and b.train.images.x.shape[-1] == 64
    assert [a.vocab[y] for y in a.valid.one_batch()[1]] == ['n02', 'n01', 'n03']*2
    (d/'val'/'images'/'0003.JPEG').unlink()
    with pytest.raises(ValueError, match='0003.JPEG'): read_tiny(d)
    shutil.rmtree(d/'train'/'n01')
    with pytest.raises(ValueError, match='no images in .*n01'): read_tiny(d)
    (d/'wnids.txt').unlink()
    with pytest.raises(FileNotFoundError, match='wnids.txt'): read_tiny(d)

def test_digits_are_what_sklearn_has():
    from sklearn.datasets import load_digits
    dls = small('digits')
    assert [len(o.dataset) for o in dls.loaders] == [1437, 360] and dls.train.images.x.shape == (1797, 3, 32, 32)
    seen = {dls.train.images.x[i, 0, ::4, ::4].numpy().tobytes() for i in range(1797)}
    assert seen == {(o/16*255).round().astype(np.uint8).tobytes() for o in load_digits().images}
    assert [f.flip for f in dls.after_batch.fs if isinstance(f, CropFlip)] == [0.]
    counts = np.bincount(dls.train.images.y[1437:])
    assert counts.min() >= 34 and counts.max() <= 38

def test_folder_with_valid_and_test(folder):
    shutil.copytree(folder/'test', folder/'valid')
    dls = small(folder)
    assert len(dls.loaders) == 3 and not dls.valid_is_test and dls.test is dls[2]
    with pytest.raises(ValueError, match='leave holdout out'): small(folder, holdout=.2)

@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', '1'])
def test_other_modes_become_rgb(tmp_path, mode):
    for c in 'ab': draw(tmp_path/c, 6, mode=mode)
    dls = small(tmp_path, bs=4, holdout=.5)
    im = Image.open(tmp_path/'a'/'0002.png').convert('RGB')
    assert torch.equal(dls.train.images.x[2], torch.from_numpy(np.array(im)).permute(2, 0, 1))

# --- the store, and the fast path against the plain one

def test_store_equals_pil(folder):
    files, _ = list_images(folder/'train')
    x = decode_images(files, (32, 32))
    for i, f in enumerate(files): assert np.array_equal(x[i].permute(1, 2, 0).numpy(), np.array(Image.open(f)))

@pytest.mark.parametrize('which', [0, 1])
def test_fast_batches_equal_fastais_own(folder, which):
    fast = small(folder)[which].new(shuffle=False)
    plain = TfmdDL(fast.dataset, bs=8, num_workers=0, drop_last=fast.drop_last, do_setup=False,
                   after_item=fast.after_item, after_batch=fast.after_batch)
    assert fast.in_memory
    def batches(dl):
        list(dl) # whatever a first pass sets up
        torch.manual_seed(7)
        return list(dl)
    a, b = batches(fast), batches(plain)
    assert len(a) == len(b) == (4 if which == 0 else 2)
    for s, t in zip(a, b):
        for o, p in zip(s, t): assert torch.equal(o, p) and type(o) is type(p)

def test_an_item_transform_of_the_user_is_applied(folder):
    dls = small(folder)
    dls.add_tfms([Transform(lambda o: o)], 'after_item', loaders=0)
    assert not dls.train.in_memory and dls.valid.in_memory
    assert dls.train.one_batch()[0].shape == (8, 3, 32, 32)

@pytest.mark.parametrize('pad', [0, 2, 4])
def test_crop_flip_equals_one_image_at_a_time(pad):
    x = torch.randint(0, 256, (20, 3, 9, 7), dtype=torch.uint8)
    top, left = torch.randint(0, 2*pad+1, (2, 20))
    flip = torch.rand(20) < .5
    out = crop_flip(x, top, left, flip, pad)
    for i in range(20):
        big = torch.zeros(3, 9+2*pad, 7+2*pad, dtype=torch.uint8)
        big[:, pad:pad+9, pad:pad+7] = x[i]
        ref = big[:, top[i]:top[i]+9, left[i]:left[i]+7]
        assert torch.equal(out[i], ref.flip(-1) if flip[i] else ref)

def test_crop_flip_statistics():
    torch.manual_seed(0)
    x = torch.zeros(9000, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 4, 1] = 1
    out = CropFlip(pad=1)(TensorImage(x), split_idx=0)
    at = out.as_subclass(torch.Tensor).sum((0, 1)).float()/9000
    for cols in (slice(0, 3), slice(5, 8)): assert torch.allclose(at[3:6, cols], torch.full((3, 3), 1/18), atol=.01)
    assert torch.equal(CropFlip()(TensorImage(x), split_idx=1), TensorImage(x))

# --- reproducible batches

def run(dl): return [(x.clone(), y.clone(), dl.idxs) for x, y in dl]
def same(a, b): return all(torch.equal(o, p) for s, t in zip(a, b) for o, p in zip(s, t))

def test_a_seed_fixes_the_batches(folder):
    def go(seed):
        seed_all(seed)
        dl = small(folder).train
        return run(dl), run(dl)
    (a, a2), (b, b2), (c, _) = go(0), go(0), go(1)
    assert same(a, b) and same(a2, b2) and not same(a, a2) and not same(a, c)

def test_batches_resume_from_the_two_states(folder):
    dl = small(folder).train
    run(dl)
    state = torch.get_rng_state(), dl.rng.getstate()
    a = run(dl)
    torch.set_rng_state(state[0])
    dl.rng.setstate(state[1])
    assert same(a, run(dl))

def test_train_shuffles_and_drops_valid_does_neither(folder):
    dls = small(folder)
    a, b = (torch.cat([i for *_, i in run(dl)]) for dl in dls.loaders)
    assert len(a) == 32 == len(a.unique()) and a.tolist() != sorted(a.tolist())
    assert b.tolist() == list(range(15))

@pytest.mark.parametrize('img_size,workers', [(None, 0), (80, 0), (80, 2)])
def test_idxs_name_the_images_of_the_batch(folder, img_size, workers):
    dl = small(folder, img_size=img_size, augment=False, num_workers=workers).train
    n = 0
    for x, y in dl:
        n += 1
        for o, c, i in zip(x, y, dl.idxs.tolist()):
            im, label = dl.after_item(dl.dataset[i])
            assert torch.equal(o, im.float()/255) and c == label
    assert n == 4

def test_pixels_stay_in_unit_range(folder):
    for dl in small(folder).loaders:
        for x, _ in dl: assert x.dtype == torch.float32 and 0 <= x.min() and .9 < x.max() <= 1

# --- parts

def test_holdout_is_disjoint_stratified_and_seeded(folder):
    a, b, c = (small(folder, holdout=.25, seed=s) for s in (0, 0, 1))
    train, held, test = ({int(i) for i in dl.rows} for dl in a.loaders)
    assert train | held == set(range(36)) and not train & held
    assert len(test) == 15 and a.test is a[2] and not a.valid_is_test
    assert np.bincount(a.valid.images.y[list(held)]).tolist() == [3, 3, 3]
    assert torch.equal(a.valid.rows, b.valid.rows) and not torch.equal(a.valid.rows, c.valid.rows)
    assert len(small(folder, holdout=6).valid.rows) == 6

def test_subsets_are_balanced_and_fixed(folder):
    torch.manual_seed(0)
    a = small(folder, n_train=9, n_test=6)
    torch.manual_seed(1)
    b = small(folder, n_train=9, n_test=6)
    for x, y in zip(a.loaders, b.loaders): assert torch.equal(x.rows, y.rows)
    assert np.bincount(a.train.images.y[a.train.rows]).tolist() == [3, 3, 3]
    assert np.bincount(a.test.images.y[a.test.rows]).tolist() == [2, 2, 2]

def test_pick_balanced_takes_what_there_is():
    y = np.repeat([0, 1], [3, 10])
    assert np.bincount(y[pick_balanced(y, 8)]).tolist() == [3, 5] and len(pick_balanced(y, 13)) == 13

# --- cache

def test_cache_is_used_rebuilt_and_follows_changes(folder, monkeypatch):
    calls, plain = [], pixels.decode_images
    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)
    for module in (pixels, sources): monkeypatch.setattr(module, 'decode_images', counted)
    x = small(folder).train.images.x
    assert torch.equal(small(folder).train.images.x, x) and len(calls) == 1
    file, = pixels.cache_dir().iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match='damaged'): assert torch.equal(small(folder).train.images.x, x)
    assert torch.equal(small(folder).train.images.x, x) and len(calls) == 2
    Image.new('RGB', (32, 32)).save(folder/'train'/'a'/'0000.png')
    assert small(folder).train.images.x[0].max() == 0 and len(calls) == 3
    small(folder, cache=False)
    assert len(calls) == 4

# --- fastai's tools

@pytest.mark.parametrize('img_size', [None, 80])
def test_fastai_learner(folder, tmp_path, img_size):
    import matplotlib
    matplotlib.use('Agg')
    seed_all(0)
    dls = small(folder, img_size=img_size, num_workers=0)
    learn = Learner(dls, tiny_net(3, img_size or 32), path=tmp_path).remove_cb(ProgressCallback)
    assert isinstance(learn.loss_func, CrossEntropyLossFlat) and dls.c == 3
    with learn.no_logging(): learn.fit(1, .01)
    assert np.isfinite(learn.validate()[0])
    probs, targs = learn.get_preds()
    assert targs.tolist() == [0]*5+[1]*5+[2]*5
    x = torch.cat([x for x, _ in dls.valid]).as_subclass(torch.Tensor)
    with torch.no_grad(): assert torch.allclose(learn.model(x).softmax(1), probs.as_subclass(torch.Tensor), atol=1e-5)
    assert len(learn.get_preds(ds_idx=0)[1]) == 36
    file = folder/'test'/'b'/'0003.png'
    for item in (file, str(file), Image.open(file), np.array(Image.open(file)), dls.valid.items[8]):
        name, _, p = learn.predict(item)
        assert name in 'abc' and torch.allclose(p, probs[8], atol=1e-5)
    labelled = dls.test_dl([file, folder/'test'/'c'/'0000.png'], with_labels=True, num_workers=0)
    assert learn.get_preds(dl=labelled)[1].tolist() == [1, 2]
    interp = Interpretation.from_learner(learn)
    interp.plot_top_losses(4)
    interp.show_results([0, 3])
    learn.show_results()
    dls.show_batch()
    dls.valid.show_batch()
    dls.train.show_batch(unique=True)
    learn.export('e.pkl')
    assert (tmp_path/'e.pkl').stat().st_size < 100_000
    again = load_learner(tmp_path/'e.pkl')
    for item in (file, Image.open(file)): assert torch.allclose(again.predict(item)[2], probs[8], atol=1e-5)
    assert list(again.dls.vocab) == ['a', 'b', 'c'] and again.dls.valid_is_test
    assert len(dls.train.one_batch()[0]) == 8, 'export must leave the loaders as they were'

def test_a_test_item_is_brought_to_the_size_of_the_data(folder):
    dls = small(folder)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8))
    x, = dls.test_dl([photo]).one_batch()
    assert x.shape == (1, 3, 32, 32) and x.max() <= 1 and not dls.test_dl([photo]).in_memory
    grey = dls.test_dl([np.zeros((32, 32)), torch.ones(3, 32, 32)]).one_batch()[0]
    assert grey[0].max() == 0 and grey[1].min() == 1

def test_unequal_large_images_default_to_224(tmp_path):
    for i, c in enumerate('ab'): draw(tmp_path/c, 4, size=90+i)
    dls = small(tmp_path, bs=3, holdout=.25, num_workers=0)
    assert [dl.one_batch()[0].shape[-1] for dl in dls.loaders] == [224, 224] and not dls.train.in_memory

def test_pickles_of_cifar_can_be_enlarged(tmp_path):
    write_cifar10(tmp_path)
    assert small('cifar10', path=tmp_path, img_size=96, num_workers=0).one_batch()[0].shape == (8, 3, 96, 96)

# --- downloads

def test_download_really_downloads(tmp_path, monkeypatch):
    from fastai.data import external
    for part in ('train', 'test'):
        for c in 'ab': draw(tmp_path/'web'/'cifar10'/part/c, 4)
    with tarfile.open(tmp_path/'web'/'cifar10.tgz', 'w:gz') as tar: tar.add(tmp_path/'web'/'cifar10', 'cifar10')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=tmp_path/'web'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    monkeypatch.setattr(sources, 'untar_data', lambda u: external.untar_data(u, base=str(tmp_path/'home')))
    try:
        monkeypatch.setitem(sources.SOURCES, 'cifar10', sources.SOURCES['cifar10']._replace(url=f'{url}/cifar10.tgz'))
        assert len(small('cifar10').train_ds) == 8
        monkeypatch.setitem(sources.SOURCES, 'cifar10', sources.SOURCES['cifar10']._replace(url=f'{url}/gone.tgz'))
        with pytest.raises(OSError, match=r"could not be downloaded(.|\n)*get_dls\('cifar10', path=DIR\)"):
            small('cifar10')
    finally:
        server.shutdown()
        server.server_close()

# --- bad input

class Touch:
    def __init__(self, path): self.path = path
    def __reduce__(self): return (os.system, (f'touch {self.path}',))

@pytest.mark.parametrize('protocol', [0, 2, 5])
def test_a_malicious_pickle_is_refused(tmp_path, protocol):
    d = write_cifar10(tmp_path)
    (d/'data_batch_2').write_bytes(pickle.dumps({b'data': Touch(tmp_path/'touched')}, protocol))
    with pytest.raises(ValueError, match=r'data_batch_2.*system'): small('cifar10', path=tmp_path)
    assert not (tmp_path/'touched').exists()

def test_the_unpickler_reads_every_protocol():
    a = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for p in range(5): assert np.array_equal(_load_pickle(pickle.dumps({'data': a}, p), 'x')['data'], a)
    for bad in (b'cbuiltins\neval\n.', b'cnumpy\nload\n.', b'cnumpy.core.multiarray\nndarray\n.'):
        with pytest.raises(pickle.UnpicklingError, match='which no data set needs'):
            _SafeUnpickler(io.BytesIO(bad)).load()

def test_incomplete_pickles(tmp_path):
    d = write_cifar10(tmp_path)
    whole = (d/'data_batch_3').read_bytes()
    (d/'data_batch_3').write_bytes(whole[:len(whole)//2])
    with pytest.raises(ValueError, match='data_batch_3 is not a whole'): read_cifar(tmp_path)
    bad = cifar_dict(20, 10, 0)
    bad[b'labels'] = bad[b'labels'][:-1]
    (d/'data_batch_3').write_bytes(pickle.dumps(bad))
    with pytest.raises(ValueError, match='20 images but 19 labels'): read_cifar(tmp_path)
    (d/'data_batch_3').unlink()
    with pytest.raises(ValueError, match='data_batch_3 missing'): read_cifar(tmp_path)
    with pytest.raises(FileNotFoundError, match='cifar10 was not found'): read_cifar(tmp_path.parent)

def test_a_truncated_archive(tmp_path):
    d = write_cifar10(tmp_path/'a')
    f = tmp_path/'cifar-10-python.tar.gz'
    with tarfile.open(f, 'w:gz') as tar: tar.add(d, d.name)
    f.write_bytes(f.read_bytes()[:-5000])
    with pytest.raises(ValueError, match='not a whole archive'): small('cifar10', path=tmp_path)

def test_a_smaller_copy_than_published_warns(folder):
    with pytest.warns(UserWarning, match=r'\(36, 15\) training and test images, the published'):
        small('cifar10', path=folder)

@pytest.mark.parametrize('cut', [0, 300, -40])
def test_a_half_downloaded_image_is_named(tmp_path, cut):
    for c in 'ab': draw(tmp_path/c, 4, ext='jpg')
    f = tmp_path/'b'/'0002.jpg'
    f.write_bytes(f.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r'b/0002.jpg.*fetch it again'): small(tmp_path, bs=3, holdout=.25)

def test_names_and_folders(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'cifar10"): small('cifar-10')
    with pytest.raises(ValueError, match='Unknown data set'): small('imagenette', path=tmp_path)
    with pytest.raises(FileNotFoundError, match='There is no folder'): small(tmp_path/'no')
    with pytest.raises(FileNotFoundError, match='it has to hold train/<class>'): small('cifar10', path=tmp_path/'no')
    with pytest.raises(ValueError, match='no images'): small(tmp_path)

def test_class_folders(folder):
    (folder/'train'/'d').mkdir()
    with pytest.raises(ValueError, match='no images in .*train/d'): small(folder)
    (folder/'train'/'d').rmdir()
    draw(folder/'test'/'e', 2)
    with pytest.raises(ValueError, match='test part .* that the training set lacks: e. There are a, b, c: name folders alike'):
        small(folder)
    for c in 'eb': shutil.rmtree(folder/'test'/c)
    with pytest.raises(ValueError, match=r"no images of these classes: b\."): small(folder)
    for c in 'bc': shutil.rmtree(folder/'train'/c)
    with pytest.raises(ValueError, match="only the class 'a'"): small(folder)
    shutil.rmtree(folder/'train')
    with pytest.raises(ValueError, match='no folder train'): small(folder)

def test_misplaced_images(tmp_path):
    draw(tmp_path/'x', 2)
    with pytest.raises(ValueError, match='directly in'): small(tmp_path/'x')
    for c in 'ab': draw(tmp_path/'y'/c/'images', 3)
    with pytest.raises(ValueError, match="Two folders have the class name 'images'"): small(tmp_path/'y')

@pytest.mark.parametrize('kwargs,msg', [
    (dict(bs=2), r'bs=2: expected a whole number of images \(a relation compares .* ≥ 3'),
    (dict(bs=37), 'bs=37 is above the 36'),
    (dict(holdout=1.5), 'holdout=1.5 is out of range'),
    (dict(holdout=-.1), 'holdout=-0.1 is out'),
    (dict(holdout=36), 'holdout=36 is out'),
    (dict(holdout=1.), 'holdout=1.0 is out'),
    (dict(holdout=.001), 'holdout=0.001 is out'),
    (dict(n_train=0), 'n_train=0: expected a whole number of images of the train set ≥ 1'),
    (dict(n_train=99), 'n_train=99: .* train set ≥ 1 and ≤ 36'),
    (dict(n_test=16), 'n_test=16: .* test set ≥ 1 and ≤ 15'),
    (dict(img_size=0), 'img_size=0: expected a whole side in pixels ≥ 8'),
    (dict(img_size=32.5), 'img_size=32.5')])
def test_numbers_out_of_range(folder, kwargs, msg):
    with pytest.raises(ValueError, match=msg): small(folder, **kwargs)

def test_missing_parts_and_mixed_sizes(tmp_path):
    for i, c in enumerate('ab'): draw(tmp_path/c, 6, size=32+4*i)
    with pytest.raises(ValueError, match='give holdout=0.2'): small(tmp_path)
    with pytest.raises(ValueError, match='no test set'): small(tmp_path, bs=4, holdout=.5, n_test=2)
    with pytest.raises(ValueError, match=r'differ in size: most are 32x32, .*b/0000.png is 36x36.*img_size=32'):
        small(tmp_path, bs=4, holdout=.5)
    dls = small(tmp_path, bs=4, holdout=.5, img_size=32)
    assert dls.train.images.x.shape == (12, 3, 32, 32)
    with pytest.raises(ValueError, match='no test set'): dls.test

def header_of_png(path, width, height):
    "The beginning of a PNG, which says how large it would be"
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + header + struct.pack('>I', zlib.crc32(header))
                     + struct.pack('>I', 0) + b'IDAT' + struct.pack('>I', zlib.crc32(b'IDAT')))

@pytest.mark.filterwarnings('ignore:Image size')
@pytest.mark.parametrize('cache', [True, False])
def test_one_huge_image_does_not_decide_the_size(folder, cache):
    "It is named, and not decoded for that; before, all images became 224 x 224"
    header_of_png(folder/'train'/'a'/'0000.png', 13_000, 13_000)
    with pytest.raises(ValueError, match=r'most are 32x32, .*a/0000.png is 13000x13000'): small(folder, cache=cache)

def test_one_small_image_does_not_decide_the_size(tmp_path):
    for c in 'ab':
        draw(tmp_path/'train'/c, 6, 80)
        draw(tmp_path/'test'/c, 4, 90)
    Image.new('RGB', (8, 8)).save(tmp_path/'train'/'a'/'0000.png')
    assert small(tmp_path, num_workers=0).one_batch()[0].shape == (8, 3, 224, 224)

def test_few_sizes_are_looked_at(folder, monkeypatch):
    looked_at = []
    monkeypatch.setattr(sources, 'stored_size', lambda f: looked_at.append(f) or (32, 32))
    monkeypatch.setattr(sources, '_LOOKED_AT', 10)
    small(folder)
    assert len(looked_at) <= 10 and {f.parent.parent.name for f in looked_at} == {'train', 'test'}

def test_an_archive_that_would_fill_the_memory(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    archive = tmp_path/'new'/'cifar-10-python.tar.gz'
    archive.parent.mkdir()
    with tarfile.open(archive, 'w:gz') as tar: tar.add(tmp_path/'cifar-10-batches-py', 'cifar-10-batches-py')
    monkeypatch.setattr(cifar, '_LARGEST', 1000)
    with pytest.raises(ValueError, match='is not a whole archive: .* in it has .* bytes'): read_cifar(archive)
