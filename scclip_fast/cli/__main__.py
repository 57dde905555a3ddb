"""The command under torchrun: torchrun --nproc-per-node N -m scclip_fast.cli segment ..."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
