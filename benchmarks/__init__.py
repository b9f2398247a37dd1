import training.threads  # before torch
