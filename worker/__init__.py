"""What trains and what serves: the processes that hold tensors, and those that look after them."""

import logging

# On a processor with AVX512_BF16 it advises whoever reads the log to install a package that it would fetch code with.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
