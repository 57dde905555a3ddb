"""`scclip-fast eval` as a module, because torchrun starts modules and scripts but no commands.

torchrun --nproc-per-node 8 -m scclip_fast.evaluate voc21

This file is a second entry point of the command line and nothing below imports it: it is the one
import of `cli` outside that package's own layer.
"""

import sys

from ..cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
