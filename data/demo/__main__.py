"""`python -m data.demo datasets/demo [seed=0] [scale=1.0]` draws the demo set."""

from data.demo.generate import main
from runtime.errors import run

run(main)
