"Lists the lines of code that are longer than 140 characters: in code cells of notebooks, tests, benchmarks and here"
import json, sys
from pathlib import Path

LIMIT = 140
root = Path(__file__).parent.parent

def code_of(file):
    "The lines of code in a notebook or a Python file"
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.py': return text.splitlines()
    cells = [c for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
    return [line for c in cells for line in ''.join(c['source']).splitlines()]

def main():
    patterns = 'nbs/**/*.ipynb', 'tests/**/*.py', 'bench/**/*.py', '.ci/*.py', 'setup.py'
    files = sorted(file for pattern in patterns for file in root.glob(pattern))
    long = [(file, line) for file in files for line in code_of(file) if len(line) > LIMIT]
    for file,line in long: print(f'{file.relative_to(root)}: {len(line)} characters: {line.strip()[:100]}')
    print(f'{len(files)} files, {len(long)} lines of code over {LIMIT} characters')
    sys.exit(bool(long))

if __name__ == '__main__': main()
