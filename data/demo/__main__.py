"""`python -m data.demo datasets/demo [seed=0] [scale=1.0]` draws the demo set."""

from data.demo.generate import main
from runtime import help
from runtime.errors import run

run(lambda argv: help.show(__doc__) if help.asked(argv) else main(argv))
