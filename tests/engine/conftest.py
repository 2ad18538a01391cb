"""Tiny tensors gain nothing from a second thread and lose much where another program runs."""

import torch

torch.set_num_threads(1)
