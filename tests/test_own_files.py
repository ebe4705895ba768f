"Files of users: their keys, their errors, and what a checkpoint from a stranger may name"
import socket, sys

import pytest
import torch

from conftest import digits, net
from fastrain.attacks.named import AttackKind
from fastrain.core import Registered, save_tensors
from fastrain.evaluation.scores import Measure
from fastrain.models.backbone import create_backbone
from fastrain.models.stored import stored_backbone
from fastrain.pieces.losses import AT, RobustLoss
from fastrain.pieces.relations import Relation
from fastrain.runs import gallery
from fastrain.runs.evaluate import load_any
from fastrain.runs.own import call_own, import_code, import_file, own_error
from fastrain.runs.recipe import make_recipe
from fastrain.training.standard import trained_standard

@pytest.fixture(autouse=True)
def registries(monkeypatch):
    "They are as before after each test"
    for family in Registered.__subclasses__(): monkeypatch.setattr(family, 'registry', dict(family.registry))
    monkeypatch.setattr(gallery, 'pictures', dict(gallery.pictures))

# --- keys

BASES = {'at': RobustLoss, 'train': Relation, 'pgd': AttackKind, 'l_tp': Measure}

@pytest.mark.parametrize('key', BASES)
def test_a_key_of_the_library_is_refused(key):
    before = {family: dict(family.registry) for family in Registered.__subclasses__()}
    with pytest.raises(ValueError, match=f"the key '{key}' belongs to fastrain"): type('Mine', (BASES[key],), dict(key=key))
    assert before == {family: dict(family.registry) for family in Registered.__subclasses__()}

def test_a_key_of_another_family_is_refused():
    "A method's name does not say of which family its pieces are"
    with pytest.raises(ValueError, match="the key 'at' belongs to fastrain.pieces.losses.AT"): type('Mine', (Relation,), dict(key='at'))

NAMES_NO_FILE = ['..', '.', '.hidden', 'a/b', '/tmp/x', '../x', '', ' ', 'a b', 'a\nb', 'x'*61, 3, ['at'], 'a+b', 'a:b', 'a,b', '\0']

@pytest.mark.parametrize('key', NAMES_NO_FILE)
def test_a_key_that_cannot_name_a_file_is_refused(key):
    before = dict(RobustLoss.registry)
    with pytest.raises(ValueError, match='cannot name a file'): type('Mine', (AT,), dict(key=key))
    assert RobustLoss.registry == before

def test_a_class_defined_anew_keeps_its_key(tmp_path):
    own = tmp_path/'own.py'
    own.write_text('from fastrain.pieces.losses import AT\nclass Mine(AT): key = "mine"\n')
    first = import_file(own).Mine
    again = import_file(own).Mine
    assert RobustLoss.registry['mine'] is again is not first

def test_two_files_of_one_name_do_not_pass_for_each_other(tmp_path):
    for d in 'ab':
        (tmp_path/d).mkdir()
        (tmp_path/d/'own.py').write_text('from fastrain.pieces.losses import AT\nclass Mine(AT): key = "mine"\n')
    import_file(tmp_path/'a'/'own.py')
    with pytest.raises(ValueError, match="the key 'mine' belongs to fastrain_own_"): import_file(tmp_path/'b'/'own.py')

def test_abstract_pieces_have_no_key():
    type('Abstract', (RobustLoss,), {})
    type('Abstract', (RobustLoss,), dict(key=None))

def test_a_picture_of_the_library_is_refused():
    def curves(e): "Mine"
    with pytest.raises(ValueError, match="the key 'curves' belongs to fastrain.runs.gallery._curves"): gallery.picture(curves)
    assert gallery.picture(type(curves)(curves.__code__, globals(), 'mine'))

# --- errors

def told(tmp_path, text, call=None):
    "What is shown of the error of a file"
    own = tmp_path/'own.py'
    own.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Exception) as e:
        module = import_file(own)
        call(module)
    # the frame of this file stands between
    return own_error(e.value).replace(str(tmp_path) + '/', ''), e.value

@pytest.mark.parametrize('text, line, what', [
    ('x = 1\ny = x + "a"\n', 'own.py", line 2, in <module>', 'TypeError: unsupported operand'),
    ('import nowhere_at_all\n', 'own.py", line 1, in <module>', "ModuleNotFoundError: No module named 'nowhere_at_all'"),
    ('\n\ndef f(:\n', 'own.py", line 3', 'SyntaxError: invalid syntax'),
    ('if 1:\nx\n', 'own.py", line 2', 'IndentationError'),
    ('from fastrain.core import lookup\nlookup("tardes", ["trades"])\n', 'own.py", line 2, in <module>', "Unknown name 'tardes'"),
    ('from fastrain.pieces.losses import AT\n\nclass Mine(AT):\n    key = "mart"\n',
     'own.py", line 3, in <module>', "key 'mart' belongs to")])
def test_an_error_is_shown_with_its_own_line_and_without_ours(tmp_path, text, line, what):
    shown,_ = told(tmp_path, text)
    assert line in shown and what in shown.splitlines()[-1]
    assert not any(place in shown for place in ('fastrain/core', 'fastrain/names', 'runs/own', 'importlib', 'site-packages'))

