"""`scclip-fast eval` as a module, because torchrun starts modules and scripts but no commands.

    torchrun --nproc-per-node 8 -m scclip_fast.evaluate voc21

This file imports `cli`, which stands above `evaluate`, because it is a second entry point of the
command line. No other module imports it.
"""

import sys

from ..cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
