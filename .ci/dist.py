"""Builds sdist and wheel, looks into both, and uses the wheel in an empty environment: `python .ci/dist.py`"""
import argparse, subprocess, sys, tarfile, tempfile, zipfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
use = '''
import fastrain
from fastrain.all import *
from pathlib import Path
import torch
assert 'site-packages' in fastrain.__file__, fastrain.__file__
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
x = PGD(eps=.1, alpha=.05, steps=2)(model, torch.rand(4, 3, 2, 2), torch.zeros(4).long())
assert x.shape == (4, 3, 2, 2)
'''
line = 'train --epochs 1 --steps 1 --warmup 1 --n-train 100 --n-test 100 --method at+train --out'

def run(*command, **kwargs): subprocess.run(list(map(str, command)), check=True, **kwargs)

def build(out):
    run(sys.executable, '-m', 'build', '--outdir', out, root)
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))

def files_of(wheel, sdist):
    "Names in both, those of the sdist without its first folder"
    with zipfile.ZipFile(wheel) as z, tarfile.open(sdist) as t: return z.namelist(), [n.partition('/')[2] for n in t.getnames()]

def check_files(wheel, sdist):
    inside,source = files_of(wheel, sdist)
    strange = [n for n in inside if not n.startswith('fastrain/') and '.dist-info/' not in n or n.endswith('.ipynb')]
    assert not strange, f'The wheel holds {strange}'
    tracked = subprocess.run(['git', 'ls-files', 'fastrain', 'nbs', 'tests', 'bench', 'docs', '*.md', 'settings.ini'], cwd=root,
                             capture_output=True, text=True, check=True).stdout.split()
    missing = sorted(set(tracked) - set(source))
    assert not missing, f'The sdist lacks {missing}'
    missing = sorted({f for f in tracked if f.startswith('fastrain/')} - set(inside))
    assert not missing, f'The wheel lacks {missing}'

def check_use(wheel, folder):
    "In an environment that holds nothing else; needs uv, and what fastrain requires from an index"
    run('uv', 'venv', '-q', folder/'venv', '--python', sys.executable)
    run('uv', 'pip', 'install', '-q', '--python', folder/'venv'/'bin'/'python', wheel)
    env = dict(PATH=f'{folder}/venv/bin:/usr/bin:/bin', HOME=str(folder), MPLBACKEND='agg')
    run('python', '-c', use, cwd=folder, env=env)
    run('fastrain', *line.split(), folder/'run', cwd=folder, env=env)
    assert (folder/'run'/'report.html').is_file()

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--files-only', action='store_true', help='Do not install')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel,sdist = build(Path(folder)/'dist')
        check_files(wheel, sdist)
        if not args.files_only: check_use(wheel, Path(folder))
        print(f'{wheel.name} and {sdist.name}: ' + ('the right files' if args.files_only else 'the right files, and they work'))

if __name__ == '__main__': main()
