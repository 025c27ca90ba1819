"""Pretrain a BERT with token dropping: `deepspeed pretrain.py --deepspeed_config ds_configs/large.json`.

The training loop is sctd_ds/pretrain.py; this is `sctd pretrain` for launchers that take a script.
"""

import sys

from sctd_ds.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