@pytest.mark.parametrize('content', [b'\0', b'\x89PNG\r\n\x1a\n\0', b'\xff\xfe', b'x = "\xff"'])
def test_no_python(tmp_path, content):
    own = tmp_path/'own.py'
    own.write_bytes(content)
    with pytest.raises((ValueError, SyntaxError), match='(?i)own.py|unicode|utf-8') as e: import_file(own)
    assert isinstance(e.value, ValueError) or own_error(e.value)

def test_an_error_in_a_call_of_torch(tmp_path):
    text = 'import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x):\n        return super().forward(x[:,:3])\n'
    shown,_ = told(tmp_path, text, lambda m: m.Net(5, 2)(torch.zeros(1, 5)))
    assert 'own.py", line 4, in forward' in shown and 'site-packages' not in shown and 'RuntimeError: ' in shown

def test_files_that_are_none(tmp_path):
    (tmp_path/'own.txt').write_text('')
    for file in (tmp_path/'nowhere.py', tmp_path, ''):
        with pytest.raises(ValueError, match='there is no such file|is a folder: name a Python file in it'): import_file(file)
    with pytest.raises(ValueError, match='its name must end in .py'): import_file(tmp_path/'own.txt')
    (tmp_path/'quits.py').write_text('import sys; sys.exit()')
    with pytest.raises(ValueError, match='quits.py ends the program'): import_file(tmp_path/'quits.py')

def test_models_by_name(tmp_path):
    (tmp_path/'m.py').write_text('import torch\nmodel = torch.nn.Linear(2, 2)\nnumber = 3\ndef make(n): return model\nimport fastrain\n')
    (tmp_path/'broken.py').write_text('import nowhere_at_all\n')
    for spec,match in (('nowhere.models:make', 'There is no module nowhere. Write'), (':make', 'is no name of a module'),
                       ('..:make', 'is no name'),
                       (f'{tmp_path}/m.py:nothing', 'there is no nothing in'), (f'{tmp_path}/m.py:number', 'is int, expected a function'),
                       (f'{tmp_path}/m.py:make', "missing a required argument: 'n'")):
        with pytest.raises(ValueError, match=match): load_any(spec, 2)
    assert load_any(f'{tmp_path}/m.py:model', 2).out_features == 2
    with pytest.raises(ModuleNotFoundError, match='nowhere_at_all') as e: load_any(f'{tmp_path}/broken.py:make', 2)
    assert 'broken.py", line 1' in own_error(e.value)

# --- checkpoints of strangers

@pytest.fixture
def offline(monkeypatch):
    "Whoever asks the network fails the test"
    def ask(*args, **kwargs): pytest.fail('it asks the network')
    monkeypatch.setattr(socket.socket, 'connect', ask)
    monkeypatch.setattr(socket, 'getaddrinfo', ask)

def checkpoint(path, **changes):
    model = create_backbone('test_resnet', 10)
    save_tensors(path, dict(settings=dict(model.settings, **changes), model=model.state_dict()))
    return path

AWAY = [dict(name='hf-hub:evil/model'), dict(name='hf_hub:evil/model'), dict(name='local-dir:/tmp'), dict(name='timm/resnet18'),
        dict(name='http://evil/model.pt'), dict(pretrained=True), dict(checkpoint='/etc/passwd'), dict(checkpoint_path='/etc/passwd'),
        dict(pretrained_cfg=dict(url='http://evil')), dict(pretrained_cfg_overlay=dict(hf_hub_id='evil/model')), dict(cache_dir='/tmp')]

@pytest.mark.parametrize('changes', AWAY, ids=range(len(AWAY)))
def test_a_name_in_a_file_is_never_followed(tmp_path, offline, changes):
    file = checkpoint(tmp_path/'last.pt', **changes)
    with pytest.raises(ValueError, match='last.pt'): load_any(file, 10)
    with pytest.raises(ValueError, match='last.pt'): trained_standard(file, 10, 32)

@pytest.mark.parametrize('settings', [3, 'resnet18', ['a'], dict(), dict(n_classes=10), dict(name=3), dict(name='resnet18'),
                                      dict(name='resnet18', n_classes='ten'), dict(name='resnet18', n_classes=10, nothing=1)])
def test_settings_of_another_kind(settings):
    with pytest.raises(ValueError, match='last.pt'): stored_backbone(settings, 'last.pt')

def test_a_hub_is_asked_only_for_pretrained_weights(offline):
    with pytest.raises(ValueError, match='is on the network'): create_backbone('hf-hub:somebody/model', 10)

@pytest.mark.parametrize('name', ['nowhere.pt', 'runs/nowhere', 'runs/nowhere/checkpoints/standard/last.pt', 'weights.safetensors'])
def test_a_file_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=f'There is no run or file {name}'): create_backbone(name, 10)

def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match='is a folder: name a Python file in it'): import_file(tmp_path)

def test_a_function_that_ends_the_program():
    with pytest.raises(ValueError, match='m.py:make ends the program: it must return a model'): call_own(lambda: sys.exit(3), 'm.py:make')
