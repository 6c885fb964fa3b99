"""ColBench: tasks, the turn protocol, simulated humans and the scorer. Learning is in the scripts."""

import logging
import warnings

# at import, bitsandbytes warns on some CPUs of an optional kernel; so import colbench before what imports bitsandbytes
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # accelerate asks for it
