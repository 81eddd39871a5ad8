"""What holds for all tests."""

import torch
from hypothesis import settings

# Torch's own threads only get in each other's way on a machine with few cores; ranks switch them off as well.
torch.set_num_threads(1)

# A busy machine is no counterexample.
settings.register_profile("moemesh", deadline=None)
settings.load_profile("moemesh")
