"`python -m fastrain`, as `accelerate launch` and `torchrun` start it"
from fastrain.cli import main

if __name__ == '__main__': main()
