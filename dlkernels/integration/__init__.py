"""What carries both families into models that were written for torch.nn."""
