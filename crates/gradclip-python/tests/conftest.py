"""Settings of all tests."""

import torch

# The tensors are small, and threads that wait for work take the time of others.
torch.set_num_threads(1)
