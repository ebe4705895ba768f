"""Whatever a user types or a folder holds: a `ValueError` or an `OSError` with a message, never another error and never a hang"""
import io
import math
import os
import signal
import socket
import struct
import tempfile
import threading
import warnings
import zlib
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from conftest import net
from fastrain.attacks import named
from fastrain.core import check_number, parse_eps
from fastrain.data.sources import get_dls
from fastrain.models.loading import clean_state_dict, load_weights
from fastrain.training.methods import parse_method, piece_families

# --- the rule

class Hang(BaseException):
    "Not an `Exception`, so that no handler swallows it"

@contextmanager
def time_limit(seconds):
    def stop(*_): raise Hang(f'no answer within {seconds} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def obeys(call, wrong_kind=False, seconds=20):
    "What `call()` returns, None if it refuses in the right way; any other error comes out"
    with time_limit(seconds), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: return call()
        except TypeError as e:
            if not wrong_kind or not str(e): raise
        except (ValueError, OSError) as e: assert str(e), f'{type(e).__name__} without a message'

def fuzz(few, many, **strategies):
    "A test of `few` examples, and one of `many` among the slow tests; the same examples each time"
    def make(f):
        @pytest.mark.parametrize('n', [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(n):
            run = given(**strategies)(f)
            settings(max_examples=n, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))(run)()
        return test
    return make

@pytest.fixture(scope='module', autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield

# --- values of any kind

def tensors():
    makers = [torch.tensor(2.), torch.tensor(True), torch.tensor([3]), torch.tensor([1, 2]), torch.tensor(1 + 2j), torch.empty(0),
              torch.tensor(math.nan), torch.tensor(1., device='meta'), torch.tensor(1.).to_sparse()]
    return st.sampled_from(makers)

def numpy_scalars():
    return st.sampled_from([np.float32(.5), np.int8(3), np.True_, np.complex64(2 + 1j), np.datetime64('2020'), np.str_('1'), np.void(b'ab'),
                            np.float16('inf'), np.longdouble('1e4000'), np.array([1]), np.array(1.)])

numbers = st.one_of(st.integers(), st.floats(), st.fractions(), st.sampled_from([10**400, -10**400, Fraction(10**400), 2**60 + 1, 0, -1]))
anything = st.one_of(numbers, st.none(), st.booleans(), st.complex_numbers(), st.decimals(), st.text(max_size=8), st.binary(max_size=4),
                     st.lists(st.integers(), max_size=2), st.just({}), tensors(), numpy_scalars())

# --- sizes

LONG_SIZES = ['1'*4000, '1'*5000, '1'*5000 + '/255', '8/' + '9'*400]
size_text = st.one_of(st.text(max_size=12), st.text('0123456789./eE-+_ naif', max_size=14), st.sampled_from(LONG_SIZES))

@fuzz(100, 1500, s=st.one_of(size_text, anything))
def test_sizes(s): size_is_float(s)

def size_is_float(s):
    res = obeys(lambda: parse_eps(s), wrong_kind=not isinstance(s, str))
    assert res is None or type(res) is float

@fuzz(50, 1000, a=st.floats(0, 1e3), b=st.integers(1, 1000))
def test_fractions_are_read(a, b):
    assert parse_eps(f'{a!r}/{b}') == a/b
    assert parse_eps(a) == parse_eps(repr(a)) == a

# --- numbers

bounds = st.fixed_dictionaries({}, optional=dict(at_least=st.floats(-10, 10), above=st.floats(-10, 10), at_most=st.floats(-10, 10),
                                                 below=st.floats(-10, 10), whole=st.booleans(), infinite=st.booleans()))

def accepted_number(value, **kwargs):
    "`check_number`, and that what it accepts is what it was given"
    res = check_number('x', value, **kwargs)
    assert type(res) is (int if kwargs.get('whole') else float)
    assert not _is_flag(value), 'a truth value was taken for a number'
    assert not (isinstance(value, np.complexfloating) and value.imag), 'the imaginary part was dropped'
    if isinstance(value, int) and kwargs.get('whole'): assert res == value, 'another whole number came out'
    assert not math.isnan(res) and (kwargs.get('infinite') or math.isfinite(res))
    return res

def _is_flag(v): return isinstance(v, (bool, np.bool_)) or isinstance(v, Tensor) and v.dtype == torch.bool

@fuzz(150, 2000, value=anything, kwargs=bounds)
def test_numbers(value, kwargs):
    res = obeys(lambda: accepted_number(value, **kwargs))
    if res is None: return
    assert 'at_least' not in kwargs or res >= kwargs['at_least']
    assert 'at_most' not in kwargs or res <= kwargs['at_most']
    assert 'above' not in kwargs or res > kwargs['above']
    assert 'below' not in kwargs or res < kwargs['below']

# --- names of attacks

ATTACK_PARTS = ['pgd', 'cw', 'aa', 'natural', 'noise', 'fgsm', 'apgd-ce', 'square', 'aa-plus', '20', '0', '-las', '-lbgat', '@', '+', '-',
                '8/255', '4', '1e-3', 'nan', 'inf', '-1', '\n', ' ', 'PGD', '٣', '²', '\0', 'ß', '9'*30, '9'*5000, 'l2', '/0']
attack_names = st.one_of(st.lists(st.sampled_from(ATTACK_PARTS), max_size=7).map(''.join), st.text(max_size=10),
                         st.text('pgdcwa0123456789-+@/.', max_size=14))
sizes = st.one_of(st.sampled_from([8/255, .5, 1, 0, -1, math.nan, math.inf, 10**400, '8/255', None, torch.tensor([.1, .2])]), numbers)

def parsers(): return [f for f in (named.named_attack, getattr(named, 'parse_attack', None)) if f]

def made_attack(parse, name, **kwargs):
    res = parse(name, **kwargs)
    assert '\n' not in name, 'a name with a line break was accepted'
    return res

@fuzz(150, 1500, name=attack_names, norm=st.sampled_from(['linf', 'l2', 'l1', '']))
def test_names_of_attacks(name, norm):
    for parse in parsers(): obeys(lambda: made_attack(parse, name, norm=norm))

ATTACKS = ['natural', 'noise', 'fgsm', 'pgd20', 'cw10-las', 'pgd5@4/255', 'aa', 'square', 'pgd2+fgsm']

@fuzz(60, 600, name=st.sampled_from(ATTACKS), eps=sizes, alpha=st.one_of(st.none(), sizes),
      norm=st.one_of(st.sampled_from(['linf', 'l2']), anything))
def test_settings_of_attacks(name, eps, alpha, norm):
    for parse in parsers(): obeys(lambda: made_attack(parse, name, eps=eps, alpha=alpha, norm=norm), wrong_kind=True)

@pytest.mark.parametrize('name', [None, 3, b'pgd', ['pgd20'], {}])
def test_attacks_of_another_kind(name):
    for parse in parsers(): obeys(lambda: parse(name), wrong_kind=True)

# --- methods

def piece_keys(): return sorted({k for family in piece_families.values() for k in family.registry})

PARAMETERS = ['beta', 'weight', 'confidence', 'begin', 'lam', 'warmup', 'of', 'gamma', 'decay', 'detach', 'variant', 'k', 'dim', 'T',
              'queue', 'temperature', 'momentum', 'interval', 'lr', 'breaks', 'noise', 'first', 'last', 'start', 'end', 'ce', 'x', '']
VALUES = ['1', '0', '-1', '.5', 'nan', 'inf', '-inf', '1e400', 'true', 'None', '[1]', '{}', "'a'", 'a', '()', '(1,2)', '1j', '...',
          "b'x'", '1_0', '9'*400, '9'*5000, '\0', '(', '"', '1+1', '', '~'*5000 + '1', '('*300]
settings_text = st.builds('{}={}'.format, st.sampled_from(PARAMETERS), st.sampled_from(VALUES))
def _piece(key, args): return key + ':'*bool(args) + ','.join(args)
piece_text = st.builds(_piece, st.sampled_from(piece_keys()), st.lists(settings_text, max_size=2))
method_text = st.one_of(st.lists(piece_text, min_size=1, max_size=3).map('+'.join), st.text(max_size=12),
                        st.text("attrdes+:=,()[]*'{}$^\\ 0.β′∗−", max_size=24))

@fuzz(150, 1500, method=method_text)
def test_methods(method):
    res = obeys(lambda: parse_method(method))
    if res is not None: assert parse_method(res.name).name == res.name, 'a canonical name is not its own canonical name'

def own_settings(piece):
    import inspect
    if piece.__init__ is object.__init__: return []
    return [p for p in inspect.signature(piece.__init__).parameters if p not in ('self', 'kwargs', 'standard')]

@pytest.mark.parametrize('axis', sorted(set(piece_families) - {'policy'}))
def test_every_setting_of_every_piece(axis):
    for key,piece in piece_families[axis].registry.items():
        for name in own_settings(piece):
            for value in ('nan', '-1', 'inf', "'a'", '()', '9'*400): obeys(lambda: parse_method(f'{key}:{name}={value}'))

@pytest.mark.parametrize('method', [None, 3, b'at', ['at'], {}])
def test_methods_of_another_kind(method): obeys(lambda: parse_method(method), wrong_kind=True)

# --- checkpoints

WEIGHT = torch.zeros(2)
STATE_KEYS = ['state_dict', 'model', 'net', 'model_state_dict', 'a', 'module.a', 'module.module.b', 'net.a', 'model.net.c', '_orig_mod.a',
              'sub_block1.a', 'module.', '']
state_keys = st.one_of(st.sampled_from(STATE_KEYS), st.text(max_size=5))
odd_keys = st.one_of(state_keys, st.sampled_from([0, None, (1,), b'a', 1.5]))
leaves = st.one_of(st.just(WEIGHT), st.just(torch.nn.Parameter(WEIGHT)), st.sampled_from([None, 3, 'x', [], np.zeros(2)]))
states = st.recursive(st.dictionaries(state_keys, st.just(WEIGHT), max_size=4),
                      lambda inner: st.dictionaries(odd_keys, st.one_of(leaves, inner), max_size=3), max_leaves=6)

@fuzz(200, 1500, state=st.one_of(states, anything), keys=st.lists(state_keys, max_size=3))
def test_state_dicts(state, keys):
    res = obeys(lambda: clean_state_dict(state, keys), wrong_kind=True, seconds=1)
    if not res: return
    assert all(isinstance(k, str) and isinstance(v, Tensor) for k,v in res.items())
    assert clean_state_dict(res, keys) == res

def odd_weights():
    w = net(0).state_dict()['conv1.weight']
    return dict(int=w.int(), bool=w.bool(), half=w.half(), scalar=w.sum(), flat=w.flatten(), empty=w[:0], transposed=w.transpose(2, 3),
                sparse=w.to_sparse(), meta=w.to('meta'), complex=w.to(torch.complex64), nested=torch.nested.nested_tensor([w[0], w[0]]))

@pytest.mark.parametrize('kind', sorted(odd_weights()))
def test_weights_of_another_kind(kind):
    obeys(lambda: load_odd(kind))

def load_odd(kind): return load_weights(net(1), dict(net(0).state_dict(), **{'conv1.weight': odd_weights()[kind]}))

@pytest.mark.parametrize('source', ['', '/nosuch', '/', '\0', 'x'*5000, '~nosuchuser/x', __file__, None, 3, [], b'/x'])
def test_sources_of_weights(source): obeys(lambda: load_weights(net(1), source), wrong_kind=not isinstance(source, str))

# --- folders

def image_bytes(seed=0, fmt='PNG', size=(8, 8), mode='RGB'):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, fmt)
    return buffer.getvalue()

PNG = image_bytes()

def _chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def huge_png():
    "A PNG of 100 bytes that claims 60,000 x 60,000 pixels"
    header = _chunk(b'IHDR', struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + _chunk(b'IDAT', zlib.compress(b'\0'*10)) + _chunk(b'IEND', b'')

def folder(root):
    "Train and test images of two classes"
    for part in ('train', 'test'):
        for i,c in enumerate('ab'):
            (root/part/c).mkdir(parents=True)
            for j in range(3): (root/part/c/f'{j}.png').write_bytes(image_bytes(2*j + i))
    return root

def _write(name, data): return lambda d: (d/name).write_bytes(data() if callable(data) else data)
def _link(name, to): return lambda d: (d/name).symlink_to(to(d) if callable(to) else to)
def _bytes_name(d): Path(os.fsdecode(os.fsencode(d) + b'/\xff.png')).write_bytes(PNG)
def _filled(d):
    (d/'y.png').mkdir()
    (d/'y.png'/'z.png').write_bytes(PNG)
def _socket(d):
    with socket.socket(socket.AF_UNIX) as s: s.bind(str(d/'s.png'))

STRANGE = dict( # name: what to put into a folder
    truncated=_write('0.png', PNG[:-20]),
    cut_header=_write('0.png', PNG[:10]),
    empty=_write('0.png', b''),
    text=_write('t.png', b'hello'),
    no_suffix=_write('plain', PNG),
    other_suffix=_write('notes.txt', b'hello'),
    hidden=_write('.h.png', b''),
    upper=_write('U.PNG', PNG),
    lying_suffix=_write('l.jpg', PNG),
    other_size=_write('o.png', lambda: image_bytes(size=(9, 7))),
    pixel=_write('p.png', lambda: image_bytes(size=(1, 1))),
    first_pixel=_write('0.png', lambda: image_bytes(size=(1, 1))),
    tall=_write('0.png', lambda: image_bytes(size=(3, 400))),
    deep=_write('d.png', lambda: _saved(np.zeros((8, 8), np.uint16))),
    palette=_write('q.png', lambda: image_bytes(mode='P')),
    bits=_write('m.png', lambda: image_bytes(mode='1')),
    gif=_write('g.gif', lambda: image_bytes(fmt='GIF')),
    huge=_write('x.png', huge_png),
    unicode_name=_write('ü 日本 😀.png', PNG),
    line_break=_write('a\nb.png', PNG),
    long_name=_write('n'*240 + '.png', PNG),
    bytes_name=_bytes_name,
    folder_as_image=lambda d: (d/'x.png').mkdir(),
    folder_with_image=_filled,
    empty_folder=lambda d: (d/'empty').mkdir(),
    hidden_folder=lambda d: (d/'.git').mkdir(),
    unicode_folder=lambda d: (d/'日本 😀').mkdir(),
    up=_link('up', '..'),
    here=_link('here', '.'),
    root=_link('root', lambda d: d.parent.parent),
    itself=_link('loop', 'loop'),
    image_loop=_link('i.png', 'i.png'),
    broken=_link('b.png', '/nosuch'),
    broken_folder=_link('c', '/nosuch'),
    zeros=_link('z.png', '/dev/zero'),
    nothing=_link('n.png', '/dev/null'),
    twice=_link('w.png', '0.png'),
    socket=_socket,
)

def _saved(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'PNG')
    return buffer.getvalue()

def spoil(root, strange, where):
    try: STRANGE[strange](root/where)
    except OSError: pass # two strange things of one name

def read(root, cache=True):
    "All images of the folder"
    dls = get_dls(root, bs=3, device='cpu', num_workers=0, cache=cache)
    return [len(y) for dl in dls.loaders for _,y in dl]

@pytest.mark.parametrize('where', ['train/a', *(pytest.param(o, marks=pytest.mark.slow) for o in ('test', ''))])
@pytest.mark.parametrize('strange', STRANGE)
def test_one_strange_thing_in_a_folder(tmp_path, strange, where):
    spoil(folder(tmp_path), strange, where)
    obeys(lambda: read(tmp_path))

strange_thing = st.tuples(st.sampled_from(sorted(STRANGE)), st.sampled_from(['', 'train', 'train/a', 'test/b']))

@fuzz(10, 100, things=st.lists(strange_thing, min_size=2, max_size=4), cache=st.booleans())
def test_several_strange_things_in_a_folder(things, cache):
    with tempfile.TemporaryDirectory() as root:
        folder(Path(root))
        for strange,where in things: spoil(Path(root), strange, where)
        obeys(lambda: read(Path(root), cache))

FORMATS = dict(png='PNG', jpg='JPEG', bmp='BMP', gif='GIF', webp='WEBP', ppm='PPM', tif='TIFF')
change = st.tuples(st.sampled_from(['set', 'cut', 'insert']), st.integers(0, 399), st.sampled_from([0, 1, 127, 128, 255]))
changes = st.lists(change, min_size=1, max_size=5)

@fuzz(30, 500, suffix=st.sampled_from(sorted(FORMATS)), changes=changes)
def test_damaged_image(suffix, changes):
    data = bytearray(image_bytes(fmt=FORMATS[suffix]))
    for what,at,byte in changes: damage(data, what, at % max(1, len(data)), byte)
    with tempfile.TemporaryDirectory() as root:
        folder(Path(root))
        (Path(root)/'train'/'a'/f'x.{suffix}').write_bytes(data)
        obeys(lambda: read(Path(root), cache=False))

def damage(data, what, at, byte):
    if what == 'cut': del data[max(8, at):]
    elif what == 'insert': data[at:at] = bytes([byte])
    elif at < len(data): data[at] = byte

PLACES = ['', '.', '/nosuch', 'nosuch', '\0', '/\0', 'x'*5000, '/dev/null', __file__, '~nosuchuser/x', '\ud800', None, 3, b'/', []]

@pytest.mark.parametrize('name', PLACES, ids=range(len(PLACES)))
def test_names_of_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    obeys(lambda: get_dls(name, bs=3, device='cpu'), wrong_kind=not isinstance(name, str))

@fuzz(10, 100, holdout=st.one_of(st.just(0), anything), n_train=st.one_of(st.none(), numbers), bs=st.one_of(st.just(3), numbers))
def test_numbers_of_images(holdout, n_train, bs):
    obeys(lambda: get_dls('digits', bs=bs, holdout=holdout, n_train=n_train, device='cpu'), wrong_kind=True)

# --- faults that there were

def cyclic():
    state = {}
    state['model'] = state
    return state

def waiting_pipe():
    "A pipe nobody writes to, in a folder of images; it is closed once somebody waits for it, as a waiting thread cannot be stopped"
    with tempfile.TemporaryDirectory() as root:
        pipe = folder(Path(root))/'train'/'a'/'x.png'
        os.mkfifo(pipe)
        done,hung = threading.Event(),threading.Event()
        def close():
            while not done.wait(.2):
                try: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)) # works only where somebody waits
                except OSError: continue
                hung.set()
        closer = threading.Thread(target=close)
        closer.start()
        try: read(Path(root), cache=False)
        except ValueError as e:
            if hung.is_set(): raise Hang('waits for a pipe') from e # the error of reading it once it was closed
            raise
        finally:
            done.set()
            closer.join()

def read_strange(strange):
    with tempfile.TemporaryDirectory() as root:
        spoil(folder(Path(root)), strange, 'train/a')
        return read(Path(root), cache=False)

def unchanged_by(kind):
    "A state dict that does not fit changes nothing"
    model = net(1)
    before = {k: v.clone() for k,v in model.state_dict().items()}
    odd = dict(net(0).state_dict(), **{'conv1.weight': odd_weights()[kind]})
    try: load_weights(model, odd)
    finally: assert all(v.equal(before[k]) for k,v in model.state_dict().items())

FAULTS = [ # what was no clear error once, and what the message says now
    (lambda: check_number('n', math.inf, whole=True, infinite=True), 'n=inf: expected a whole number'),
    (lambda: check_number('n', np.True_), 'n=.*True.*: expected a number'),
    (lambda: check_number('n', torch.tensor(True)), 'n=tensor.True.: expected a number'),
    (lambda: check_number('n', np.complex64(2 + 1j)), 'n=.*2\\+1j.*: expected a number'),
    (lambda: check_number('n', 10**5000), 'n=a number of thousands of digits: expected'),
    (lambda: parse_eps('8/255\n'), "'8/255.n' is not a size"),
    (lambda: parse_eps('-1'), "'-1' is not a size"),
    (lambda: parse_eps(10**400), 'is not a size'),
    (lambda: named.named_attack('pgd20', eps=10**400), 'eps=10*[.]{3}: expected a size in pixel units'),
    (lambda: named.named_attack('pgd20\n'), 'Unknown attack'),
    (lambda: named.named_attack('pgd٣'), 'Unknown attack'),
    (lambda: named.named_attack('pgd' + '9'*5000), 'expected a name of at most 1000 characters'),
    (lambda: parse_method(f'trades:beta={"9"*400}'), 'beta=9*[.]{3}: expected a number'),
    (lambda: parse_method('mca:queue=inf'), 'queue=inf: expected a whole number'),
    (lambda: parse_method('las:interval=inf'), 'interval=inf: expected a whole number'),
    (lambda: parse_method('crd:k=inf'), 'k=inf: expected a whole number'),
    (lambda: parse_method(f'at:confidence={"~"*900}1'), 'confidence=.*: expected a number'),
    (lambda: parse_method(f'at:confidence={"("*5000}'), 'expected a name of at most 1000 characters'),
    (lambda: clean_state_dict({1: WEIGHT}), 'expected named tensors'),
    (lambda: clean_state_dict(cyclic()), 'holds itself'),
    *((lambda kind=kind: unchanged_by(kind), '1 sparse, nested.*conv1.weight') for kind in ('sparse', 'meta', 'nested', 'complex')),
    (lambda: read_strange('huge'), 'x.png: it is too large .*3600000000 pixels'),
    (lambda: read_strange('socket'), 's.png: it is no regular file'),
    (lambda: read_strange('zeros'), 'z.png: it is no regular file'),
    (waiting_pipe, 'x.png: it is no regular file'),
    (lambda: get_dls('~nosuchuser/x', bs=3), 'There is no folder ~nosuchuser/x'),
    (lambda: get_dls('cifar10', '~nosuchuser/x', bs=3), 'There is no ~nosuchuser/x'),
    *((lambda odd=odd: get_dls('digits', bs=3, holdout=odd, device='cpu'), 'holdout=.*: expected a share of the training images')
      for odd in (math.inf, Decimal('nan'), torch.ones(2), torch.ones((), device='meta'))),
    (lambda: get_dls('digits', bs=3, img_size=10**6, device='cpu'), 'img_size=1000000: expected a whole side in pixels ≥ 8 and ≤ 4096')]

@pytest.mark.parametrize('i', range(len(FAULTS)))
def test_faults_that_there_were(i):
    call,match = FAULTS[i]
    with time_limit(20), pytest.raises((ValueError, OSError), match=match): call()

def test_whole_numbers_stay_exact():
    for n in (2**60 + 1, np.int64(2**60 + 1), torch.tensor(2**60 + 1), Fraction(2**60 + 1)):
        assert check_number('n', n, whole=True) == 2**60 + 1

@pytest.mark.parametrize('cache', [True, False])
def test_names_that_are_not_utf8(tmp_path, cache):
    _bytes_name(folder(tmp_path)/'train'/'a')
    assert sum(read(tmp_path, cache)) == 12
    Path(os.fsdecode(os.fsencode(tmp_path) + b'/train/\xff')).mkdir()
    _bytes_name(tmp_path/'train'/'\udcff')
    with pytest.raises(ValueError, match='is not UTF-8'): read(tmp_path, cache)
