"""Replaces the layers and the attention of models that were written for torch.nn."""
