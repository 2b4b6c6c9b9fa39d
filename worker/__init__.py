"""Training and serving: the processes that own tensors, and those that supervise them."""

import logging

# On a processor with AVX512_BF16, bitsandbytes logs advice to install a package that downloads code.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
