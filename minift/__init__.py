"""Instruction tuning and reward modelling from scratch in plain PyTorch."""
