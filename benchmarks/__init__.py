import runtime.threads  # before torch
