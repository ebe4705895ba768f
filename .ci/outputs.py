"""Compares the outputs that notebooks hold with those of the same notebooks executed now

`python .ci/outputs.py NBS EXECUTED`, two folders of notebooks. Text, tables and numbers must agree, numbers to one part in a
thousand, as processors round differently. Pictures are not compared, nor cells whose outputs depend on the machine or on long chains
of rounding, such as a whole training: those bear `"varies"` in their metadata (`"nbdev": {"varies": "true"}`).
"""
import json, math, re, sys
from pathlib import Path

number = re.compile(r'-?\d+\.?\d*(?:e[-+]?\d+)?')

def texts(cell) -> list:
    "What a reader sees of a cell's outputs, without pictures; the HTML of a table is left to its plain text"
    shown = []
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        kind = next((k for k in ('text/plain', 'text/markdown') if k in data), None)
        if o.get('output_type') == 'stream' and o.get('name') == 'stdout': shown.append(''.join(o['text']))
        elif kind: shown.append(''.join(data[kind]))
    return [re.sub(r' at 0x[0-9a-f]+', '', t).strip() for t in shown]

def same(a, b, tolerance=1e-3) -> bool:
    "Do two texts say the same, up to the rounding of their numbers?"
    words = [number.sub('#', t).split() for t in (a, b)]
    numbers = [[float(n) for n in number.findall(t)] for t in (a, b)]
    if words[0] != words[1] or len(numbers[0]) != len(numbers[1]): return False
    return all(math.isclose(x, y, rel_tol=tolerance, abs_tol=1e-5) for x,y in zip(*numbers))

def cells(file): return {c['id']: c for c in json.loads(file.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code'}

def main(stored, executed):
    compared,different = 0,[]
    for file in sorted(Path(stored).rglob('*.ipynb')):
        now = cells(Path(executed)/file.relative_to(stored))
        for id,cell in cells(file).items():
            if 'varies' in cell['metadata'].get('nbdev', {}): continue
            old,new = texts(cell),texts(now[id])
            compared += len(old)
            if len(old) != len(new) or not all(map(same, old, new)): different.append((file, id, old, new))
    for file,id,old,new in different: print(f'{file}, cell {id}\n  holds {old}\n  gives {new}')
    print(f'{compared} outputs compared, {len(different)} cells differ')
    if different: print('Run `nbdev-test --save NOTEBOOK && nbdev-clean`; mark what depends on the machine, see .ci/outputs.py')
    sys.exit(bool(different))

if __name__ == '__main__': main(*sys.argv[1:])
