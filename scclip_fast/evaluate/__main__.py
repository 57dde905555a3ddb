"""`scclip-fast eval` for torchrun: torchrun --nproc-per-node 8 -m scclip_fast.evaluate voc21."""

import sys

from ..cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
